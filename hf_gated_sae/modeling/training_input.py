"""Checks that an SAE can be trained, and that activations fit it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import InputError, ShapeError
from .config import SAEConfig

if TYPE_CHECKING:
    from .model import SAEModel


def training_obstacle(config: SAEConfig) -> str:
    """Return why an SAE cannot be trained, to follow "it" in a message; empty if it can."""
    if config.kept_latents is not None:
        return f"holds only {config.rows} of its {config.d_sae} latents: load it without latents="
    if config.normalization != "none":
        return (
            f"normalises each token ({config.normalization}), so it is not a homogeneous function of its input, "
            "which training on scaled activations needs: train one with normalization='none', scaled by "
            "activation_scale="
        )
    return ""


def require_trainable_input(sae: SAEModel, x: Tensor, target: Tensor) -> None:
    """Raise unless an objective can be computed from these activations.

    Raises:
        InputError: if the SAE normalises its input, or holds only some of its latents.
        ShapeError: if activations or target are not as wide as the SAE.
    """
    if obstacle := sae.training_obstacle():
        raise InputError(f"This {type(sae).__name__} has no training loss; it {obstacle}.")
    fits = x.shape[-1:] == (sae.config.d_in,) and target.shape == (*x.shape[:-1], sae.d_out)
    if sae.one_site and not fits:
        raise ShapeError(
            f"Given activations {list(x.shape)} and a target {list(target.shape)}, but this SAE reads d_in = "
            f"{sae.config.d_in} and writes d_out = {sae.d_out}: expected [..., {sae.config.d_in}] and "
            f"[..., {sae.d_out}]."
        )
