"""The rows of per-latent tensors that belong to given latents, for SAEs that hold all of their latents or some."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LatentIndexError
from ..functional.sparse_latents import latent_numbers
from .config import SAEConfig


def held_rows(config: SAEConfig, latents: Sequence[int] | Tensor) -> Tensor:
    """Return the rows of some latents, ``[n]`` int64; see `SAEModel.latent_indices`."""
    d_sae = config.d_sae
    indices = latent_numbers(latents)  # a list is checked without a device
    lowest, highest = indices.aminmax() if indices.numel() else (0, 0)
    if lowest < 0 or highest >= d_sae:
        outside = indices[(indices < 0) | (indices >= d_sae)]
        raise LatentIndexError(
            f"Latent {int(outside[0])} does not exist: this SAE has d_sae = {d_sae} latents, 0 .. {d_sae - 1}."
        )
    held = config.kept_latents
    if held is None:
        return indices
    row_of = {latent: row for row, latent in enumerate(held)}
    if missing := [latent for latent in indices.tolist() if latent not in row_of]:
        raise LatentIndexError(
            f"Latent {missing[0]} was not loaded: this SAE holds {len(held)} of its {d_sae} latents. "
            f"Load it with latents=[..., {missing[0]}]."
        )
    return torch.tensor([row_of[latent] for latent in indices.tolist()], dtype=torch.int64)
