"""Fixtures: each architecture that can be trained, and small runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_gated_sae.architectures import architectures
from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.training import SAETrainingArguments

SMALL = {
    **{"max_steps": 4, "activation_batch_size": 32, "statistics_activations": 100, "recorded_activations": 100},
    **{"use_cpu": True, "disable_tqdm": True, "warmup_steps": 0, "logging_steps": 2},
}


@pytest.fixture(params=[name for name, model in architectures.items() if model.one_site and model.per_token])
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of an architecture that can be trained."""
    return str(request.param)


@pytest.fixture
def arguments(tmp_path) -> Callable[..., SAETrainingArguments]:
    """Arguments of a short quiet run on the CPU."""

    def make(**changes: Any) -> SAETrainingArguments:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 10,
            "activation_batch_size": 64,
            "learning_rate": 3e-3,
            "warmup_steps": 0,
            "sparsity_warmup_steps": 0,
            "resample_steps": [],
            "logging_steps": 5,
            "statistics_activations": 1000,
            "recorded_activations": 1000,
        }
        return SAETrainingArguments(**{**settings, **changes})

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("\n".join(corpus.texts("training", 40_000)), encoding="utf-8")
    return path


@pytest.fixture
def small(text: Path, tmp_path: Path) -> dict[str, Any]:
    """The settings of a run that takes a second."""
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"name": str(bundled.MODEL), "hub_id": "me/python-lm"},
        "data": {"files": str(text), "context_length": 32, "sequences_per_batch": 4, "buffer_size": 128},
        "sae": {"site": "resid_post.1", "d_sae": 48},
        "training": dict(SMALL),
    }
