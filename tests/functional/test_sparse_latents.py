"""Active latents are the dense ones without the zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.errors import InputError, ShapeError
from hf_gated_sae.functional import sparse_decode
from hf_gated_sae.functional.sparse_latents import SparseLatents

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
axes = st.lists(st.integers(0, 4), max_size=3)
shares = st.sampled_from([0.0, 0.05, 0.5, 1.0])


def latents_of(shape: list[int], share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values * (torch.rand(shape, generator=generator) < share)


@settings(deadline=None)
@given(axes, st.integers(1, 40), shares, st.integers(0, 99))
def test_dense_again(leading: list[int], d_sae: int, share: float, seed: int) -> None:
    latents = latents_of([*leading, d_sae], share, seed)
    live = SparseLatents.from_dense(latents)
    assert live.shape == tuple(latents.shape) and torch.equal(live.dense(), latents)
    assert torch.equal(live.l0, (latents != 0).sum(-1))
    tokens, indices = latents.reshape(-1, d_sae).nonzero(as_tuple=True)
    assert torch.equal(live.tokens, tokens) and torch.equal(live.indices, indices)


@settings(deadline=None)
@given(axes, st.lists(st.integers(0, 11), max_size=6), shares)
def test_some_latents(leading: list[int], chosen: list[int], share: float) -> None:
    latents = latents_of([*leading, 12], share)
    live = SparseLatents.from_dense(latents)
    assert torch.equal(live.select(chosen), latents[..., chosen])
    assert torch.equal(live.select(torch.tensor(chosen, dtype=torch.int64)), latents[..., chosen])


@pytest.mark.parametrize("latents", [[12], [-1], [3, 99]])
def test_latents_that_do_not_exist(latents: list[int]) -> None:
    with pytest.raises(ShapeError, match="from 0 to 11"):
        SparseLatents.from_dense(latents_of([2, 12], 0.5)).select(latents)


@pytest.mark.parametrize("latents", [[1.5], [True], ["3"], None, torch.ones(12) > 0, torch.ones(2), [10**30]])
def test_latents_are_integers(latents: object) -> None:
    with pytest.raises(InputError, match="expected integers"):
        SparseLatents.from_dense(latents_of([2, 12], 0.5)).select(latents)  # type: ignore[arg-type]  # that is the test


@pytest.mark.parametrize(("start", "stop"), [(590, 700), (0, 4), (-3, -1), (2, 1)])
def test_tokens_that_do_not_exist(start: int, stop: int) -> None:
    with pytest.raises(ShapeError, match="from 0 to 3"):
        SparseLatents.from_dense(latents_of([3, 12], 0.5)).rows(start, stop)


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_decoder_of_another_dtype(share: float) -> None:
    live = SparseLatents.from_dense(latents_of([3, 200], share))
    with pytest.raises(InputError, match=r"float64, but the decoder is torch.float32"):
        sparse_decode.decode(live, torch.ones(200, 4))
    assert sparse_decode.decode(live.to(torch.float32), torch.ones(200, 4)).dtype == torch.float32


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_autocast_makes_dtypes_the_same(share: float) -> None:
    live, weight = SparseLatents.from_dense(latents_of([3, 200], share)), torch.randn(200, 4)
    narrow, wide = torch.bfloat16, torch.float32
    for latents, decoder in (
        (live.to(narrow), weight),
        (live.to(wide), weight.to(narrow)),
        (live.to(wide), weight.half()),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = sparse_decode.decode(latents, decoder), latents.dense() @ decoder
        assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="are torch.float64"):
        sparse_decode.decode(live, weight)  # autocast does not cast float64


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), shares)
def test_some_tokens_and_their_union(first: int, second: int, share: float) -> None:
    latents = latents_of([first + second, 9], share)
    live = SparseLatents.from_dense(latents)
    parts = [live.rows(0, first), live.rows(first, first + second)]
    assert torch.equal(parts[0].dense(), latents[:first]) and torch.equal(parts[1].dense(), latents[first:])
    assert torch.equal(SparseLatents.cat(parts, latents.shape).dense(), latents)


def test_values_in_any_order_of_tokens() -> None:
    tokens, indices = torch.tensor([2, 0, 2, 0]), torch.tensor([1, 5, 3, 7])
    live = SparseLatents.of(tokens, indices, torch.tensor([1.0, 2.0, 3.0, 4.0]), (3, 8))
    assert live.indices.tolist() == [5, 7, 1, 3] and live.values.tolist() == [2.0, 4.0, 1.0, 3.0]
    assert live.offsets.tolist() == [0, 2, 2, 4]


def test_from_indices() -> None:
    indices, values = torch.tensor([[[4, 1]], [[0, 2]]]), torch.tensor([[[0.0, -2.0]], [[3.0, float("nan")]]])
    live = SparseLatents.from_indices(indices, values, 5)
    assert live.shape == (2, 1, 5) and live.l0.tolist() == [[1], [2]]
    assert live.indices.tolist() == [1, 0, 2] and live.values[:2].tolist() == [-2.0, 3.0] and live.values[2].isnan()


def test_nan_is_active() -> None:
    latents = torch.zeros(2, 5)
    latents[1, 3] = float("nan")
    live = SparseLatents.from_dense(latents)
    assert live.l0.tolist() == [0, 1] and live.dense()[1, 3].isnan()


def test_another_dtype() -> None:
    live = SparseLatents.from_dense(latents_of([3, 8], 0.5)).to(torch.float32)
    assert live.values.dtype == torch.float32 and live.indices.dtype == torch.int64


def test_gradients_flow_through_values() -> None:
    latents = latents_of([3, 20], 0.1).requires_grad_()
    weight = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    along = torch.randn(3, 4, dtype=torch.float64)
    live = SparseLatents.from_dense(latents)
    (sparse_decode.decode(live, weight) * along).sum().backward(retain_graph=True)
    assert latents.grad is not None and weight.grad is not None
    torch.testing.assert_close(latents.grad, (along @ weight.detach().T) * (latents.detach() != 0), **TIGHT)
    torch.testing.assert_close(weight.grad, latents.detach().T @ along, **TIGHT)
    assert torch.equal(torch.autograd.grad(live.dense().sum(), latents)[0], (latents != 0).double())


@settings(deadline=None)
@given(axes, st.integers(1, 40), shares, st.booleans(), st.integers(0, 99))
def test_decoding_equals_the_dense_product(
    leading: list[int], d_sae: int, share: float, strided: bool, seed: int
) -> None:
    latents = latents_of([*leading, d_sae], share, seed)
    weight = torch.randn(d_sae, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    given_weight = weight.T.contiguous().T if strided else weight
    found = sparse_decode.decode(SparseLatents.from_dense(latents), given_weight)
    torch.testing.assert_close(found, latents @ weight, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_are_those_of_the_product(dtype: torch.dtype) -> None:
    """If every partial sum were rounded, 256 in bfloat16 would stay 256 however many ones were added."""
    latents = torch.zeros(2, 20_000, dtype=dtype)
    latents[:, :1000] = 1
    found = sparse_decode.decode(SparseLatents.from_dense(latents), torch.ones(20_000, 64, dtype=dtype))
    assert torch.equal(found, torch.full((2, 64), 1000, dtype=dtype))
