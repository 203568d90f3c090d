"""Where nothing is edited, nothing changes: not a bit of the logits, not even the tensor object."""

import pytest
import torch

from hf_gated_sae import Ablate, Clamp, ProjectOut, Scale, Splice, Steer, TokenIds, attach
from hf_gated_sae.interventions import AblateSite
from tests.hooks.support import BLOCKS, FAMILIES, IDS, active_latents, block, logits_of, make_sae, model_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def idle(sae, latents):
    """Interventions that must not change anything, by the reason."""
    return {
        "scale by one": Scale(sae, dict.fromkeys(latents, 1.0)),
        "no positions": Ablate(sae, latents, positions=[]),
        "special tokens, which are left out": Clamp(sae, {latents[0]: 50.0}, positions=TokenIds([0, 1, 2])),
        "condition never met": Steer(sae, latents[0], strength=9.0, when={latents[1]: 1e9}),
        "generated, of a plain forward": Splice(sae, positions="generated"),
        "site, nowhere": AblateSite("resid_post.0", positions=TokenIds([0, 1, 2])),
        "directions, nowhere": ProjectOut("resid_post.1", torch.ones(32), positions=torch.zeros(6) > 0),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_idle_interventions_leave_every_bit_of_the_logits(family, dtype):
    model = model_of(family, DTYPES[dtype])
    sae = make_sae()
    clean = logits_of(model)
    latents = active_latents(model, sae)
    with attach(model, *idle(sae, latents).values()) as handle:
        assert torch.equal(logits_of(model), clean)
        assert all(entry.calls == 1 for entry in handle.report().interventions)
    with attach(model, Clamp(sae, {latents[0]: 50.0})):
        assert not torch.equal(logits_of(model), clean)
    assert torch.equal(logits_of(model), clean)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "gemma2", "mamba", "mpt", "opt", "llama4_text"])
def test_idle_interventions_leave_generated_tokens_and_scores(family, dtype):
    model = model_of(family, DTYPES[dtype])
    sae = make_sae()
    settings = dict(
        max_new_tokens=4, min_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    clean = model.generate(IDS, **settings)
    latents = active_latents(model, sae)
    chosen = [edit for name, edit in idle(sae, latents).items() if not name.startswith("generated")]
    with attach(model, *chosen):
        again = model.generate(IDS, **settings)
    assert torch.equal(again.sequences, clean.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.scores, clean.scores, strict=True))


@pytest.mark.parametrize("name", ["no positions", "generated, of a plain forward"])
@pytest.mark.parametrize("family", ["gpt2", "mpt"])
def test_a_call_without_edited_tokens_passes_the_very_same_tensor(family, name):
    model = model_of(family)
    given, taken = [], []
    last = block(model, family, 1)
    after = block(model, family, 2)
    handles = [
        last.register_forward_hook(lambda m, a, out: given.append(out if torch.is_tensor(out) else out[0])),
        after.register_forward_pre_hook(
            lambda m, args, kwargs: taken.append((*args, *kwargs.values())), with_kwargs=True
        ),
    ]
    sae = make_sae()
    edits = idle(sae, [1, 2])
    try:
        with attach(model, edits[name]):
            logits_of(model)
    finally:
        for handle in handles:
            handle.remove()
    assert any(each is given[-1] for each in taken[-1])


def test_the_families_cover_blocks_that_return_tensors_and_tuples():
    kinds = set()
    for family in BLOCKS:
        with torch.no_grad():
            seen = []
            handle = block(model_of(family), family).register_forward_hook(lambda m, a, out: seen.append(type(out)))
            model_of(family)(IDS)
            handle.remove()
        kinds |= set(seen)
    assert {torch.Tensor, tuple} <= kinds
