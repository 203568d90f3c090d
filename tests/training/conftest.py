"""Every architecture, and the arguments of a small run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hf_gated_sae.architectures import architectures
from hf_gated_sae.training import SAETrainingArguments


@pytest.fixture(
    params=[name for name, model in architectures.items() if model.one_site and model.per_token]  # what can be trained
)
def architecture(request: pytest.FixtureRequest) -> str:
    """Every architecture in the registry by name."""
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
