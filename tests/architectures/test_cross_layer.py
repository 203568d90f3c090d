"""The cross-layer SAE: its equations, and for several sites what `test_conformance.py` tests for one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from hf_gated_sae import SAEModel, Splice
from hf_gated_sae.architectures.cross_layer import CrossLayerSAE, CrossLayerSAEConfig
from hf_gated_sae.errors import CheckpointError, InputError, LatentIndexError, ShapeError
from tests.architectures.references import cross_layer as reference
from tests.architectures.references import normalization
from tests.support.example_saes import assert_same, randomised

D_IN, D_OUT = 5, 4
SITES, OUT = ["resid_mid.0", "resid_mid.2", "resid_mid.3"], ["mlp_out.0", "mlp_out.2", "mlp_out.3"]
PARTS = [6, 7, 9]
D_SAE = sum(PARTS)

CASES: dict[str, dict[str, Any]] = {
    "transcoder": {"sites": SITES, "sites_out": OUT, "d_out": D_OUT},
    "relu transcoder with a skip": {
        "sites": SITES, "sites_out": OUT, "d_out": D_OUT, "activation": "relu", "skip_connection": True
    },
    "crosscoder": {"sites": SITES, "normalization": "center"},
    "centred crosscoder": {"sites": SITES, "apply_b_dec_to_input": True},
    "rms transcoder with a skip": {
        "sites": SITES, "sites_out": OUT, "d_out": D_OUT, "normalization": "rms_norm", "skip_connection": True
    },
    "one layer": {"sites": SITES[:1], "sites_out": OUT, "d_out": D_OUT, "latents_per_site": [D_SAE]},
    "one layer with a skip": {
        "sites": SITES[:1], "sites_out": OUT, "d_out": D_OUT, "latents_per_site": [D_SAE], "skip_connection": True
    },
    "more outputs than inputs": {"sites": SITES[:2], "sites_out": OUT, "d_out": D_OUT, "latents_per_site": [10, 12]},
}  # fmt: skip
every_case = pytest.mark.parametrize("case", list(CASES))


def build(case: str = "transcoder", **settings: Any) -> CrossLayerSAE:
    settings = {"d_in": D_IN, "d_sae": D_SAE, "latents_per_site": PARTS, **CASES[case], **settings}
    return CrossLayerSAE(CrossLayerSAEConfig(**settings))


def example(case: str = "transcoder", **settings: Any) -> CrossLayerSAE:
    sae = randomised(build(case, **settings))
    assert isinstance(sae, CrossLayerSAE)
    return sae


def activations(sae: SAEModel, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, *sae.input_shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


@every_case
def test_it_computes_its_equations(case: str) -> None:
    """On the shapes of real checkpoints; `test_equations.py` draws others."""
    sae = example(case).double()
    x = activations(sae, 40).numpy()
    shift, divisor, scale = normalization(x, sae.config)
    read, p = (x - shift) / divisor, {name: tensor.numpy() for name, tensor in sae.state_dict().items()}
    latents = reference.encode(read, p, sae.config)
    output = reference.decode(latents, read, p, sae.config)
    if sae.sites == sae.sites_out:
        output = output * scale + shift
    got = sae(torch.from_numpy(x))
    assert 0.05 < (latents > 0).mean() < 0.95
    np.testing.assert_allclose(got.latents.detach().numpy(), latents, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got.reconstruction.detach().numpy(), output, rtol=1e-10, atol=1e-12)


@every_case
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)])
def test_leading_axes_do_not_matter(case: str, shape: tuple[int, ...]) -> None:
    sae = example(case).double()
    x = activations(sae, *shape)
    output = sae(x)
    assert output.latents.shape == (*shape, D_SAE)
    assert output.reconstruction.shape == (*shape, len(sae.sites_out), sae.d_out)
    for token, wanted in zip(x.reshape(-1, *sae.input_shape), output.latents.reshape(-1, D_SAE), strict=True):
        torch.testing.assert_close(sae.encode(token), wanted, rtol=1e-12, atol=1e-12)


@every_case
@pytest.mark.parametrize("latents", [[3], [21, 0, 8, 13], list(range(D_SAE)), [2, 2, 19], []])
def test_some_latents_are_a_slice_of_all(case: str, latents: list[int]) -> None:
    sae = example(case).double()
    x = activations(sae, 7)
    torch.testing.assert_close(sae.encode(x, latents), sae.encode(x)[..., latents], rtol=1e-12, atol=1e-13)


def test_no_layer_writes_to_an_earlier_one() -> None:
    sae = example().double()
    x = activations(sae, 6)
    changed = x.clone()
    changed[:, 1] += 10
    before, after = sae(x).reconstruction, sae(changed).reconstruction
    assert torch.equal(before[:, 0], after[:, 0]) and (before[:, 1:] != after[:, 1:]).any()


def test_the_layers_of_a_transcoder_add_up_to_it() -> None:
    whole = example().double()
    x = activations(whole, 6)
    parts = torch.zeros_like(whole(x).reconstruction)
    first = 0
    for at, number in enumerate(PARTS):
        one = build(sites=SITES[at : at + 1], sites_out=OUT[at:], d_sae=number, latents_per_site=[number]).double()
        names = {"encoders.0": f"encoders.{at}", "decoders.0": f"decoders.{at}"}
        state = {ours: whole.state_dict()[theirs] for ours, theirs in names.items()}
        state |= {name: whole.state_dict()[name][first : first + number] for name in ("b_enc", "threshold")}
        bias = torch.zeros_like(one.b_dec)
        bias[0] = whole.b_dec[at].detach()
        assert not one.load_state_dict({**state, "b_dec": bias}, strict=False).unexpected_keys
        parts[:, at:] += one(x[:, at : at + 1]).reconstruction
        first += number
    torch.testing.assert_close(parts, whole(x).reconstruction)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saving_and_loading_is_bit_exact(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = example(case, base_model="acme/lm")
    sae.save_pretrained(tmp_path / "first")
    loaded = SAEModel.from_pretrained(tmp_path / "first", dtype=dtype)
    assert loaded.b_dec.dtype == dtype and loaded.max_activation.dtype == torch.float32
    assert "threshold" not in loaded.state_dict() or loaded.threshold.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "second", max_shard_size=300)
    assert len(list((tmp_path / "second").glob("model-*.safetensors"))) > 1
    again = AutoModel.from_pretrained(tmp_path / "second")
    assert_same(loaded, again)
    assert again.config.sites_read == sae.sites and again.config.base_model == "acme/lm"
    assert sae.config.is_transcoder == (sae.sites != sae.sites_out)
    with pytest.raises(InputError, match="cannot hold only some of its latents: load it without latents="):
        SAEModel.from_pretrained(tmp_path / "first", latents=[1])
    assert_same(sae, copy.deepcopy(sae))


def test_a_decoder_of_another_length_is_refused(tmp_path: Path) -> None:
    sae = example()
    sae.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"decoders.0 with shape \[6, 3, 4\] where the configuration says"):
        SAEModel.from_pretrained(tmp_path, sites_out=[*OUT, "mlp_out.4"])


def test_only_pairs_that_are_used_are_stored() -> None:
    sae = build()
    assert [tuple(decoder.shape) for decoder in sae.decoders] == [(6, 3, 4), (7, 2, 4), (9, 1, 4)]
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in build().state_dict().values())
    assert not hasattr(sae, "W_dec")


def test_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    for case in CASES:
        sae = build(case)
        assert all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())
        for decoder in sae.decoders:
            torch.testing.assert_close(decoder.norm(dim=-1), torch.ones(decoder.shape[:2]))


def test_a_crosscoder_can_be_trained() -> None:
    sae = example("crosscoder", normalization="none").double()
    x = activations(sae, 64)
    loss = sae.training_loss(x, sparsity_coefficient=0.01)
    torch.testing.assert_close(loss.total, sum(loss.terms.values()))
    norms = torch.cat([decoder.norm(dim=-1).sum(-1) for decoder in sae.decoders])
    torch.testing.assert_close(loss.terms["sparsity"], 0.01 * (loss.latents * norms).sum(-1).mean())
    torch.testing.assert_close(loss.terms["reconstruction"], (x - loss.reconstruction).square().sum((1, 2)).mean())
    loss.total.backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in sae.parameters())
    sae, losses = build("crosscoder", normalization="none").double(), []
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(60):
        loss = sae.training_loss(x, sparsity_coefficient=0.01)
        losses.append(loss.total.item())
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(InputError, match="cross-layer transcoder is not supported yet"):
        transcoder = example().double()
        transcoder.training_loss(activations(transcoder, 2), sparsity_coefficient=0.1)


def test_encoding_can_be_compiled_in_one_graph() -> None:
    sae = example()
    x = activations(sae, 3, dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(sae.encode, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), sae.encode(x))


def test_wrong_input_says_what_is_wrong() -> None:
    sae = example("relu transcoder with a skip", base_model="acme/lm")
    with pytest.raises(ShapeError, match=r"\[2, 5\].*3 sites with d_in = 5.*\[\.\.\., 3, 5\].*resid_mid\.0.*acme/lm"):
        sae.encode(torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=rf"\[3\].*d_sae = {D_SAE}"):
        sae.decode(torch.zeros(3))
    with pytest.raises(InputError, match="needs the activations to decode"):
        sae.decode(torch.zeros(D_SAE))
    with pytest.raises(LatentIndexError, match="Latent 22 does not exist"):
        sae.encode(torch.zeros(3, 5), [22])
    splice = Splice(sae)
    assert ([str(site) for site in splice.reads], [str(site) for site in splice.sites]) == (sae.sites, sae.sites_out)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sites": None}, "sites is missing"),
        ({"sites": []}, "expected names of sites, at least one"),
        ({"sites": ["a.input", 3]}, "expected names of sites"),
        ({"sites_out": OUT[:2]}, "at least as many written as read"),
        ({"latents_per_site": [6, 7]}, "expected 3 positive numbers that add up to d_sae = 22"),
        ({"latents_per_site": [6, 7, 10]}, "add up to d_sae"),
        ({"latents_per_site": [-1, 7, 16]}, "positive numbers"),
        ({"latents_per_site": ["6", 7, 9]}, "positive numbers"),
        ({"latents_per_site": None}, "add up to d_sae = 22"),
        ({"activation": "relU"}, "Did you mean 'relu'"),
        ({"kept_latents": [1]}, "holds all of its latents"),
        (
            {"sites_out": [*OUT, "mlp_out.4"], "apply_b_dec_to_input": True},
            "3 sites read and 4 written; expected equal numbers",
        ),
        ({"sites": "resid_mid.0"}, "sites is 'resid_mid.0'"),
    ],
)
def test_invalid_configurations_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**settings)


def test_one_site_is_filled_from_the_common_fields() -> None:
    config = CrossLayerSAEConfig(d_in=4, d_sae=8, site="mlp_in.1", site_out="mlp_out.1")
    assert (config.sites, config.sites_out, config.latents_per_site) == (["mlp_in.1"], ["mlp_out.1"], [8])
    assert CrossLayerSAEConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
