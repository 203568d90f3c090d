"""Build a cross-layer SAE from the files of its layers."""

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
"""Tensors of one source site: ``encoder [n, d_in]``, ``decoder [n, outputs, d_out]``, ``b_enc``, ``b_dec`` and
optionally ``threshold`` and ``skip [d_out, d_in]``."""


def cross_layer_checkpoint(
    layers: Sequence[Layer],
    origin: Origin,
    sites_out: Sequence[str],
    *,
    absolute: bool,
    before: int = 0,
    **settings: Any,
) -> Checkpoint:
    """Describe a cross-layer SAE from the headers of its layers' tensors.

    Args:
        layers: the tensors of every source site, in order.
        origin: its location.
        sites_out: the sites that it writes, from the first source site's own output on.
        absolute: whether every decoder has a plane for each output; otherwise only from its own output on.
        before: number of outputs before the first source site's own, for which absolute decoders have planes, too.
        **settings: further fields of the configuration.

    Raises:
        CheckpointError: if the layers do not fit together.
    """
    for name in (*REQUIRED, *OPTIONAL):
        having = [name in layer for layer in layers]
        if not all(having) and (name in REQUIRED or any(having)):
            raise CheckpointError(
                f"Layer {having.index(False)} of {origin} has no {name}, which the others have; expected the same "
                "tensors in every layer: fetch it again."
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
    """Join the layers' vectors; matrices are not copied.

    Args:
        tensors: the tensors of all layers.
        sources: number of source sites.
        outputs: number of sites that are written.
        before: for absolute decoders, the number of outputs before the first source site's own; None for decoders
            that start at their own output.

    Raises:
        CheckpointError: if a threshold is negative.
    """
    for name in ("b_enc", "threshold"):
        parts = [tensors.pop(f"{name}.{index}") for index in range(sources) if f"{name}.{index}" in tensors]
        if parts:
            tensors[name] = torch.cat(parts)
    b_dec = torch.stack([tensors.pop(f"b_dec.{index}") for index in range(sources)])
    # A single layer has the bias of its own output only, so that the layers add up to the whole transcoder.
    missing = b_dec.new_zeros(outputs - sources, b_dec.shape[1])
    tensors["b_dec"] = torch.cat([b_dec, missing]) if outputs > sources else b_dec
    if before is not None:
        for index in range(sources):
            planes = tensors[f"decoders.{index}"]
            is_whole = planes.shape[1] == before + outputs  # otherwise the wrong shape is refused later
            tensors[f"decoders.{index}"] = planes[:, before + index :] if is_whole else planes
    if "threshold" in tensors:
        require_not_negative(tensors["threshold"])
    return tensors


def require_not_negative(threshold: Tensor) -> None:
    """Raise for a threshold below zero, for which JumpReLU implementations differ.

    Raises:
        CheckpointError: with the smallest threshold.
    """
    if not threshold.is_meta and bool((threshold < 0).any()):
        raise CheckpointError(
            f"The checkpoint has a threshold of {float(threshold.min()):.3g}; expected none below 0: fetch it again."
        )
