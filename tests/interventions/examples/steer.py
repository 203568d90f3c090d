"""Steer: a latent's direction, or a vector, is added."""

import torch

from hf_gated_sae import Steer, attach
from tests.hooks.support import SITE, make_sae, model_of
from tests.support.tiny_models import HIDDEN

from . import Example, of_latents

VECTOR = torch.linspace(-1, 2, HIDDEN)


def steered(sae, a, b, model):
    row = sae.W_dec[a] / sae.W_dec[a].norm()
    return lambda x: x - 0.7 * x.norm(dim=-1, keepdim=True) * row


EXAMPLES = {
    "Steer": Example(
        lambda sae, a, b, model: Steer(sae, a, strength=-1.5),
        of_latents(lambda sae, a, b, model: {a: lambda f: f - 1.5 * sae.max_activation[a].to(f)}),
    ),
    "Steer by raw units": Example(
        lambda sae, a, b, model: Steer(sae, b, strength=4.0, unit="raw"),
        of_latents(lambda sae, a, b, model: {b: lambda f: f + 4.0}),
    ),
    "Steer by the norm": Example(lambda sae, a, b, model: Steer(sae, a, strength=-0.7, unit="norm"), steered),
    "Steer by a vector": Example(
        lambda sae, a, b, model: Steer(SITE, VECTOR, strength=-0.4),
        lambda sae, a, b, model: lambda x: x - 0.4 * VECTOR.to(x),
    ),
}


def plans(sae):
    random = torch.Generator().manual_seed(0)
    return [
        Steer(sae, 3, strength=-2.0, unit="norm"),
        Steer(SITE, torch.randn(HIDDEN, generator=random).half(), strength=0.1),
    ]


REFUSED = {
    "several latents": (lambda sae: Steer(sae, [3, 4]), ["Steer", "[3, 4]", "one latent"]),
    "an unrecorded maximum": (
        lambda sae: Steer(make_sae(recorded=False), 5),
        ["latent 5", "nothing was recorded", "record=True", "unit='raw'"],
    ),
    "a vector's maximum": (lambda sae: Steer(SITE, torch.ones(HIDDEN), unit="max"), ["unit='max'", "'norm'"]),
    "a vector not finite": (
        lambda sae: Steer(SITE, torch.full((HIDDEN,), torch.nan)),
        ["NaN or infinite", "vector [d]"],
    ),
    "several vectors": (lambda sae: Steer(SITE, torch.ones(2, HIDDEN)), ["[2, 32]", "a vector [d]"]),
    "a vector of nothing": (lambda sae: Steer(SITE, torch.zeros(HIDDEN), unit="norm"), ["zeros", "no direction"]),
    "a latent of a site": (lambda sae: Steer(SITE, 3), ["a vector [d]"]),
    "a vector for an SAE": (lambda sae: Steer(sae, torch.ones(HIDDEN)), ["one latent with an SAE", SITE]),
    "a condition without an SAE": (
        lambda sae: Steer(SITE, torch.ones(HIDDEN), when={3: 1.0}),
        ["when=", "needs an SAE"],
    ),
    "a model": (lambda sae: Steer(torch.nn.Linear(2, 2), 3), ["Linear", "expected an SAE, or a site"]),
    "a vector of another width": (
        lambda sae: attach(model_of("llama"), Steer(SITE, torch.ones(31))),
        ["[31]", "32 wide"],
    ),
}
