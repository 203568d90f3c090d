"""Conformance tests of every registered architecture; a new file in `architectures/` needs no change here.

Architectures that read several sites have matrices of other shapes and are tested in `test_cross_layer.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gated_sae.architectures import architectures
from hf_gated_sae.errors import InputError, LatentIndexError, ShapeError
from hf_gated_sae.modeling import SAEModel, SAEOutput
from tests.support.example_saes import D_IN, D_SAE, ONE_SITE, assert_same, build, example

every_architecture = pytest.mark.parametrize("architecture", ONE_SITE)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(7)).to(dtype)


def test_the_gated_sae_and_its_baselines_are_registered() -> None:
    assert {"gated", "standard", "jumprelu", "topk", "batch_topk"} <= set(architectures)


# ---------------------------------------------------------------- shape and meaning


@every_architecture
def test_forward_is_encode_then_decode(architecture: str) -> None:
    sae, x = example(architecture), activations(4)
    output = sae(x)
    assert isinstance(output, SAEOutput)
    assert torch.equal(output.latents, sae.encode(x))
    assert torch.equal(output.reconstruction, sae.decode(output.latents, x))
    assert output.latents.shape == (4, D_SAE) and output.reconstruction.shape == (4, D_IN)
    live = output.latents != 0
    assert live.any() and not live.all()
    assert (output.latents < 0).any() == sae.signed


@every_architecture
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_axes_do_not_matter(architecture: str, shape: tuple[int, ...]) -> None:
    sae, x = example(architecture).double(), activations(*shape, dtype=torch.float64)
    if not sae.per_token and not shape:
        with pytest.raises(ShapeError, match="whole sequences"):
            sae.encode(x)
        return
    latents = sae.encode(x)
    assert latents.shape == (*shape, D_SAE)
    unit = (
        x.shape[-1:] if sae.per_token else x.shape[-2:]
    )  # the unit that is encoded independently: a token, or a sequence
    flat = x.reshape(-1, *unit) if x.numel() else []
    one_by_one = [sae.encode(row) for row in flat]
    if one_by_one:
        torch.testing.assert_close(latents, torch.stack(one_by_one).view_as(latents), rtol=1e-12, atol=1e-12)
    assert sae.decode(latents, x).shape == x.shape


@every_architecture
def test_a_token_does_not_depend_on_its_neighbours(architecture: str) -> None:
    """It never depends on later tokens, and on earlier ones only if the architecture declares so."""
    sae, x = example(architecture).double(), activations(6, dtype=torch.float64)
    before, middle, after = x.clone(), 3, x.clone()
    before[:middle] *= 100
    after[middle + 1 :] *= 100
    wanted = sae.encode(x)[middle]
    torch.testing.assert_close(sae.encode(after)[middle], wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(sae.encode(before)[middle], wanted, rtol=1e-12, atol=1e-12) == sae.per_token


@every_architecture
@pytest.mark.parametrize("latents", [[3], [3, 0, 15], list(range(D_SAE)), [2, 2], []])
def test_some_latents_are_a_slice_of_all(architecture: str, latents: list[int]) -> None:
    """Equal up to the order of float64 sums: a product with fewer rows may add in another order."""
    sae, x = example(architecture).double(), activations(7, dtype=torch.float64)
    wanted = sae.encode(x)[..., latents]
    for given in (latents, torch.tensor(latents, dtype=torch.int64), tuple(latents)):
        got = sae.encode(x, given)
        assert torch.equal(got != 0, wanted != 0)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@every_architecture
def test_decode_is_affine(architecture: str) -> None:
    sae = example(architecture).double()
    x = activations(5, dtype=torch.float64)
    left, right = torch.rand(2, 5, D_SAE, dtype=torch.float64)
    bias = sae.decode(torch.zeros_like(left), x)
    if sae.per_token:
        assert torch.equal(bias, sae.b_dec.expand(5, D_IN))
    else:
        with pytest.raises(InputError, match="needs the activations to decode"):
            sae.decode(left)
    mixed = sae.decode(2 * left - 3 * right, x) - bias
    torch.testing.assert_close(mixed, 2 * (sae.decode(left, x) - bias) - 3 * (sae.decode(right, x) - bias))
    one = torch.eye(D_SAE, dtype=torch.float64)[4].expand_as(left)
    torch.testing.assert_close(sae.decode(one, x) - bias, sae.W_dec[4].expand(5, D_IN))


@every_architecture
def test_an_elementwise_latent_reads_its_own_row_only(architecture: str) -> None:
    """What `elementwise` promises: other rows of the per-latent tensors do not matter."""
    sae, x = example(architecture).double(), activations(9, dtype=torch.float64)
    before = sae.encode(x)[..., 3]
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            if tensor.ndim and tensor.shape[0] == D_SAE:
                tensor[torch.arange(D_SAE) != 3] += 50.0
    same = torch.allclose(sae.encode(x)[..., 3], before, rtol=1e-12, atol=0)
    assert same == type(sae).elementwise


@every_architecture
def test_wrong_input_says_what_is_wrong(architecture: str) -> None:
    sae = example(architecture, site="resid_post.3", base_model="acme/lm")
    with pytest.raises(ShapeError, match=rf"\[2, 5\].*d_in = {D_IN}.*resid_post\.3.*acme/lm"):
        sae.encode(torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=rf"\[3\].*d_sae = {D_SAE}"):
        sae.decode(torch.zeros(3))
    for bad in (D_SAE, -1):
        with pytest.raises(LatentIndexError, match=rf"Latent {bad} does not exist.*0 \.\. {D_SAE - 1}"):
            sae.encode(activations(2), [0, bad])
    mask = torch.arange(D_SAE) > 3
    for bad in (mask, mask.tolist(), [1.5], torch.tensor([3.0]), ["3"]):
        with pytest.raises(InputError, match=r"Given the latents .*, expected integers, such as \[3, 7\]"):
            sae.encode(activations(2), bad)
    with pytest.raises(InputError, match="d_in is 0, expected a positive number"):
        build(architecture, d_in=0)


@pytest.mark.parametrize("bandwidth", [0, -1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "architecture", [name for name, each in architectures.items() if "bandwidth" in each.config_class.own_fields()]
)
def test_an_invalid_bandwidth_is_refused(architecture: str, bandwidth: float) -> None:
    with pytest.raises(InputError, match=rf"bandwidth is {float(bandwidth)}, expected a finite positive number"):
        build(architecture, bandwidth=bandwidth)


def test_the_base_class_cannot_be_built() -> None:
    with pytest.raises(InputError, match="build an architecture"):
        SAEModel(build("gated").config)


# ---------------------------------------------------------------- initialisation


@every_architecture
def test_no_parameter_is_left_uninitialised(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value that was in a tensor's memory before initialisation may remain."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    for name, tensor in build(architecture).state_dict().items():
        assert torch.isfinite(tensor).all(), name


@every_architecture
def test_initialisation_follows_the_seed(architecture: str) -> None:
    torch.manual_seed(3)
    first = build(architecture)
    torch.manual_seed(3)
    assert_same(first, build(architecture))
    assert not torch.equal(first.W_dec, build(architecture).W_dec)


@every_architecture
def test_decoder_rows_start_with_unit_norm_and_the_encoder_as_their_transpose(architecture: str) -> None:
    sae = build(architecture)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    assert torch.equal(sae.W_enc, sae.W_dec.T)


@every_architecture
def test_it_can_be_built_on_the_meta_device(architecture: str) -> None:
    with torch.device("meta"):
        sae = build(architecture)
    assert all(tensor.is_meta for tensor in sae.state_dict().values())


@every_architecture
def test_an_sae_with_another_output_width(architecture: str, tmp_path: Path) -> None:
    try:
        sae = example(architecture, d_out=4, apply_b_dec_to_input=False)
    except InputError as error:  # the output is subtracted from the input
        assert "d_out is 4 and d_in is 6" in str(error) and "one width" in str(error)
        return
    output = sae(activations(3))
    assert output.reconstruction.shape == (3, 4)
    sae.save_pretrained(tmp_path)
    assert_same(sae, SAEModel.from_pretrained(tmp_path))


@every_architecture
def test_a_decoder_bias_of_another_width_cannot_centre_the_input(architecture: str) -> None:
    with pytest.raises(InputError, match="d_out is 4 and d_in is 6.*(apply_b_dec_to_input=False|one width)"):
        build(architecture, d_out=4)


@every_architecture
def test_b_dec_is_subtracted_from_the_input_as_the_configuration_says(architecture: str) -> None:
    centred = example(architecture, apply_b_dec_to_input=True).double()
    plain = example(architecture, apply_b_dec_to_input=False).double()
    x = activations(8, dtype=torch.float64)
    assert not torch.allclose(centred.encode(x), plain.encode(x))
    torch.testing.assert_close(centred.encode(x + centred.b_dec), plain.encode(x), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- training


@every_architecture
def test_the_loss_is_the_sum_of_its_terms_and_trains_every_parameter(architecture: str) -> None:
    sae = example(architecture).double()
    if not sae.per_token:
        with pytest.raises(InputError, match="cannot be trained here"):
            sae.training_loss(activations(64, dtype=torch.float64), sparsity_coefficient=0.3)
        return
    loss = sae.training_loss(activations(64, dtype=torch.float64), sparsity_coefficient=0.3)
    torch.testing.assert_close(loss.total, sum(loss.terms.values()))
    assert "reconstruction" in loss.terms and loss.total.shape == ()
    assert loss.reconstruction.shape == (64, D_IN) and loss.latents.shape == (64, D_SAE)
    error = (loss.reconstruction - activations(64, dtype=torch.float64)).square().sum(-1).mean()
    torch.testing.assert_close(loss.terms["reconstruction"], error)
    loss.total.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@every_architecture
def test_a_few_steps_lower_the_loss(architecture: str) -> None:
    sae, x = build(architecture, d_sae=32), activations(256)
    if not sae.per_token:
        pytest.skip("the activation stream gives tokens, not sequences")
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = sae.training_loss(x, sparsity_coefficient=0.01)
        losses.append(loss.total.item())
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------- derivatives, transformations, compilers


@pytest.mark.parametrize("architecture", list(architectures))
def test_derivatives_by_all_methods_are_equal(architecture: str) -> None:
    """By autograd, by `torch.func` in reverse and forward mode, nested, and under `vmap`."""
    sae = example(architecture).double()
    x = torch.randn(3, *sae.input_shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    wanted = torch.autograd.functional.jacobian(sae.encode, x)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(sae.encode)(x), wanted, rtol=1e-12, atol=1e-12)
    assert torch.func.jacfwd(torch.func.jacrev(sae.encode))(x).isfinite().all()
    if sae.per_token and architecture != "matching_pursuit":  # its loop depends on the values of the tokens
        single = torch.func.vmap(torch.func.jacrev(sae.encode))(x)
        torch.testing.assert_close(single, torch.stack([each[:, at] for at, each in enumerate(wanted)]))
        torch.testing.assert_close(torch.func.vmap(sae.encode)(x), sae.encode(x), rtol=1e-12, atol=1e-12)

    weights = {name: parameter.detach() for name, parameter in sae.named_parameters()}
    if sae.one_site and sae.per_token:

        class Loss(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.sae = sae

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.sae.training_loss(x, sparsity_coefficient=0.3).total

        held = {f"sae.{name}": each for name, each in weights.items()}
        found = torch.func.grad(lambda each: torch.func.functional_call(Loss(), each, (x,)))(held)
        sae.zero_grad()
        sae.training_loss(x, sparsity_coefficient=0.3).total.backward()
        for name, parameter in sae.named_parameters():
            taped = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[f"sae.{name}"], taped, rtol=1e-10, atol=1e-12)
    call = torch.func.functional_call
    backward, forward = (
        jacobian(lambda each: call(sae, each, (x,)).reconstruction)(weights)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd)
    )
    for name in weights:
        torch.testing.assert_close(forward[name], backward[name], rtol=1e-10, atol=1e-10)


@every_architecture
def test_encoding_can_be_compiled_in_one_graph(architecture: str) -> None:
    sae, x = example(architecture).double(), activations(3, dtype=torch.float64)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(sae.encode, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), sae.encode(x))
