"""SAE mathematics on plain tensors: no files, no models, no network.

Shape legend: ``d_in``/``d_out`` activation widths, ``d_sae`` number of latents, ``k`` active latents per token,
``...`` any leading axes (batch, position).
"""

from .activations import above_threshold, jumprelu, topk
from .geometry import remove_parallel_component, unit_norm_rows
from .metrics import FidelityAccumulator, FidelityMetrics, loss_recovered
from .sparse_latents import SparseLatents

__all__ = [
    "FidelityAccumulator",
    "FidelityMetrics",
    "SparseLatents",
    "above_threshold",
    "jumprelu",
    "loss_recovered",
    "remove_parallel_component",
    "topk",
    "unit_norm_rows",
]
