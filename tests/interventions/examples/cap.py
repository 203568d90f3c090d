"""Cap: latents are limited to at most a value."""

from hf_gated_sae import Cap

from . import Example, of_latents

EXAMPLES = {
    "Cap": Example(
        lambda sae, a, b, model: Cap(sae, {a: 0.2, b: -0.1}),
        of_latents(lambda sae, a, b, model: {a: lambda f: f.clamp(max=0.2), b: lambda f: f.clamp(max=-0.1)}),
    ),
}


def plans(sae):
    return [Cap(sae, {3: 1 / 3}, positions=slice(-4, None))]


REFUSED = {"a bound not finite": (lambda sae: Cap(sae, {3: float("inf")}), ["inf", "latent 3", "finite number"])}
