"""Writing facts and cards for the SAEs of a finished training run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..training.run import Run
from ..training.run_facts import FACTS_FILE
from .facts import CardFacts
from .save_published import save


def save_trained(run: Run) -> dict[str, Path]:
    """Write facts and card beside every SAE of a finished run.

    Args:
        run: after training.

    Returns:
        The folder of each SAE, by the name of its section.
    """
    return {name: save(run.trained(name), run.folder(name), training_facts(run, name)) for name in run.saes}


def training_facts(run: Run, name: str = "") -> CardFacts:
    """Return the facts of an SAE's training run.

    The metrics are those of a sample of the training stream, the first activations of its text or random ones of those
    on disk; replace them by metrics on held-out text.

    Args:
        run: after training.
        name: of the SAE's section.
    """
    known = json.loads((run.folder(name) / FACTS_FILE).read_text(encoding="utf-8"))
    data = run.config.data
    source = {
        "data": data.dataset or ", ".join(Path(each).name for each in data.name.split(", ")),
        "data configuration": data.config,
        "data split": data.split if data.dataset else None,
        "data commit": data.revision,
    }
    held_out: dict[str, Any] = {}
    if known.get("curve"):
        text = "the first sequences of the data, which were not trained on"
        held_out = {
            "held-out text": Path(data.held_out).name if data.held_out else text,
            "held-out tokens": data.held_out_tokens,
        }
    return CardFacts(
        **{**known, "training": _flat({"preset": run.config.preset, **known["training"], **held_out})},
        datasets=(data.dataset,) if data.dataset else (),
        license=run.config.license,
        license_name=run.config.license_name,
        license_link=run.config.license_link,
        provenance={"trained by": f"hf-gated-sae {__version__}"} | _flat(source),
    )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for a table: nested mappings flattened, unknown values left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}: {key}": each for key, each in _flat(value).items()}
        elif value not in (None, [], ""):
            found[name] = value
    return found
