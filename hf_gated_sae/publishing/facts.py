"""Facts about an SAE beyond its tensors, and the file `sae_metrics.json` that stores them with it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import CheckpointError, InputError, did_you_mean
from ..evaluation import FidelityReport
from ..hub.licences import normalise
from ..hub.origin import Origin
from ..modeling import SAEModel
from ..storage.atomic_write import FACTS_FILE

SCHEMA = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentLabel:
    """The meaning of one latent, with the measurement that supports it.

    Attributes:
        latent: index, ``0 .. d_sae - 1``.
        label: short text.
        precision: of the tokens on which the latent fires, the share with the labelled concept; None if not measured.
        recall: of the tokens with that concept, the share on which it fires; None if not measured.
    """

    latent: int
    label: str
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class CardFacts:
    """Facts about an SAE for its model card; all are optional, and the card states only those given.

    Attributes:
        metrics: metrics by name, such as ``{"l0": 31.2, "fvu": 0.08}``; NaN is stored as None and shown as undefined.
        comparisons: the same metrics of other SAEs, measured in the same way, by the name of the SAE.
        evaluation: how `metrics` were measured: ``dataset``, ``split``, ``tokens``, ``command`` (to repeat it), ...
        training: facts of the training run by name, such as ``{"steps": 20000, "sparsity_coefficient": 0.5}``.
        curve: metrics on held-out text during training, in order; each row has its ``step`` and the same other names,
            such as ``{"step": 500, "l0": 40.1, "loss_recovered": 0.91}``.
        datasets: the data that the SAE was trained on: Hub ids ``owner/name``, which the Hub links, or descriptions.
        license: licence of the Hub's list, such as ``"apache-2.0"``; see `licensed`.
        license_name: name of a licence ``"other"``.
        license_link: of a licence ``"other"``: ``"LICENSE"`` for a file of the repository, or an address.
        labels: latents with a known meaning.
        provenance: the SAE's origin, such as ``{"converted from": "owner/name@commit"}``.
        name: title of the card.
        description: further prose in Markdown.
    """

    metrics: Mapping[str, float | None] = field(default_factory=dict)
    comparisons: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    curve: tuple[Mapping[str, float | None], ...] = ()
    datasets: tuple[str, ...] = ()
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    labels: tuple[LatentLabel, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        """Check that metrics are numbers, and convert values to those that reading a file returns."""
        rows = {f"row {number} of the curve": row for number, row in enumerate(self.curve)}
        for title, numbers in {"metrics": self.metrics, **self.comparisons, **rows}.items():
            for name, value in numbers.items():
                if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                    raise InputError(
                        f"The metric {name!r} of {title} is {value!r}; expected a number. Put facts of the evaluation "
                        "into evaluation= and of the training into training=."
                    )
        object.__setattr__(self, "metrics", _numbers(self.metrics))
        object.__setattr__(self, "comparisons", {name: _numbers(found) for name, found in self.comparisons.items()})
        object.__setattr__(self, "curve", tuple(_numbers(row) for row in self.curve))
        object.__setattr__(self, "datasets", tuple(self.datasets))
        labels = (label if isinstance(label, LatentLabel) else LatentLabel(**label) for label in self.labels)
        object.__setattr__(self, "labels", tuple(labels))

    @classmethod
    def of_report(cls, report: FidelityReport, *, evaluation: Mapping[str, Any], **more: Any) -> CardFacts:
        """Return facts with the metrics of a report of `evaluate`.

        Args:
            report: the report.
            evaluation: how it was measured: ``dataset``, ``split``, ``command`` ...; tokens, left-out positions and
                warnings are added from the report.
            **more: the other facts.
        """
        values = report.to_dict(per_latent=False)
        losses = {name: values[name] for name in values if name.startswith("loss_") and name != "loss_tokens"}
        measured = {"tokens": report.tokens, "left out": report.positions_left_out}
        warnings = {"warnings": list(report.warnings)} if report.warnings else {}
        return cls(metrics={**values["metrics"], **losses}, evaluation={**evaluation, **measured, **warnings}, **more)

    def licensed(self) -> CardFacts:
        """Return the facts with the licence in the Hub's spelling, if there is one.

        Raises:
            InputError: if the licence is not on the Hub's list; see `hub.licences.normalise`.
        """
        if self.license is None and not self.license_name and not self.license_link:
            return self
        if self.license is None:
            raise InputError("Given license_name or license_link without license='other': pass it as well.")
        return replace(self, license=normalise(self.license, name=self.license_name, link=self.license_link))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without unknown facts."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, {}, (), [])}
        return {"schema": SCHEMA, **known}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CardFacts:
        """Build facts from the content of ``sae_metrics.json``.

        Raises:
            InputError: if a key is unknown or a value cannot be used.
        """
        values = {name: value for name, value in content.items() if name != "schema"}
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(
                f"The facts have no key {', '.join(map(repr, unknown))}.{did_you_mean(unknown[0], known)} "
                f"Known: {', '.join(known)}."
            )
        try:
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise InputError(f"The facts cannot be used ({error}); see CardFacts for what each key holds.") from error


def _numbers(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the numbers with None for undefined values, since JSON has no NaN."""
    return {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}


def read_facts(source: str | os.PathLike[str] | Origin | SAEModel) -> CardFacts:
    """Return the facts about an SAE that are stored beside its weights.

    Args:
        source: a folder, a checkpoint, or an SAE, whose checkpoint is read. If the SAE's weights differ from those of
            its checkpoint, facts about metrics and training no longer apply and are dropped.

    Returns:
        The facts; empty ones if there are none.

    Raises:
        CheckpointError: if the file exists but cannot be read.
    """
    if isinstance(source, SAEModel):
        return _facts_of(source)
    if isinstance(source, Origin):
        return CardFacts() if source.folder is None else read_facts(source.folder)
    path = Path(source) / FACTS_FILE
    if not path.is_file():
        return CardFacts()
    try:
        return CardFacts.from_dict(json.loads(path.read_bytes()))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be used as the SAE's facts: {error}") from error


def _facts_of(sae: SAEModel) -> CardFacts:
    """Return the facts of an SAE's checkpoint that apply to its current weights."""
    checkpoint = sae.checkpoint
    if checkpoint is None or checkpoint.folder is None:
        return CardFacts()
    facts = read_facts(checkpoint.folder)
    if facts == CardFacts() or _has_weights_of(sae, checkpoint.folder):
        return facts
    logger.warning(
        "The weights differ from those of %s: its metrics are dropped. Evaluate the SAE again and pass facts=.",
        checkpoint,
    )
    kept = {name: getattr(facts, name) for name in ("license", "license_name", "license_link")}
    return CardFacts(**kept, provenance={**facts.provenance, "modified from": str(checkpoint)})


def _has_weights_of(sae: SAEModel, folder: Path) -> bool:
    """Whether the SAE's tensors are those stored in a folder, up to the dtype that it was loaded in."""
    tensors = sae.state_dict()
    files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # not a mapping
                if name not in tensors or not torch.equal(
                    stored.get_tensor(name).to(tensors[name].dtype), tensors[name].cpu()
                ):
                    return False
    return bool(files)


def write_facts(facts: CardFacts, folder: str | os.PathLike[str]) -> Path:
    """Write ``sae_metrics.json`` into a folder and return its path.

    Raises:
        InputError: if a fact cannot be written as JSON.
    """
    path = Path(folder) / FACTS_FILE
    try:
        text = json.dumps(facts.to_dict(), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The facts cannot be written as JSON ({error}); expected strings, numbers, lists and mappings."
        ) from error
    path.write_text(text + "\n", encoding="utf-8")
    return path
