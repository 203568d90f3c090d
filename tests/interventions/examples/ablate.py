"""Ablate: latents become zero, their mean, or a sample."""

import torch

from hf_gated_sae import Ablate

from . import Example, of_latents, samples_of

EXAMPLES = {
    "Ablate": Example(
        lambda sae, a, b, model: Ablate(sae, [a, b]),
        of_latents(lambda sae, a, b, model: {a: lambda f: 0 * f, b: lambda f: 0 * f}),
    ),
    "Ablate to the mean": Example(
        lambda sae, a, b, model: Ablate(sae, [a, b], mode="mean"),
        of_latents(lambda sae, a, b, model: {n: lambda f, n=n: 0 * f + sae.mean_activation[n].to(f) for n in (a, b)}),
    ),
    "Ablate to one sample": Example(
        lambda sae, a, b, model: Ablate(sae, [b, a], mode="resample", samples=samples_of(model, sae)[0, 3:4]),
        of_latents(
            lambda sae, a, b, model: {n: lambda f, n=n: 0 * f + samples_of(model, sae)[0, 3, n] for n in (a, b)}
        ),
    ),
}


def plans(sae):
    samples = torch.tensor([[0.5], [-0.0], [1e-30]])
    return [
        Ablate(sae, [3, 7], when={5: 0.1}, window=4),
        Ablate(sae, [3], mode="resample", samples=samples, seed=-5),
    ]


REFUSED = {
    "no latents": (lambda sae: Ablate(sae, []), ["no latents", "0 .. 63"]),
    "an unknown mode": (lambda sae: Ablate(sae, [1], mode="mena"), ["mena", "Did you mean 'mean'"]),
    "resampling from nothing": (lambda sae: Ablate(sae, [1], mode="resample"), ["needs samples="]),
    "samples that are not used": (lambda sae: Ablate(sae, [1], samples=torch.ones(2, 1)), ["takes none"]),
    "samples of other latents": (
        lambda sae: Ablate(sae, [1], mode="resample", samples=torch.ones(5, 3)),
        ["[5, 3]", "[N, 1] or [N, 64]"],
    ),
    "no samples": (
        lambda sae: Ablate(sae, [1], mode="resample", samples=torch.ones(0, 1)),
        ["[0, 1]", "[N, d_sae]"],
    ),
    "samples not finite": (
        lambda sae: Ablate(sae, [1], mode="resample", samples=torch.full((2, 1), torch.nan)),
        ["NaN or infinite", "samples"],
    ),
    "half a seed": (
        lambda sae: Ablate(sae, [1], mode="resample", samples=torch.ones(2, 1), seed=0.5),
        ["seed=0.5", "whole number"],
    ),
}
