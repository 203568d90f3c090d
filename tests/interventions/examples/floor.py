"""Floor: latents are raised to at least a value."""

from hf_gated_sae import Floor

from . import Example, of_latents

EXAMPLES = {
    "Floor": Example(
        lambda sae, a, b, model: Floor(sae, {a: 0.3, b: 2.0}),
        of_latents(lambda sae, a, b, model: {a: lambda f: f.clamp(min=0.3), b: lambda f: f.clamp(min=2.0)}),
    ),
}


def plans(sae):
    return [Floor(sae, {9: -0.0}, positions=3)]


REFUSED = {"no bounds": (lambda sae: Floor(sae, {}), ["Floor", "no latents"])}
