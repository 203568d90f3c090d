"""Recording the activation statistics of the latents of a trained SAE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InputError
from ..functional import FidelityAccumulator, FidelityMetrics
from ..modeling import SAEModel
from .processes import Processes
from .trainee import Trainee


@torch.no_grad()
def record_activations(trainees: Sequence[Trainee], pieces: Iterable[Mapping[str, Tensor]]) -> list[FidelityMetrics]:
    """Measure the largest and mean value of every latent, FVU, L0 and norm, and store them in the SAEs.

    The run's outliers are left out here too, except from the metrics that are named ``..._with_outliers``.

    Args:
        trainees: SAEs, in the model's activation unit; all are measured in one pass.
        pieces: activations ``[n, d]`` by site.

    Returns:
        The metrics of each SAE.

    Raises:
        InputError: if there are no activations.
    """
    accumulators = [FidelityAccumulator(trainee.sae.config.d_sae, trainee.sae.b_dec) for trainee in trainees]
    for piece in pieces:
        for trainee, accumulator in zip(trainees, accumulators, strict=True):
            outlier = trainee.outliers(piece)
            for x, target, apart in zip(
                piece[trainee.reads].split(4096), piece[trainee.writes].split(4096), outlier.split(4096), strict=True
            ):
                _add(trainee.sae, accumulator, x, target, apart)
    measured = []
    for trainee, accumulator in zip(trainees, accumulators, strict=True):
        if not accumulator.tokens:
            raise InputError("There are no activations to record; expected at least one.")
        measured.append(_of_all_latents(accumulator.compute(), trainee.grid.latents))
        strengths = (accumulator.max_activation, accumulator.mean_activation)
        trainee.sae.record_statistics(*strengths, accumulator.tokens, metrics=measured[-1])
    return measured


def _add(sae: SAEModel, accumulator: FidelityAccumulator, x: Tensor, target: Tensor, outlier: Tensor) -> None:
    """Add activations ``x [n, d_in]``, ``target [n, d_out]``, some of which ``[n]`` are outliers."""
    given, wanted = x.to(sae.W_dec), target.to(sae.W_dec)
    if outlier.any():
        apart, ordinary = outlier.to(given.device), ~outlier.to(given.device)
        read = given[apart]
        accumulator.update_outliers(wanted[apart], sae.decode(sae.encode_sparse(read), read))
        given, wanted = given[ordinary], wanted[ordinary]
    latents = sae.encode_sparse(given)
    constant = sae.constant(given).expand_as(wanted)
    accumulator.update(wanted, sae.decode(latents, given), latents, constant=constant)


def _of_all_latents(metrics: FidelityMetrics, processes: Processes) -> FidelityMetrics:
    """Return metrics in which counts of latents include those of all processes that share the SAE."""
    counted = {"l0": metrics.l0, "dead": metrics.dead_fraction, "dense": metrics.dense_fraction}
    mean = processes.mean_by_name(counted)
    return replace(metrics, l0=mean["l0"] * processes.count, dead_fraction=mean["dead"], dense_fraction=mean["dense"])
