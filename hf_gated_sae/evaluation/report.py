"""`FidelityReport`, from which cards, JSON files, plots and the terminal take their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from ..errors import InputError, did_you_mean
from ..functional import FidelityMetrics
from ..functional.short_repr import short_repr

LEFT_OUT = "padding and special tokens: neither measured, nor replaced, nor predicted"


@dataclass(frozen=True)
class FidelityReport:
    """The fidelity of an SAE to the activations of a site, and to the model's predictions.

    All numbers are over the same tokens of the same text.

    Attributes:
        architecture: short name, such as ``"gated"``.
        site: at which the SAE was spliced in.
        base_model: that of the SAE's configuration.
        base_model_revision: its commit.
        d_in: width of the activations.
        d_sae: number of latents.
        tokens_left_out: tokens that were read but not counted.
        positions_left_out: which ones, in words.
        loss_tokens: number of predicted tokens in the three losses.
        loss_clean: next-token cross-entropy of the model without edits, nats per token.
        loss_spliced: the same with the site replaced by the reconstruction.
        loss_zero_ablated: the same with the site replaced by zeros.
        loss_recovered: ``(zero_ablated - spliced) / (zero_ablated - clean)``, never clipped.
        metrics: L0, FVU, gamma, dead fraction and more on the activations.
        density: share of tokens on which each latent fired, ``d_sae`` values.
        max_activation: largest value of each latent, ``d_sae`` values.
        mean_activation: mean value of each latent, zeros included, ``d_sae`` values.
        warnings: about unreliable numbers.
        special_token_ids: the special tokens.
        norm_limit: activations with a larger norm were outliers, see `FidelityMetrics`; None for no limit.
    """

    architecture: str
    site: str
    base_model: str | None
    base_model_revision: str | None
    d_in: int
    d_sae: int
    tokens_left_out: int
    positions_left_out: str
    loss_tokens: int
    loss_clean: float
    loss_spliced: float
    loss_zero_ablated: float
    loss_recovered: float
    metrics: FidelityMetrics
    density: tuple[float, ...]
    max_activation: tuple[float, ...]
    mean_activation: tuple[float, ...]
    warnings: tuple[str, ...] = ()
    special_token_ids: tuple[int, ...] = ()
    norm_limit: float | None = None

    __repr__ = short_repr

    @property
    def tokens(self) -> int:
        """Number of activations in the metrics, without outliers."""
        return self.metrics.tokens

    def to_dict(self, *, per_latent: bool = True) -> dict[str, Any]:
        """Return plain JSON; an undefined ratio (NaN) becomes None.

        Args:
            per_latent: include `density`, `max_activation` and `mean_activation`.
        """
        values = asdict(self)
        for name in ("density", "max_activation", "mean_activation"):
            values[name] = list(values[name]) if per_latent else []
        return {name: _to_json(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FidelityReport:
        """Build a report from the result of `to_dict`.

        Raises:
            InputError: if a value is missing or unknown.
        """
        metrics = FidelityMetrics(**_fields_of(FidelityMetrics, values.get("metrics")))
        return cls(**_fields_of(cls, {**values, "metrics": metrics}))


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_json(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def _fields_of(kind: Any, values: Any) -> dict[str, Any]:
    """Check the field names of a stored dataclass, and convert its values back from JSON."""
    if not isinstance(values, Mapping):
        raise InputError(
            f"A stored {kind.__name__} is {type(values).__name__}; expected a mapping, as to_dict() returns it."
        )
    known = {field.name: field for field in fields(kind)}
    for name in values:
        if name not in known:
            raise InputError(
                f"{kind.__name__} has no value {name!r}.{did_you_mean(name, known)} Expected {', '.join(known)}."
            )
    for name in known:
        if name not in values and known[name].default is MISSING:
            raise InputError(f"The stored {kind.__name__} lacks {name!r}; expected {', '.join(known)}.")
    restored = {}
    for name, value in values.items():
        if value is None and known[name].type == "float":
            value = float("nan")
        restored[name] = tuple(value) if isinstance(value, list) else value
    return restored
