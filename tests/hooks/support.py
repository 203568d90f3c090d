"""Shared by the tests of hooks: models, SAEs of every architecture, and a hand-written reference."""

import contextlib
import inspect

import torch

from hf_gated_sae import Steer, capture
from hf_gated_sae.architectures import architectures
from hf_gated_sae.architectures.cross_layer import CrossLayerSAE, CrossLayerSAEConfig
from tests.support.tiny_models import HIDDEN, tiny_model

# Paths of each family's blocks, written by hand so that the reference does not use the code under test.
BLOCKS = {
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "gemma2": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neo": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gpt_oss": "model.layers",
    "granite": "model.layers",
    "llama": "model.layers",
    "llama4_text": "model.layers",
    "mamba": "backbone.layers",
    "mpt": "transformer.blocks",
    "opt": "model.decoder.layers",
    "qwen3_moe": "model.layers",
    "recurrent_gemma": "model.layers",
}
FAMILIES = sorted(BLOCKS)
ARCHITECTURES = sorted(
    name for name in architectures if architectures[name].one_site and architectures[name].per_token
)
SITE = "resid_post.1"
D_SAE = 64

# Without padding (0), BOS (1) and EOS (2).
IDS = torch.tensor([[11, 54, 33, 78, 90, 17], [60, 41, 22, 13, 5, 44]])


SHARED = {}


def model_of(family, dtype=torch.float32):
    """A model that tests share, and must leave unchanged."""
    if (family, dtype) not in SHARED:
        SHARED[family, dtype] = tiny_model(family).to(dtype)
    return SHARED[family, dtype]


def make_sae(architecture="gated", *, site=SITE, seed=0, d_in=HIDDEN, dtype=torch.float32, recorded=True, **settings):
    """An SAE with latents active at some tokens and random biases, so that leaving out any term shows."""
    cls = architectures[architecture]
    if "k" in cls.config_class.__dataclass_fields__:
        settings.setdefault("k", 12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = cls(cls.config_class(d_in=d_in, d_sae=D_SAE, site=site, **settings)).eval()
        with torch.no_grad():
            for name, value in sae.named_parameters():
                value.copy_(torch.randn_like(value) * (0.3 if value.ndim > 1 else 0.2))
                if name == "threshold":
                    value.abs_()
    sae.requires_grad_(False)
    if recorded:
        steps = torch.arange(1, D_SAE + 1) / D_SAE
        sae.record_statistics(2 * steps, steps, tokens=1000)
    return sae.to(dtype)


def steer(strength=6.0, site="resid_post.1", **settings):
    return Steer(make_sae(site=site), 3, strength=strength, unit="raw", **settings)


def active_latents(model, sae, ids=IDS, count=4):
    """Latents that are active at about half of the tokens, so that editing them has an effect."""
    latents = capture(model, sae, input_ids=ids)[sae]
    order = (latents > 0).float().mean((0, 1)).sub(0.5).abs().argsort()
    chosen = order[:count].tolist()
    assert (latents[..., chosen] > 0).any()
    return chosen


def block(model, family, layer=1):
    return model.get_submodule(f"{BLOCKS[family]}.{layer}")


@contextlib.contextmanager
def hand_made(module, edit):
    """Replace a module's output `x` by ``edit(x)``, with a plain torch hook."""

    def hook(_, __, output):
        return edit(output) if isinstance(output, torch.Tensor) else (edit(output[0]), *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def full_path(sae, edit):
    """Return a function that encodes all latents, edits them, decodes all and adds the error."""

    def run(x):
        latents = sae.encode(x)
        error = x - sae.decode(latents)
        changed = latents.clone()
        edit(changed)
        return sae.decode(changed) + error

    return run


@torch.no_grad()
def logits_of(model, ids=IDS, **inputs):
    return model(input_ids=ids, **inputs).logits


def cache_name(model):
    """The name that this version of transformers gives to a model's cache."""
    names = inspect.signature(type(model).forward).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params", "state") if name in names)


def continuing(model, cache):
    """The keyword argument that passes a cache, or the cache of an output, to a model."""
    name = cache_name(model)
    return {name: cache[name] if name in getattr(cache, "keys", tuple)() else cache}


def checkpoint_layers(model, *, reentrant):
    """Enable gradient checkpointing, under either name that transformers has given the method."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def close(value, expected, relative):
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)  # all may be zero
    worst = (value - expected).abs().max() / scale
    assert worst <= relative, f"differs by {worst:.3g} of the largest value"


def hooks_on(model):
    """Numbers of hooks of each module that has any, and names of attributes that shadow the model's methods."""
    counts = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    }
    shadowed = [name for name in vars(model) if callable(getattr(type(model), name, None))]
    return {name: count for name, count in counts.items() if any(count)}, shadowed


def is_clean(model, clean):
    return hooks_on(model) == ({}, []) and torch.equal(logits_of(model), clean)


def make_cross_layer(
    sites=("mlp_in.0", "mlp_in.1"), sites_out=("mlp_out.0", "mlp_out.1"), *, dtype=torch.float32, **settings
):
    """A cross-layer transcoder, or a crosscoder with ``sites_out=None``; latents are active at some tokens."""
    parts = [D_SAE // len(sites)] * len(sites)
    config = CrossLayerSAEConfig(
        d_in=HIDDEN,
        d_sae=D_SAE,
        sites=list(sites),
        sites_out=sites_out and list(sites_out),
        latents_per_site=parts,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = CrossLayerSAE(config).eval()
        with torch.no_grad():
            for name, value in sae.named_parameters():
                value.copy_(torch.randn_like(value) * (0.3 if value.ndim > 1 else 0.2))
                if name == "threshold":
                    value.abs_()
    return sae.requires_grad_(False).to(dtype)


def padded_batches(count=3, rows=4, columns=7, side="left"):
    """Batches with rows of several lengths: BOS (1) first, EOS (2) in one row, and padding (0)."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        ids = torch.randint(3, 97, (rows, columns), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows):
            missing = (row + number) % 4
            ids[row, missing if side == "left" else 0] = 1
            gap = slice(0, missing) if side == "left" else slice(columns - missing, columns)
            ids[row, gap], mask[row, gap] = 0, 0
        ids[0, 4] = 2
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def placed(batch):
    """The batch with position ids that count real tokens only."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def counted(batch):
    return (batch["attention_mask"] == 1) & (batch["input_ids"] != 1) & (batch["input_ids"] != 2)


def joined(harvests, key):
    return torch.cat([each[key] if isinstance(each[key], torch.Tensor) else each[key].dense() for each in harvests])
