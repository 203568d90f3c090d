from __future__ import annotations

import torch

from hf_gated_sae.modeling import TrainingLoss
from hf_gated_sae.training.objective_call import called_through

from .worlds import build


class Wrapper(torch.nn.Module):
    """Counts calls of its forward, the method in which data-parallel and sharding wrappers act."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args):
        self.calls += 1
        return self.module(*args)


def training_loss(wrapper, sae, x, coefficient):
    def objective(x):
        return vars(sae.training_loss(x, sparsity_coefficient=coefficient))

    return TrainingLoss(**called_through(wrapper, sae, objective, x))


def test_the_objective_is_called_through_the_wrappers_forward(architecture):
    sae = build(architecture)
    x = torch.randn(40, 8)
    bare = training_loss(sae, sae, x, 0.3)
    bare.total.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None
    }
    sae.zero_grad()
    wrapper = Wrapper(sae)
    wrapped = training_loss(wrapper, sae, x, 0.3)
    wrapped.total.backward()
    assert wrapper.calls == 1
    assert list(wrapped.terms) == list(bare.terms) and torch.equal(wrapped.total, bare.total)
    assert {n: p.grad.tolist() for n, p in sae.named_parameters() if p.grad is not None} == {
        n: g.tolist() for n, g in expected.items()
    }


def test_the_forward_of_the_sae_is_restored(architecture):
    sae = build(architecture)
    training_loss(Wrapper(sae), sae, torch.randn(4, 8), 0.3)
    assert "forward" not in vars(sae)
    replaced = sae.forward
    sae.forward = replaced  # as accelerate leaves it for mixed precision
    training_loss(Wrapper(sae), sae, torch.randn(4, 8), 0.3)
    assert vars(sae)["forward"] is replaced
    assert sae(torch.randn(4, 8)).latents.shape == (4, 48)
