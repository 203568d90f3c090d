"""Measuring how strongly each latent of a finished SAE fires."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import InputError
from ..modeling import SAEModel


@torch.no_grad()
def record_activations(sae: SAEModel, pieces: Iterable[Tensor]) -> None:
    """Measure the largest and the mean value of every latent and store them in the SAE.

    Args:
        sae: reads the activations as they are.
        pieces: activations ``[n, d_in]``.

    Raises:
        InputError: if there are no activations.
    """
    tokens = 0
    largest = torch.zeros_like(sae.max_activation)
    total = torch.zeros_like(largest, dtype=torch.float64)
    for piece in pieces:
        for x in piece.split(4096):
            latents = sae.encode(x.to(sae.W_dec))
            largest = torch.maximum(largest, latents.amax(0).to(largest.dtype))
            total += latents.sum(0, dtype=torch.float64)
            tokens += len(x)
    if not tokens:
        raise InputError("There are no activations to record; expected at least one.")
    sae.record_statistics(largest, total / tokens, tokens)
