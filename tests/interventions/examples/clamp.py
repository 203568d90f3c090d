"""Clamp: latents are set to a value."""

from hf_gated_sae import Clamp

from . import Example, of_latents

EXAMPLES = {
    "Clamp": Example(
        lambda sae, a, b, model: Clamp(sae, {a: 3.5, b: 0.25}),
        of_latents(lambda sae, a, b, model: {a: lambda f: 0 * f + 3.5, b: lambda f: 0 * f + 0.25}),
    ),
}


def plans(sae):
    return [Clamp(sae, {456 % 64: 1e-300, 3: 8}, positions=[0, -1], rows=[0, 1])]


REFUSED = {"values without latents": (lambda sae: Clamp(sae, [1.0, 2.0]), ["Clamp", "[1.0, 2.0]", "{3: 1.5}"])}
