"""The objectives of `train.py` and their gradients by the plain equations: dense, in float64, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.benchmarks.train import COEFFICIENT, D_IN, D_SAE, TOKENS, K

ON = {"sparse": 2.8, "early": 1.15}
"""Thresholds of standard normal projections: 64 of 24,576 exceed the first, an eighth of all the second."""
BANDWIDTH = 1e-3

Terms = dict[str, Tensor]


def weights(case: str, d_in: int = D_IN, d_sae: int = D_SAE, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Return activations, and weights with the share of active latents that the case has.

    Args:
        case: a name in `ON`.
        d_in: width of the activations.
        d_sae: number of latents.
        tokens: number of activations.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    b_dec, on = randn(d_in, scale=0.1), ON[case]
    rows = torch.nn.functional.normalize(randn(d_sae, d_in), dim=-1)
    return {
        "x": randn(tokens, d_in) + b_dec,
        "W_enc_T": rows,
        "W_dec": rows.clone(),
        "b_dec": b_dec,
        "b_gate": randn(d_sae, scale=0.05) - on,
        "b_mag": randn(d_sae, scale=0.05) - on / 2,
        "r_mag": randn(d_sae, scale=0.1),
        "b_enc": randn(d_sae, scale=0.05) - on / 2,
        "threshold": torch.full((d_sae,), on / 2),
    }


def error(x: Tensor, reconstruction: Tensor) -> Tensor:
    return (x - reconstruction).square().sum(-1).mean()


def projection(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    return (x - w["b_dec"]) @ w["W_enc_T"].T


def decoded(latents: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    return latents @ w["W_dec"] + w["b_dec"]


def gated(x: Tensor, w: Mapping[str, Tensor]) -> tuple[Terms, Tensor]:
    gate = projection(x, w) + w["b_gate"]
    latents = torch.relu(projection(x, w) * w["r_mag"].exp() + w["b_mag"]) * (gate > 0)
    frozen = {name: tensor.detach() for name, tensor in w.items()}
    return {
        "reconstruction": error(x, decoded(latents, w)),
        "sparsity": COEFFICIENT * torch.relu(gate).sum(-1).mean(),
        "auxiliary": error(x, decoded(torch.relu(gate), frozen)),
    }, latents


def standard(x: Tensor, w: Mapping[str, Tensor]) -> tuple[Terms, Tensor]:
    latents = torch.relu(projection(x, w) + w["b_enc"])
    sparsity = COEFFICIENT * latents.sum(-1).mean()
    return {"reconstruction": error(x, decoded(latents, w)), "sparsity": sparsity}, latents


def jumprelu(x: Tensor, w: Mapping[str, Tensor]) -> tuple[Terms, Tensor]:
    z, threshold = projection(x, w) + w["b_enc"], w["threshold"]
    on = (z > threshold).double()
    near = ((z - threshold).abs() < BANDWIDTH / 2).double() / BANDWIDTH
    moved = (near * (threshold - threshold.detach())).where(near > 0, 0.0)  # zero, with the estimator's gradient
    latents = torch.relu(z) * on - threshold.detach() * moved
    l0 = (on.detach() - near.detach() * (threshold - threshold.detach())).sum(-1)
    return {"reconstruction": error(x, decoded(latents, w)), "sparsity": COEFFICIENT * l0.mean()}, latents


def topk(x: Tensor, w: Mapping[str, Tensor]) -> tuple[Terms, Tensor]:
    z = torch.relu(projection(x, w) + w["b_enc"])
    latents = z * (z >= z.detach().topk(K, dim=-1).values[:, -1:])
    return {"reconstruction": error(x, decoded(latents, w))}, latents


def batch_topk(x: Tensor, w: Mapping[str, Tensor]) -> tuple[Terms, Tensor]:
    z = torch.relu(projection(x, w) + w["b_enc"])
    latents = z * (z >= z.detach().flatten().topk(K * len(x)).values[-1])
    return {"reconstruction": error(x, decoded(latents, w))}, latents


PLAIN: dict[str, tuple[Callable[[Tensor, Mapping[str, Tensor]], tuple[Terms, Tensor]], dict[str, str]]] = {
    "gated": (gated, {"b_gate": "b_gate", "b_mag": "b_mag", "r_mag": "r_mag"}),
    "standard": (standard, {"b_enc": "b_gate"}),
    "jumprelu": (jumprelu, {"b_enc": "b_enc", "threshold": "threshold"}),
    "topk": (topk, {"b_enc": "b_enc"}),
    "batch_topk": (batch_topk, {"b_enc": "b_enc"}),
}
"""The equations of each architecture, and which of the stored tensors are its parameters."""


def plain(architecture: str, tensors: Mapping[str, Tensor], tokens: int) -> dict[str, float]:
    """Return the terms of an objective, the norms of its gradients and L0, as `check` of `train.py` gives them.

    Args:
        architecture: a name in `PLAIN`.
        tensors: what `weights` returned.
        tokens: how many of the activations to use.
    """
    objective, names = PLAIN[architecture]
    stored = {"W_enc_T": "W_enc_T", "W_dec": "W_dec", "b_dec": "b_dec", **names}
    w = {name: tensors[theirs].double().requires_grad_() for name, theirs in stored.items()}
    terms, latents = objective(tensors["x"][:tokens].double(), w)
    torch.stack(list(terms.values())).sum().backward()
    found = {**terms, "l0": (latents > 0).sum(-1).double().mean()}
    for name, parameter in w.items():
        assert parameter.grad is not None
        found[f"gradient of {name}"] = parameter.grad.norm()
    return {name: value.item() for name, value in found.items()}
