"""Norms of base models, for checkpoints whose site name refers to a norm."""

from __future__ import annotations

import re
from typing import Any

from ..errors import CheckpointError

RMS_NORMS = {"gemma|qwen": 1e-6, r"llama|mistral|mixtral|phi-?3|gpt-oss|(^|/)yi-": 1e-5}
"""Epsilon of families whose norms divide by the root mean square, by a pattern for the base model's name."""
LAYER_NORMS = {"gpt-?2|pythia|gpt-?neo|tiny-?stories": 1e-5}
"""Epsilon of families whose norms subtract the mean first."""

_POST_NORMS = re.compile(r"gemma-?[234]|olmo-?[23]|exaone-?4|glm-?4", re.IGNORECASE)


def has_post_norms(base_model: str | None) -> bool:
    """Whether a base model applies a norm to a sublayer's output before it is added to the residual stream."""
    return _POST_NORMS.search(base_model or "") is not None


def has_rms_norm(base_model: str | None) -> bool:
    """Whether a base model is of a family known to use RMS norms."""
    return _eps(base_model, RMS_NORMS) is not None


def normalization_of(kind: str, base_model: str | None, name: object, where: object) -> dict[str, Any]:
    """Return the configuration fields for the normalisation that a hook point's name implies.

    Args:
        kind: the normalisation, as `hook_names.site_of_hook` returns it; ``"rms_norm"`` is the model's own norm.
        base_model: the base model.
        name: the hook point, for messages.
        where: the configuration, for messages.

    Raises:
        CheckpointError: if the norms of the base model are not known.

    >>> normalization_of("rms_norm", "openai-community/gpt2", "ln2.hook_normalized", "cfg.json")
    {'normalization': 'standardize', 'normalization_eps': 1e-05}
    """
    if kind != "rms_norm":
        return {"normalization": kind}
    for normalization, families in (("rms_norm", RMS_NORMS), ("standardize", LAYER_NORMS)):
        if (eps := _eps(base_model, families)) is not None:
            return {"normalization": normalization, "normalization_eps": eps}
    raise CheckpointError(
        f"{where} names the hook point {name!r}, the output of a norm before its gain, and it is unknown whether the "
        f"base model ({base_model or 'unknown'}) has an RMS norm or a layer norm there; expected a model of a known "
        "family: Gemma, Qwen, Llama, Mistral, Phi-3, gpt-oss, Yi, GPT-2, GPT-Neo, Pythia or TinyStories."
    )


def _eps(base_model: str | None, families: dict[str, float]) -> float | None:
    """Return the epsilon of the first family whose pattern matches the name."""
    fitting = (eps for name, eps in families.items() if re.search(name, base_model or "", re.IGNORECASE))
    return next(fitting, None)
