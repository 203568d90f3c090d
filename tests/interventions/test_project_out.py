"""`ProjectOut` removes the whole component along the directions, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae import ProjectOut, attach
from hf_gated_sae.interventions import SiteCall
from tests.hooks.support import IDS, SITE
from tests.support.tiny_models import tiny_model

WIDTH = 12


def projected(directions, x):
    run = SiteCall(x, tokens=None, sae_on={})
    return x + ProjectOut("resid_post.0", directions).delta(run)


@st.composite
def directions(draw):
    """Independent directions of very different lengths, and activations."""
    count = draw(st.integers(1, WIDTH))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # A random orthogonal basis, sheared a little: always independent.
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q[:count]
    shear = torch.eye(count, dtype=torch.float64) + 0.3 * torch.rand(count, count, generator=generator).double().tril(
        -1
    )
    lengths = torch.tensor(draw(st.lists(st.floats(-20, 20), min_size=count, max_size=count)), dtype=torch.float64)
    signs = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0).double()
    x = torch.randn(2, 3, WIDTH, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-3, 3))
    return (signs * 10.0**lengths)[:, None] * (shear @ basis), x


@given(directions())
@settings(max_examples=60, deadline=None)
def test_the_result_is_orthogonal_and_the_rest_is_kept(case):
    rows, x = case
    result = projected(rows, x)
    unit = torch.nn.functional.normalize(rows, dim=-1)
    scale = x.abs().max()
    assert (result @ unit.T).abs().max() <= 1e-11 * scale
    # What was removed lies in the span; removing again removes nothing.
    removed = x - result
    fitted = torch.linalg.lstsq(unit.T, removed.reshape(-1, WIDTH).T).solution
    assert (unit.T @ fitted - removed.reshape(-1, WIDTH).T).abs().max() <= 1e-10 * scale
    assert (projected(rows, result) - result).abs().max() <= 1e-11 * scale


@given(st.floats(1e-200, 1e200))
@settings(max_examples=20, deadline=None)
def test_the_length_of_a_direction_does_not_matter(length):
    x, direction = torch.randn(2, 3, WIDTH, dtype=torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    assert torch.allclose(projected(direction * length, x), projected(direction, x), rtol=1e-12, atol=1e-12)


def test_one_direction_may_have_one_axis_or_be_a_list():
    x, direction = torch.randn(2, 3, WIDTH), torch.randn(WIDTH)
    unit = direction / direction.norm()
    expected = x - (x @ unit)[..., None] * unit
    for form in (
        direction,
        direction[None],
        direction.tolist(),
        direction.double(),
        direction.clone().requires_grad_(),
    ):
        assert torch.allclose(projected(form, x), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_projected_in_float32(dtype):
    x, direction = torch.randn(2, 3, WIDTH).to(dtype), torch.randn(3, WIDTH)
    delta = ProjectOut("resid_post.0", direction).delta(SiteCall(x, tokens=None, sae_on={}))
    assert delta.dtype == torch.float32
    basis = torch.linalg.qr(direction.double().T).Q
    assert torch.allclose((x.float() + delta).double() @ basis, torch.zeros(3, dtype=torch.float64), atol=1e-5)


def test_all_directions_leave_nothing():
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    assert projected(torch.randn(WIDTH, WIDTH), x).abs().max() < 1e-10


def test_changing_the_directions_afterwards_has_no_effect():
    x, direction = torch.randn(2, 3, WIDTH), torch.ones(WIDTH)
    intervention = ProjectOut("resid_post.0", direction)
    run = SiteCall(x, tokens=None, sae_on={})
    before = intervention.delta(run)
    direction.zero_()
    assert torch.equal(intervention.delta(run), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_work_after_inference_mode(dtype):
    """Autograd cannot save inference tensors, so the cached basis must not be one."""
    model = tiny_model("llama").to(dtype)
    direction = torch.linspace(-1, 1, 32)
    with attach(model, ProjectOut(SITE, direction), check=False):
        with torch.inference_mode():
            expected = model(IDS).logits
        logits = model(IDS).logits
        logits.sum().backward()
    assert torch.equal(logits.detach(), expected)
    assert model.model.embed_tokens.weight.grad is not None


def test_each_dtype_has_its_own_basis():
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    project = ProjectOut(SITE, direction)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model = tiny_model("llama").to(dtype)
        with torch.no_grad(), attach(model, project, check=False):
            stream = model(IDS, output_hidden_states=True).hidden_states[2].double()
        left = (stream @ direction / direction.norm()).abs().max()
        assert left < (1e-5 if dtype == torch.float32 else 1e-13)
