"""Under `torch.func` a spliced model has the derivatives of backward(), and bit-identical values."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from hf_gated_sae import Splice, attach
from hf_gated_sae.errors import AttachError
from tests.hooks.support import IDS, make_sae, model_of

CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # sums are computed in a different order


@pytest.fixture(params=[True, False], ids=["with error", "without error"])
def spliced(request):
    """A spliced model as a function of embeddings, some embeddings, and the model, whose weights are frozen."""
    model = copy.deepcopy(model_of("llama")).requires_grad_(False)
    model.set_attn_implementation("eager")  # fused attention has no forward-mode derivative
    sae = make_sae().requires_grad_(False)
    embeddings = model.get_input_embeddings()(IDS).detach()
    with attach(model, Splice(sae, error=request.param), check=False):
        yield lambda x: model(inputs_embeds=x).logits[:, -1], embeddings, model


def gradient(run, embeddings):
    leaf = embeddings.clone().requires_grad_()
    run(leaf).sum().backward()
    return leaf.grad


def test_grad_vjp_and_jacobians(spliced):
    run, x, _ = spliced
    expected = gradient(run, x)
    assert torch.count_nonzero(expected)
    torch.testing.assert_close(grad(lambda each: run(each).sum())(x), expected, **CLOSE)
    value, pull = vjp(run, x)
    assert torch.equal(value, run(x))
    torch.testing.assert_close(pull(torch.ones_like(value))[0], expected, **CLOSE)
    torch.testing.assert_close(jacrev(lambda each: run(each).sum())(x), expected, **CLOSE)


def test_forward_mode_derivatives_are_those_of_backward(spliced):
    run, x, _ = spliced
    direction = torch.randn_like(x)
    expected = (gradient(run, x) * direction).sum()
    value, tangent = jvp(lambda each: run(each).sum(), (x,), (direction,))
    torch.testing.assert_close(tangent, expected, **CLOSE)
    assert torch.equal(value, run(x).sum())
    with forward_ad.dual_level():
        dual = run(forward_ad.make_dual(x, direction)).sum()
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected, **CLOSE)
    assert torch.isfinite(hessian(lambda factor: run(x * factor).sum())(torch.tensor(1.0)))


def test_vmap_alone_and_around_grad(spliced):
    run, x, _ = spliced
    torch.testing.assert_close(vmap(lambda each: run(each[None])[0])(x), run(x))
    found = vmap(grad(lambda each: run(each[None]).sum()))(x)
    torch.testing.assert_close(found, gradient(run, x), **CLOSE)


def test_gradients_of_the_models_weights(spliced):
    _, x, model = spliced
    name = "model.layers.0.mlp.up_proj.weight"
    weights = {name: dict(model.named_parameters())[name].detach()}
    found = grad(lambda given: functional_call(model, given, kwargs={"inputs_embeds": x}).logits.sum())(weights)[name]
    model.get_parameter(name).requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    torch.testing.assert_close(found, model.get_parameter(name).grad, **CLOSE)


def test_activations_that_are_not_finite_are_found_under_vmap():
    model, sae = model_of("llama"), make_sae()
    embeddings = model.get_input_embeddings()(IDS).detach()
    with attach(model, Splice(sae), check=False):
        embeddings[1, 2, 0] = torch.inf
        with pytest.raises(AttachError, match="NaN or infinite"):
            vmap(lambda each: model(inputs_embeds=each[None]).logits[0])(embeddings)
