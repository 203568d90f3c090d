"""Shared code of the OpenMOSS team's layouts: Llama Scope, Llama Scope R1, and llamascopium."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..architectures.glu import GLUSAE
from ..architectures.jumprelu import JumpReLUSAE
from ..architectures.standard import StandardSAE
from ..architectures.topk import TopKSAE
from ..errors import CheckpointError
from ..hub.base_model_norms import normalization_of
from ..hub.hook_names import site_of_hook
from ..hub.index import known_facts
from ..hub.location import Location
from ..modeling import SAEModel
from ..modeling.checkpoint import Checkpoint
from ..storage import StoredTensor
from ._config_values import flag, integer, one_of, text
from ._folding import decoder_norms, fold, gate_by_decoder_norms
from .base import widths

AVERAGE = "dataset_average_activation_norm."
TOPK = ("topk", "batchtopk")


def base_model_of(location: Location, otherwise: str | None = None) -> str | None:
    """Return the base model in the index, else `otherwise`."""
    return known_facts(location.repo_id, location.address).get("base_model", otherwise)


def site_fields(config: Mapping[str, Any], base_model: str | None, where: str) -> dict[str, Any]:
    """Return the fields of `SAEConfig` for the base model and the sites that an SAE reads and writes.

    Raises:
        CheckpointError: if a hook point is unknown, or is the output of a norm of an unknown kind.
    """
    hook_in = text(config, "hook_point_in", where)
    hook_out = text(config, "hook_point_out", where, hook_in)
    site, normalization = site_of_hook(hook_in, base_model=base_model)
    found = {"base_model": base_model, "site": site, **normalization_of(normalization, base_model, hook_in, where)}
    if hook_out != hook_in:
        found["site_out"], written = site_of_hook(hook_out, base_model=base_model)
        if written != "none":
            raise CheckpointError(f"{where} has hook_point_out = {hook_out!r}; expected a site that a block writes.")
    return found


def training_scale(average: float, d_model: int, where: str) -> float:
    """Return the factor of activations in training, ``sqrt(d_model) / average``, from their average norm.

    Raises:
        CheckpointError: if the average is not a positive number.
    """
    if not (math.isfinite(average) and average > 0):
        raise CheckpointError(
            f"{where} states that activations have the average norm {average}; expected a positive one."
        )
    return math.sqrt(d_model) / average


def recorded_scales(
    location: Location, config: Mapping[str, Any], held: Mapping[str, StoredTensor], where: str
) -> tuple[float, float]:
    """Return the factors of input and output in training, from the average norms beside the weights.

    Raises:
        CheckpointError: if they are neither in the file nor in the index.
    """
    hook_in = text(config, "hook_point_in", where)
    scales = []
    for hook in (hook_in, text(config, "hook_point_out", where, hook_in)):
        stored = held.get(AVERAGE + hook)
        if stored is not None:
            scales.append(training_scale(_scalar(stored), integer(config, "d_model", where), str(stored)))
            continue
        known = known_facts(location.repo_id, location.address).get("input_scale") if hook == hook_in else None
        if not isinstance(known, (int, float)):
            raise CheckpointError(
                f"{where} states that activations were scaled by their average norm (norm_activation 'dataset-wise'), "
                f"but that number is neither in the weights, as {AVERAGE}{hook}, nor known for {location.repo_id}: "
                "without it the SAE would read activations at the wrong scale. Ask its authors to add it."
            )
        scales.append(float(known))
    return scales[0], scales[1]


def checkpoint_as_trained(
    location: Location,
    layout: str,
    files: tuple[str, str],
    config: Mapping[str, Any],
    held: Mapping[str, StoredTensor],
    stored: dict[str, StoredTensor],
    **known: Any,
) -> Checkpoint:
    """Describe an SAE whose weights are stored as trained, as Llama Scope R1 and llamascopium store them.

    ``p = scale_in * x @ W_enc + b_enc`` (with a GLU times ``sigmoid(scale_in * x @ W_glu + b_glu)``). With
    ``sparsity_include_decoder_norm`` the activation function is applied to ``p_i * |W_dec[i]|`` and selects which
    latents keep their value ``p_i``. ``y = (latents @ W_dec + b_dec) / scale_out``. A batch TopK encodes each token as
    its own batch.

    Args:
        location: folder of the SAE.
        layout: name of the format.
        files: configuration and weights.
        config: content of the configuration.
        held: all tensors of the file, by their names there.
        stored: the tensors by parameter name; ``threshold``, if the file has one, is its logarithm.
        **known: fields of `SAEConfig` that the layout determines: ``base_model``, ``trained_on_bos``.

    Raises:
        CheckpointError: if the configuration has an unknown value.
    """
    where = f"{files[0]} of {location}"
    d_sae, d_in, d_out = widths(stored)
    if integer(config, "d_model", where) != d_in:
        raise CheckpointError(f"{where} has d_model = {config['d_model']}, but the encoder reads {d_in}.")
    by_norm = flag(config, "sparsity_include_decoder_norm", where, True)
    centred = flag(config, "apply_decoder_bias_to_pre_encoder", where, False)
    settings: dict[str, Any] = {
        **{"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "apply_b_dec_to_input": centred},
        **known,
        **site_fields(config, known.get("base_model"), where),
    }
    model_class, more = _activation(config, stored, by_norm, where)
    scales, normalization = _normalization(location, config, held, settings, where)
    model_config = model_class.config_class(**{**settings, **more, **normalization})
    finish = partial(finish_trained, scales=scales, by_norm=by_norm and "threshold" in stored, width=d_out)
    return Checkpoint(model_class, model_config, location.origin(layout, files), stored, finish=finish)


def finish_trained(
    tensors: dict[str, Tensor], scales: tuple[float, float], by_norm: bool, width: int
) -> dict[str, Tensor]:
    """Fold the scales, and turn log-thresholds into thresholds of the latents."""
    with_decoder_bias(tensors, width)
    if "threshold" in tensors:
        log_threshold = tensors["threshold"]
        tensors["threshold"] = log_threshold.to(torch.promote_types(log_threshold.dtype, torch.float32)).exp()
    elif "W_glu_T" in tensors:
        tensors["threshold"] = torch.zeros_like(tensors["b_enc"], dtype=torch.float32)
    if by_norm:
        gate_by_decoder_norms(tensors)
    return fold(tensors, scale_in=scales[0], scale_out=scales[1])


def finish_standardised(
    tensors: dict[str, Tensor], scales: tuple[float, float], by_norm: bool, threshold: float | None, width: int
) -> dict[str, Tensor]:
    """Fold the scales, then the decoder norms, and add the threshold, which has the scale of the resulting latents.

    Without decoder norms the latents are scaled by ``1 / scale_in``, as for the raw input.
    """
    with_decoder_bias(tensors, width)
    norms = decoder_norms(tensors["W_dec"])
    unit = norms / scales[1] if by_norm else torch.full_like(norms, 1 / scales[0])
    fold(tensors, scale_in=scales[0], scale_out=scales[1], latent_unit=unit)
    if threshold is not None:
        tensors["threshold"] = torch.full_like(tensors["b_enc"], threshold, dtype=torch.float32)
    return tensors


def with_decoder_bias(tensors: dict[str, Tensor], width: int) -> None:
    """Add a decoder bias of zeros to an SAE without one."""
    if "b_dec" not in tensors:
        tensors["b_dec"] = tensors["W_dec"].new_zeros(width)


def _activation(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], by_norm: bool, where: str
) -> tuple[type[SAEModel], dict[str, Any]]:
    """Return the architecture and its own configuration fields."""
    kinds = ("relu", "jumprelu", *TOPK)
    name = one_of(config, "act_fn", where, kinds, "relu")
    gated = "W_glu_T" in stored
    if "threshold" in stored:  # only SAEs with a JumpReLU have it
        return (GLUSAE if gated else JumpReLUSAE), {}
    if name == "jumprelu":
        raise CheckpointError(f"{where} has act_fn = 'jumprelu', but the weights hold no log_jumprelu_threshold.")
    if name in TOPK:
        if gated:
            raise CheckpointError(
                f"{where} has use_glu_encoder together with act_fn = {name!r}, which is not supported; expected relu "
                "or jumprelu with it."
            )
        return TopKSAE, {"k": integer(config, "top_k", where, 50), "rank_by_decoder_norm": by_norm}
    return (GLUSAE if gated else StandardSAE), {}


def _normalization(
    location: Location,
    config: Mapping[str, Any],
    held: Mapping[str, StoredTensor],
    settings: Mapping[str, Any],
    where: str,
) -> tuple[tuple[float, float], dict[str, Any]]:
    """Return the factors of input and output in training, and the fields of a per-token normalisation."""
    known = ("dataset-wise", "inference", "token-wise", "batch-wise")
    kind = one_of(config, "norm_activation", where, known, "dataset-wise")
    if kind == "dataset-wise":
        return recorded_scales(location, config, held, where), {}
    if kind == "inference":
        return (1.0, 1.0), {}
    if kind == "batch-wise":
        raise CheckpointError(
            f"{where} has norm_activation = 'batch-wise': tokens were scaled by the average norm of their sequence, "
            "so an activation alone cannot be encoded. Expected dataset-wise, inference or token-wise."
        )
    if "site_out" in settings or settings["normalization"] != "none":
        raise CheckpointError(
            f"{where} has norm_activation = 'token-wise' for a transcoder, or after a norm: the scale of its output "
            "cannot be computed from its input. Expected dataset-wise or inference."
        )
    return (1.0, 1.0), {"normalization": "unit_norm"}


def _scalar(stored: StoredTensor) -> float:
    """Return the value of a stored scalar.

    Raises:
        CheckpointError: if it is not a scalar.
    """
    if math.prod(stored.shape) != 1:
        raise CheckpointError(f"{stored} has shape {list(stored.shape)}; expected one number.")
    return float(stored.small())
