"""Patch: the activation, or some latents, are replaced by those of another run."""

import torch

from hf_gated_sae import Patch, attach, capture
from tests.hooks.support import D_SAE, SITE, model_of
from tests.support.tiny_models import HIDDEN

from . import OTHER, Example, of_latents, samples_of


def replaced(sae, a, b, model):
    other = capture(model, SITE, input_ids=OTHER)[SITE]
    return lambda x: other


EXAMPLES = {
    "Patch": Example(
        lambda sae, a, b, model: Patch(sae, samples_of(model, sae)[..., [b, a]], latents=[b, a]),
        of_latents(lambda sae, a, b, model: {n: lambda f, n=n: samples_of(model, sae)[..., n] for n in (a, b)}),
    ),
    "Patch of all latents": Example(
        lambda sae, a, b, model: Patch(sae, samples_of(model, sae)),
        of_latents(lambda sae, a, b, model: {n: lambda f, n=n: samples_of(model, sae)[..., n] for n in range(D_SAE)}),
    ),
    "Patch of a site": Example(
        lambda sae, a, b, model: Patch(SITE, capture(model, SITE, input_ids=OTHER)[SITE]),
        replaced,
    ),
}


def plans(sae):
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, 6, 3, generator=random)
    numbers[0, 0, 0], numbers[0, 0, 1] = torch.nan, -0.0
    return [
        Patch(sae, numbers, latents=[9, 8, 1], positions=torch.tensor([[True, False], [False, True]])),
        Patch(SITE, torch.randn(2, 6, HIDDEN, generator=random).bfloat16()),
    ]


REFUSED = {
    "one vector": (lambda sae: Patch(SITE, torch.ones(HIDDEN)), ["[32]", "[B, S, d]"]),
    "other latents": (lambda sae: Patch(sae, torch.ones(2, 6, 3), latents=[1]), ["[2, 6, 3]", "[B, S, 1]"]),
    "latents of a site": (
        lambda sae: Patch(SITE, torch.ones(2, 6, 32), latents=[1]),
        ["latents=(1,)", "expected an SAE"],
    ),
    "no latents": (lambda sae: Patch(sae, torch.ones(2, 6, 1), latents=[]), ["no latents"]),
    "another width": (
        lambda sae: attach(model_of("llama"), Patch(SITE, torch.ones(2, 6, 31))),
        ["[2, 6, 31]", "32 wide"],
    ),
}
