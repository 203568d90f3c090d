"""Put a cross-layer SAE together from the files of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..architectures.cross_layer import CrossLayerSAE, CrossLayerSAEConfig
from ..errors import CheckpointError
from ..hub.origin import Origin
from ..modeling.checkpoint import Checkpoint
from ..storage import StoredTensor

REQUIRED = ("encoder", "decoder", "b_enc", "b_dec")
OPTIONAL = ("threshold", "skip")

Layer = Mapping[str, StoredTensor]
"""Tensors of one source site: ``encoder [n, d_in]``, ``decoder [n, outputs, d_out]``, ``b_enc``, ``b_dec`` and, if
there are any, ``threshold`` and ``skip [d_out, d_in]``."""


def cross_layer_checkpoint(
    layers: Sequence[Layer],
    origin: Origin,
    sites_out: Sequence[str],
    *,
    absolute: bool,
    before: int = 0,
    **settings: Any,
) -> Checkpoint:
    """Describe a cross-layer SAE by the headers of its layers' tensors.

    Args:
        layers: the tensors of every source site, in order.
        origin: where it lies.
        sites_out: what it writes, from the first source site's own output on.
        absolute: whether every decoder has a plane for each output; else from its own output on.
        before: number of outputs before the first source site's own, for which absolute decoders have planes, too.
        **settings: further fields of the configuration.

    Raises:
        CheckpointError: if the layers do not fit each other.
    """
    for name in (*REQUIRED, *OPTIONAL):
        having = [name in layer for layer in layers]
        if not all(having) and (name in REQUIRED or any(having)):
            raise CheckpointError(
                f"Layer {having.index(False)} of {origin} has no {name}, which the others have; expected the same "
                "tensors of every layer: fetch it again."
            )
    first = layers[0]
    for name, axes in (("encoder", 2), ("decoder", 3)):
        for number, layer in enumerate(layers):
            if layer[name].ndim != axes or layer[name].shape[0] < 1:
                raise CheckpointError(
                    f"The {name} of layer {number} of {origin} has shape {list(layer[name].shape)}; expected {axes} "
                    "axes and one row per latent: fetch it again."
                )
    latents = [layer["encoder"].shape[0] for layer in layers]
    config = CrossLayerSAEConfig(
        d_in=first["encoder"].shape[1],
        d_sae=sum(latents),
        d_out=first["decoder"].shape[2],
        sites_out=list(sites_out),
        latents_per_site=latents,
        activation="jumprelu" if "threshold" in first else "relu",
        skip_connection="skip" in first,
        apply_b_dec_to_input=False,
        trained_on_bos=False,
        **settings,
    )
    plural = {"encoder": "encoders", "decoder": "decoders", "skip": "skips"}
    stored = {
        f"{plural.get(name, name)}.{number}": layer[name]
        for number, layer in enumerate(layers)
        for name in (*REQUIRED, *OPTIONAL)
        if name in layer
    }
    skipped = before if absolute else None
    finish = partial(_joined, sources=len(layers), outputs=len(sites_out), before=skipped)
    return Checkpoint(CrossLayerSAE, config, origin, stored, shared=frozenset(stored), finish=finish)


def _joined(tensors: dict[str, Tensor], *, sources: int, outputs: int, before: int | None) -> dict[str, Tensor]:
    """Join the layers' vectors; matrices stay where they are.

    Args:
        tensors: those of all layers.
        sources: number of source sites.
        outputs: number of places that are written.
        before: of decoders that have a plane for each output of the whole, the number of those that are not written;
            None of decoders that begin with their own.

    Raises:
        CheckpointError: if a threshold is negative.
    """
    for name in ("b_enc", "threshold"):
        parts = [tensors.pop(f"{name}.{at}") for at in range(sources) if f"{name}.{at}" in tensors]
        if parts:
            tensors[name] = torch.cat(parts)
    b_dec = torch.stack([tensors.pop(f"b_dec.{at}") for at in range(sources)])
    # One layer alone brings the bias of its own output: the layers of a transcoder add up to the whole.
    missing = b_dec.new_zeros(outputs - sources, b_dec.shape[1])
    tensors["b_dec"] = torch.cat([b_dec, missing]) if outputs > sources else b_dec
    if before is not None:
        for at in range(sources):
            planes = tensors[f"decoders.{at}"]
            is_whole = planes.shape[1] == before + outputs  # else the shapes are refused as they are
            tensors[f"decoders.{at}"] = planes[:, before + at :] if is_whole else planes
    if "threshold" in tensors:
        require_not_negative(tensors["threshold"])
    return tensors


def require_not_negative(threshold: Tensor) -> None:
    """Raise for a threshold below zero, where writers of JumpReLU disagree about what is on.

    Raises:
        CheckpointError: naming the smallest.
    """
    if not threshold.is_meta and bool((threshold < 0).any()):
        raise CheckpointError(
            f"The checkpoint has a threshold of {float(threshold.min()):.3g}; expected none below 0: fetch it again."
        )
