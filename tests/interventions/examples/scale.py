"""Scale: latents are multiplied."""

from hf_gated_sae import Scale

from . import Example, of_latents

EXAMPLES = {
    "Scale": Example(
        lambda sae, a, b, model: Scale(sae, {a: 2.0, b: -0.5}),
        of_latents(lambda sae, a, b, model: {a: lambda f: 2 * f, b: lambda f: -0.5 * f}),
    ),
}


def plans(sae):
    return [Scale(sae, {3: 0.5}, special_tokens=True)]


REFUSED = {
    "an infinite factor": (lambda sae: Scale(sae, {3: float("inf")}), ["inf", "latent 3", "finite number"]),
    "values by name": (lambda sae: Scale(sae, {"a": 1.0}), ["Scale", "numbers by latent"]),
}
