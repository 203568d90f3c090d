"""Synthetic activations of known features, exactly sparse and in superposition; and small SAEs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_gated_sae.architectures import architectures
from hf_gated_sae.modeling import SAEModel

D_IN = 32
FEATURES = 64


def features() -> Tensor:
    """Return the true directions, unit norm, ``[FEATURES, D_IN]``."""
    return normalize(torch.randn(FEATURES, D_IN, generator=torch.Generator().manual_seed(9)), dim=-1)


def activations(count: int, *, seed: int, scale: float = 3.0) -> Tensor:
    """Return sums of about three features with strengths 0.5 to 1.5, a little noise, in an arbitrary unit."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(count, FEATURES, generator=generator) < 0.05
    strength = 0.5 + torch.rand(count, FEATURES, generator=generator)
    noise = 0.02 * torch.randn(count, D_IN, generator=generator)
    return scale * ((on * strength) @ features() + noise)


def build(architecture: str, d_in: int = 8, d_sae: int = 48, *, randomise: bool = False, **settings: Any) -> SAEModel:
    """Build an SAE; with `randomise` no bias, scale or threshold is at its neutral value."""
    torch.manual_seed(0)
    sae_class = architectures[architecture]
    if "k" in sae_class.config_class.__annotations__:
        settings.setdefault("k", 5)
    sae = sae_class(sae_class.config_class(d_in=d_in, d_sae=d_sae, **settings))
    if randomise:
        for name, tensor in sae.state_dict().items():
            if tensor.ndim < 2:
                tensor.copy_(torch.rand_like(tensor) * 0.3 if name == "threshold" else torch.randn_like(tensor) * 0.2)
    return sae
