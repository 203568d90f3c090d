"""Measuring how strongly each latent of a finished SAE fires."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import InputError
from ..functional import FidelityAccumulator
from ..modeling import SAEModel


@torch.no_grad()
def record_activations(sae: SAEModel, pieces: Iterable[Tensor]) -> None:
    """Measure the largest and the mean value of every latent, FVU, L0 and norm, and store them in the SAE.

    Args:
        sae: reads the activations as they are.
        pieces: activations ``[n, d_in]``.

    Raises:
        InputError: if there are no activations.
    """
    accumulator = FidelityAccumulator(sae.config.d_sae, sae.b_dec)
    for piece in pieces:
        for x in piece.split(4096):
            given = x.to(sae.W_dec)
            output = sae(given)
            accumulator.update(given, output.reconstruction, output.latents)
    if not accumulator.tokens:
        raise InputError("There are no activations to record; expected at least one.")
    latents = (accumulator.max_activation, accumulator.mean_activation)
    sae.record_statistics(*latents, accumulator.tokens, metrics=accumulator.compute())
