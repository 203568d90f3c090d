"""Sites with transforms: what is read, what is written, and which norms can be used without their gain."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_gated_sae import Ablate, Splice, attach, capture
from hf_gated_sae.errors import SiteError
from hf_gated_sae.functional.normalization import NORMALIZATIONS
from hf_gated_sae.sites import Site, Transform, resolve
from hf_gated_sae.sites.slots import Slot, TensorPath
from hf_gated_sae.sites.transforms import TRANSFORMS, view
from tests.support.example_saes import example
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
PLAIN = ("center", "layer_norm", "unit_norm", "rms_norm=1e-05", "standardize", "scale=-0.5", "scale=2|center")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def run(model, site=None, edit=None):
    """Return the logits with an edit at a site, and the value read there."""
    read = []

    def hook(value):
        read.append(value.clone())
        return None if edit is None else edit(value)

    handle = None if site is None else resolve(model)[site].register(hook, tokens=lambda: tuple(IDS.shape))
    try:
        with torch.no_grad():
            return model(IDS, use_cache=False).logits, read[0] if read else None
    finally:
        if handle is not None:
            handle.remove()


def read(model, site):
    return run(model, site)[1]


def parse(text):
    return tuple(map(Transform.parse, text.split("|")))


def test_what_is_read(llama):
    x = read(llama, "resid_post.1")
    assert torch.equal(read(llama, "resid_post.1|center"), x - x.mean(-1, keepdim=True))
    assert torch.equal(read(llama, "resid_post.1|scale=0.5"), x * 0.5)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(read(llama, "resid_post.1|rms_norm=1e-05"), expected)
    y = read(llama, "resid_post.1|standardize")
    torch.testing.assert_close(y, nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6))
    torch.testing.assert_close(read(llama, "resid_post.1|unit_norm").norm(dim=-1), torch.full((2, 5), 32**0.5))


def test_transforms_are_applied_from_left_to_right(llama):
    x = read(llama, "resid_post.1|standardize|scale=3")
    torch.testing.assert_close(x, 3 * read(llama, "resid_post.1|standardize"))
    assert not torch.allclose(read(llama, "resid_post.1|scale=3|standardize"), x)


@pytest.mark.parametrize("transform", PLAIN)
@pytest.mark.parametrize("site", ["resid_post.1", "resid_mid.1", "mlp_neurons.1", "model.layers.1.mlp.output"])
def test_an_unchanged_value_leaves_the_model_as_it_is(llama, site, transform):
    plain, _ = run(llama)
    assert torch.equal(run(llama, f"{site}|{transform}", torch.clone)[0], plain)
    assert torch.equal(run(llama, f"{site}|{transform}", lambda value: None)[0], plain)
    ramp = torch.linspace(-1, 1, 48)
    assert not torch.equal(run(llama, f"{site}|{transform}", lambda value: value + ramp[: value.shape[-1]])[0], plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transform", PLAIN)
def test_not_a_bit_changes_in_any_dtype(dtype, transform):
    x = (torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    x[0, 0], x[0, 1, 0], x[0, 1, 1] = 0.0, -0.0, 0.0
    for new in (lambda y: y, lambda y: y.clone(), lambda y: y.double()):
        seen = view(x, parse(transform))
        assert seen.value.dtype == dtype
        written = seen.written(new(seen.value)).to(dtype)
        assert torch.equal(written, x)
        assert torch.equal(written.signbit(), x.signbit()), "also the sign of zero"


@pytest.mark.parametrize("transform", [*PLAIN, "scale=8e37", "scale=-2e-38"])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e25, torch.inf])
def test_not_a_bit_changes_however_large_or_small(size, transform):
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0)) * min(size, 1.0)
    x[0, 0] *= max(size, 1.0)
    x[0, 1, 0], x[0, 1, 1] = size, -size
    seen = view(x, parse(transform))
    assert torch.equal(seen.written(seen.value.clone()), x)


def test_nonfinite_values_that_are_written_are_not_hidden():
    x = torch.ones(1, 4)
    x[0, 0] = torch.inf
    for site in ("center", "scale=2"):
        seen = view(x, parse(site))
        assert seen.written(torch.full((1, 4), torch.nan))[0, 1:].isnan().all() or seen.value.isnan().all()
        new = seen.value.clone()
        new[0, 0] = 3.0
        assert not seen.written(new)[0, 0].isfinite()
        assert torch.equal(seen.written(new)[0, 1:], x[0, 1:])


chains = st.lists(
    st.one_of(
        st.sampled_from(
            [Transform(name) for name, kind in TRANSFORMS.items() if kind.apply and kind.default is not None]
        ),
        st.builds(lambda c: Transform("scale", c), st.one_of(st.floats(0.01, 100), st.floats(-100, -0.01))),
    ),
    min_size=1,
    max_size=4,
)


@given(chains, st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_any_chain_is_undone(chain, seed, size):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)) * size
    seen = view(x, chain)
    assert torch.equal(seen.written(seen.value), x)
    # A change is written back as the same change, in units of x.
    delta = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed + 1)) * 0.1
    moved = seen.written(seen.value + delta).double() - x.double()
    torch.testing.assert_close(moved, (delta * seen.factor).double(), rtol=1e-3, atol=1e-3 * size)


def test_centring_adds_back_what_it_subtracted(llama):
    x = read(llama, "resid_post.1")
    mean = x.mean(-1, keepdim=True).expand_as(x)
    logits, _ = run(llama, "resid_post.1|center", torch.zeros_like)
    torch.testing.assert_close(logits, run(llama, "resid_post.1", lambda value: mean)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["center", "layer_norm", "unit_norm", "rms_norm", "standardize"])
def test_a_site_with_a_normalisation_equals_an_sae_with_it(llama, name):
    """The same value is written back whether the site or the SAE has the normalisation."""

    def reconstruct(y):  # any function of what is read
        return y * 0.7 + 0.1

    def as_an_sae(x):
        frame = NORMALIZATIONS[name](x, 1e-6)
        return frame.undo(reconstruct(frame.apply(x)))

    at_site, _ = run(llama, f"resid_post.1|{name}", reconstruct)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}  # undoing layer_norm leaves an epsilon out
    torch.testing.assert_close(at_site, run(llama, "resid_post.1", as_an_sae)[0], **tolerance)


@pytest.mark.parametrize("intervention", [Splice, lambda sae: Ablate(sae, [1, 2, 3])])
def test_an_sae_may_have_a_transform_in_its_site(llama, intervention):
    """It gives the same result as an equal normalisation in the SAE's configuration."""
    settings = {"base_model": None, "d_in": 32, "d_sae": 64}
    at_site = example("gated", site="resid_post.1|center", **settings)
    inside = example("gated", site="resid_post.1", normalization="center", **settings)
    inside.load_state_dict(at_site.state_dict())
    found = capture(llama, ["resid_post.1|center", at_site, inside], input_ids=IDS)
    assert torch.equal(found["resid_post.1|center"], read(llama, "resid_post.1|center"))
    assert torch.equal(found[at_site], found[inside])
    logits = []
    for sae in (at_site, inside):
        with torch.no_grad(), attach(llama, intervention(sae)):
            logits.append(llama(IDS, use_cache=False).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0], run(llama)[0], rtol=1e-2, atol=1e-2)


def test_a_write_in_place_reaches_the_stream(llama):
    added = torch.randn(32, generator=torch.Generator().manual_seed(3))
    added -= added.mean()
    plain, _ = run(llama, "resid_mid.1", lambda value: value + added)
    torch.testing.assert_close(run(llama, "resid_mid.1|center", lambda value: value + added)[0], plain)


def test_on_a_scaled_contribution():
    model = tiny_model("granite")
    x = read(model, "attn_out.1")
    assert torch.equal(x, read(model, "model.layers.1.self_attn.output") * 0.22)
    assert torch.equal(read(model, "attn_out.1|scale=10"), x * 10)
    expected, _ = run(model, "attn_out.1", lambda value: value + 0.3)
    torch.testing.assert_close(run(model, "attn_out.1|scale=10", lambda value: value + 3)[0], expected)


def test_a_new_parameter_at_zero_gets_a_gradient(llama):
    added = torch.zeros(32, requires_grad=True)
    slot = resolve(llama)["resid_post.1|layer_norm"]
    handle = slot.register(lambda value: value + added)
    llama(IDS).logits.square().sum().backward()
    handle.remove()
    llama.zero_grad()
    assert added.grad is not None and added.grad.abs().min() > 0


def test_flattened_tokens():
    model = tiny_model("llama4_text")
    site = "model.layers.1.feed_forward.output"  # experts read the tokens of a batch as rows
    assert resolve(model)[site].tensor_path.rank == 2
    x = read(model, site)
    y = read(model, f"{site}|center")
    assert y.shape == x.shape == (2, 5, 32)
    assert torch.equal(y, x - x.mean(-1, keepdim=True))
    assert torch.equal(run(model, f"{site}|center", torch.clone)[0], run(model)[0])


NORMS = {
    "gpt2": ("resid_mid.1", "transformer.h.1.ln_2", 0.0),
    "gpt_neox": ("resid_pre.1", "gpt_neox.layers.1.input_layernorm", 0.0),
    "llama": ("resid_mid.1", "model.layers.1.post_attention_layernorm", 0.0),
    "gemma2": ("resid_mid.1", "model.layers.1.pre_feedforward_layernorm", 1.0),
    "qwen3_moe": ("resid_pre.2", "model.layers.2.input_layernorm", 0.0),
    "mamba": ("resid_pre.1", "backbone.layers.1.norm", 0.0),
}


@pytest.mark.parametrize("family", NORMS)
def test_the_models_norm_without_its_gain(family):
    model = tiny_model(family)
    site, path, offset = NORMS[family]
    y = read(model, f"{site}|norm_no_gain")
    norm = model.get_submodule(path)
    bias = getattr(norm, "bias", None)
    expected = (read(model, f"{path}.output") - (0 if bias is None else bias)) / (norm.weight + offset)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(run(model, f"{site}|norm_no_gain", torch.clone)[0], run(model)[0])


def test_the_last_stream_is_read_by_the_final_norm(llama):
    y = read(llama, "resid_post.2|norm_no_gain")
    torch.testing.assert_close(y * llama.model.norm.weight.detach(), read(llama, "final_norm"))


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_epsilon_is_the_models_own(eps, dtype):
    model = tiny_model("llama", rms_norm_eps=eps).to(dtype)
    assert resolve(model)["resid_mid.1|norm_no_gain"].tensor_path.transforms == (Transform("rms_norm", eps),)
    other = tiny_model("gpt2", layer_norm_epsilon=eps).to(dtype)
    assert resolve(other)["resid_mid.1|norm_no_gain"].tensor_path.transforms == (Transform("standardize", eps),)


class Decoyed(nn.RMSNorm):
    """A norm with other numbers beside its epsilon."""

    def __init__(self, like):
        super().__init__(len(like.weight), eps=1e-5)
        self.weight, self.slope, self.threshold = like.weight, 1e-6, 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_epsilon_is_found_from_what_the_norm_computes(dtype):
    """Not from the name of an attribute: tokens near zero show which number is the epsilon."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.post_attention_layernorm = Decoyed(layer.post_attention_layernorm)
    slot = resolve(model.to(dtype))["resid_mid.1|norm_no_gain"]
    assert slot.tensor_path.transforms == (Transform("rms_norm", 1e-5),)


class Odd(nn.Module):
    """A norm of another kind, which divides by the mean absolute value."""

    def __init__(self, like):
        super().__init__()
        self.weight = like.weight
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_a_norm_that_cannot_be_proven_is_refused():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.post_attention_layernorm = Odd(layer.post_attention_layernorm)
    sites = resolve(model)
    assert "resid_mid.1" in sites
    with pytest.raises(SiteError, match=r"resid_mid.1\|norm_no_gain.*post_attention_layernorm: not an RMS norm"):
        sites["resid_mid.1|norm_no_gain"]
    assert "resid_pre.1|norm_no_gain" in sites
    assert "resid_mid.1|rms_norm" in sites


def test_norm_no_gain_is_refused_if_no_norm_reads_the_site(llama):
    sites = resolve(llama)
    for site in ("mlp_neurons.1", "attn_z.1"):
        with pytest.raises(SiteError, match="no module that could be one reads exactly that tensor"):
            sites[f"{site}|norm_no_gain"]
    with pytest.raises(SiteError, match="must be the first transform"):
        sites["resid_mid.1|center|norm_no_gain"]
    olmo = tiny_model("olmo2")  # its norms come after attention and MLP
    assert "resid_mid.1|norm_no_gain" not in resolve(olmo)


def test_transforms_of_sites_that_the_model_lacks_are_refused(llama):
    sites = resolve(llama)
    with pytest.raises(SiteError, match="has 3 layers"):
        sites["resid_post.7|center"]
    with pytest.raises(SiteError, match="no module 'model.nrom'"):
        sites["model.nrom.output|center"]


def test_the_proof_of_norms_is_made_once_and_leaves_nothing():
    calls = []
    model = tiny_model("llama").train()
    sites = resolve(model)
    counting = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert "resid_pre.1|center" in sites and not calls
    assert "resid_pre.1|norm_no_gain" in sites and len(calls) == 1
    assert "resid_mid.2|norm_no_gain" in sites and len(calls) == 1
    counting.remove()
    assert model.training and all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_transforms_the_tensor_is_not_copied():
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    assert view(x, ()).value is x


def test_a_model_dependent_transform_cannot_be_applied_without_a_model():
    with pytest.raises(SiteError, match="depends on the model"):
        view(torch.ones(2, 3), [Transform("norm_no_gain")])
    with pytest.raises(SiteError, match="Unknown transform"):
        Transform("normalise")


def test_tensor_paths_differ_by_transforms_and_share_the_bare_one(llama):
    sites = resolve(llama)
    plain, centred = sites["resid_post.1"], sites["resid_post.1|center"]
    assert centred.tensor_path != plain.tensor_path and centred.tensor_path.bare == plain.tensor_path
    assert hash(centred.tensor_path) == hash(sites["resid_post.1|center"].tensor_path)
    assert str(centred.site) == "resid_post.1|center" and centred.width == plain.width
    assert isinstance(centred, Slot) and isinstance(centred.tensor_path, TensorPath)
    assert centred.site == Site.parse("resid_post.1|center")


def test_the_numbered_tensors_of_a_module():
    model = tiny_model("gpt_oss")  # its MLP also returns the router's scores
    sites = resolve(model)
    hidden, scores = "model.layers.1.mlp.output#0", "model.layers.1.mlp.output#1"
    assert sites[hidden].tensor_path == sites["model.layers.1.mlp.output"].tensor_path
    assert torch.equal(read(model, hidden), read(model, "mlp_out.1"))
    assert sites[scores].tensor_path.keys == (1,)
    with pytest.raises(SiteError, match="has 2 tensors, counted from 0"):
        sites["model.layers.1.mlp.output#2"]
    with pytest.raises(SiteError, match="no module 'model.layers.1.mpl'"):
        sites["model.layers.1.mpl.output#1"]
    with pytest.raises(SiteError, match=r"model.embed_tokens.input#0.*that tensor is of torch.int64"):
        sites["model.embed_tokens.input#0"]


@given(st.floats(width=32, min_value=2.0**-100, max_value=2.0**100))
def test_numbers_of_float32_are_written_short_and_read_as_the_same(value):
    made = Transform("rms_norm", value)
    assert Transform.parse(str(made)) == made
    assert torch.tensor(made.value, dtype=torch.float32).item() == value
    written = Decimal(str(made).removeprefix("rms_norm="))
    assert len(written.normalize().as_tuple().digits) <= 9, "9 digits distinguish all numbers of float32"


def test_an_epsilon_that_a_model_keeps_in_float32_is_a_short_name():
    made = Transform("rms_norm", torch.tensor(1e-5).item())
    assert str(made) == "rms_norm=1e-05" and made == Transform("rms_norm", 1e-5)
    assert str(Transform("scale", 0.1)) == "scale=0.1" and Transform("scale", 1 / 3).value == 1 / 3
