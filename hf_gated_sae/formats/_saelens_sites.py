"""Sites and input normalisation of SAELens's SAEs, from ``cfg.json`` and from the index of known SAEs."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, shown
from ..hub.base_model_norms import has_rms_norm, normalization_of
from ..hub.hook_names import site_of_hook
from ..hub.location import Location
from ..hub.model_names import repository_of
from ._config_values import flag, mapping, number, one_of, text

SCALER = "activation_scaler.json"
NORMALIZATIONS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "unit_norm"}
EXPECTED_AVERAGE = "expected_average_only_in"
KNOWN_NORMALIZATIONS = (*NORMALIZATIONS, EXPECTED_AVERAGE, "constant_scalar_rescale", "covariance_whitening")

_MODULE = re.compile(r"\w+(\.\w+)*")
_WRITTEN = re.compile(r"(resid_\w+|attn_out|mlp_out)\.\d+|embed")
_log = logging.getLogger(__name__)


def site_fields(
    metadata: Mapping[str, Any], facts: Mapping[str, Any], where: str, *, transcoder: bool
) -> dict[str, Any]:
    """Return the configuration fields for the base model and the sites of an SAE.

    Args:
        metadata: the part of ``cfg.json`` that describes training.
        facts: facts about this SAE from the index.
        where: the file, for messages.
        transcoder: whether the output is at another site.

    Returns:
        ``base_model``, ``site``, for a transcoder ``site_out`` (None if the file does not state it),
        ``trained_on_bos``, and the ``normalization`` that the hook point implies.

    Raises:
        CheckpointError: if a transcoder's output is at a hook point that cannot be written, or the SAE reads one head.
    """
    if metadata.get("hook_head_index") is not None:
        raise CheckpointError(
            f"{where} has hook_head_index = {shown(metadata['hook_head_index'])}: the SAE reads one head of "
            f"{shown(metadata.get('hook_name'))}, but a site here is all heads concatenated. To encode activations of "
            "that head which you slice yourself, load it as home-made (architecture=, format='home_made')."
        )
    base_model = repository_of(text(metadata, "model_name", where, None)) or facts.get("base_model")
    site, normalization = _site(metadata, "hook_name", base_model, where)
    found: dict[str, Any] = {
        "base_model": base_model,
        "site": site,
        "trained_on_bos": _trained_on_bos(metadata),
    }
    if transcoder:
        found["site_out"], written = _site(metadata, "hook_name_out", base_model, where)
        if written != "none":
            raise CheckpointError(no_output(metadata, where))
    if _is_centred(metadata, base_model, site, where):
        normalization = "center" if normalization == "none" else normalization
    return {**found, **normalization_of(normalization, base_model, metadata.get("hook_name"), where)}


def no_output(metadata: Mapping[str, Any], where: str) -> str:
    """Return the error for a transcoder whose output site is unknown."""
    return (
        f"{where} describes a transcoder and has hook_name_out = {shown(metadata.get('hook_name_out'))}; expected the "
        "hook point of its output, such as 'blocks.5.hook_mlp_out': complete the file, or pass site_out=, such as "
        "site_out='mlp_out.5'."
    )


def normalized(
    cfg: Mapping[str, Any], implied: str, facts: Mapping[str, Any], location: Location, where: str
) -> tuple[str, float]:
    """Return the per-token normalisation, and the constant that activations were multiplied by in training.

    Facts from the index have precedence over the file, which was often written before the flag existed.

    Args:
        cfg: content of ``cfg.json``.
        implied: the normalisation that the hook point implies.
        facts: facts about this SAE from the index.
        location: its folder.
        where: the file, for messages.

    Raises:
        CheckpointError: if the constant is unknown, or the normalisation cannot be expressed.
    """
    name = one_of(cfg, "normalize_activations", where, KNOWN_NORMALIZATIONS, "none")
    if name == "covariance_whitening":
        raise CheckpointError(
            f"{where} has normalize_activations = {name!r}, a checkpoint from the middle of training: let SAELens "
            "fold the whitening into the weights (sae.fold_activation_whitening(...)) and save it again."
        )
    known = facts.get("normalization", "none")
    found = {implied, known, NORMALIZATIONS.get(name, "none") if known in ("none", "center") else "none"} - {"none"}
    if "layer_norm" in found:
        found.discard("center")  # a layer norm centres, too
    if len(found) > 1:
        raise CheckpointError(
            f"{where} implies that activations are normalised twice ({', '.join(sorted(found))}), which is not "
            "supported; expected one normalisation: check normalize_activations and hook_name."
        )
    scale = 1.0
    if name == EXPECTED_AVERAGE and known in ("none", "center"):
        scale = _expected_average(facts, location, where)
    elif name == "constant_scalar_rescale":
        scale = positive(cfg, "activation_normalization_factor", where)
    return found.pop() if found else "none", scale


def positive(cfg: Mapping[str, Any], key: str, where: str) -> float:
    """Return a positive number, between 1e-30 and 1e30.

    Raises:
        CheckpointError: if it is not one.
    """
    value = float(number(cfg, key, where))
    if not 1e-30 < value < 1e30:
        raise CheckpointError(f"{where} has {key} = {value}; expected a positive number.")
    return value


def _expected_average(facts: Mapping[str, Any], location: Location, where: str) -> float:
    """Return ``sqrt(d_in) / (mean norm of the training activations)``, which ``cfg.json`` never has.

    Raises:
        CheckpointError: if it is neither in the folder nor in the index.
    """
    if SCALER in location:
        content = location.read_json(SCALER)
        if content.get("scaling_factor") is not None:
            return positive(content, "scaling_factor", f"{SCALER} of {location}")
    known = facts.get("input_scale")
    if isinstance(known, (int, float)) and math.isfinite(known) and known > 0:
        return float(known)
    raise CheckpointError(
        f"{where} has normalize_activations = {EXPECTED_AVERAGE!r}: the SAE was trained on c * x, with the constant "
        "c = sqrt(d_in) / (mean norm of the training activations), and neither the folder nor the index has c. Fold "
        "it with SAELens (sae.fold_activation_norm_scaling_factor(c)) and save the SAE again, or put a file "
        f'{SCALER} with {{"scaling_factor": c}} beside {where.split(" ", 1)[0]}.'
    )


def _site(metadata: Mapping[str, Any], key: str, base_model: str | None, where: str) -> tuple[str | None, str]:
    """Return the site of a hook point's name, and the normalisation that it implies."""
    name = text(metadata, key, where, None)
    if not name:
        return None, "none"
    if text(metadata, "model_class_name", where, "HookedTransformer") == "AutoModelForCausalLM":
        if _MODULE.fullmatch(name) is None:
            raise CheckpointError(
                f"{where} has {key} = {shown(name)}; expected a module path such as model.layers.12."
            )
        return f"{name}.output", "none"
    layer = metadata.get("hook_layer")
    try:
        return site_of_hook(name.replace("{layer}", str(layer)) if type(layer) is int else name, base_model=base_model)
    except CheckpointError as error:  # the SAE can be loaded without a site
        _log.warning("%s: %s is not a known site, so the SAE cannot be attached. %s", where, key, error)
        return None, "none"


def _is_centred(metadata: Mapping[str, Any], base_model: str | None, site: str | None, where: str) -> bool:
    """Whether the base model was loaded with centred weights, so that the stream has a mean of zero."""
    loading: Mapping[str, Any] = mapping(metadata, "model_from_pretrained_kwargs", where, {})
    requested = flag(loading, "center_writing_weights", where, False)
    in_stream = site is not None and _WRITTEN.fullmatch(site) is not None
    # TransformerLens does not centre the weights of models whose norms do not subtract the mean.
    return requested and in_stream and not has_rms_norm(base_model)


def _trained_on_bos(metadata: Mapping[str, Any]) -> bool | None:
    """Whether the beginning-of-sequence token was among the training activations; None if that is not stated."""
    excluded = metadata.get("exclude_special_tokens")
    if excluded is True:
        return False
    from_the_start = metadata.get("seqpos_slice") in (None, [None], [None, None], [0, None])
    return True if metadata.get("prepend_bos") is True and not excluded and from_the_start else None
