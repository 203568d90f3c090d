"""What a run will cost, told before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_gated_sae.demo import bundled
from hf_gated_sae.errors import (
    InputError,
)
from hf_gated_sae.training.memory import in_bytes
from hf_gated_sae.training.run import assemble, estimate, measured
from hf_gated_sae.training.run.estimate import in_time


def test_the_cost_is_measured_on_real_steps(small: dict) -> None:
    found = measured(assemble(small))
    assert found.measured and not Path(small["output_dir"]).exists()
    assert found.parameters == {"": 2 * 48 * 128 + 128 + 3 * 48}
    assert found.buffer == 128 * 128 * 4
    assert found.training.seconds > 0 and found.reading.seconds > 0
    assert found.training.operations == 6 * 32 * 2 * 48 * 128
    layers = sum(each.numel() for each in _model().parameters()) - 1024 * 128
    assert found.reading.operations == pytest.approx(2 * layers * 32 * found.tokens / 32 * 2 / 4), "2 of 4 layers"
    assert found.tokens == pytest.approx(32 * 32 / 31, rel=0.1), "of 32 tokens, the BOS is not learned"
    assert found.steps == 4 and found.batch == 32
    assert 0 < found.activations < 10**7


def test_the_cost_of_an_annealed_run_is_measured(small: dict) -> None:
    small["training"] |= {"max_steps": 20, "sparsity_power_end": 0.5, "sparsity_power_steps": [10, 18]}
    found = measured(assemble(small))
    assert found.steps == 20 and found.training.seconds > 0


def test_the_size_of_a_checkpoint_is_told(small: dict) -> None:
    whole = estimate(assemble(small))
    small["data"]["save_buffer"] = False
    lean = estimate(assemble(small))
    assert whole.checkpoint - lean.checkpoint == whole.buffer == 128 * 128 * 4
    assert lean.checkpoint == 3 * 4 * lean.parameters[""]


def test_the_cost_is_estimated_without_the_weights(small: dict, tmp_path: Path) -> None:
    lean = tmp_path / "lean"
    lean.mkdir()
    (lean / "config.json").write_bytes((bundled.MODEL / "config.json").read_bytes())
    small["model"]["name"] = str(lean)
    small["data"]["files"] = "nowhere.txt"
    found, real = estimate(assemble(small)), sum(each.numel() for each in _model().parameters())
    assert not found.measured
    assert found.parameters == {"": 2 * 48 * 128 + 128 + 3 * 48}
    assert found.model == 4 * real
    small["sae"]["site"] = "mlp_neurons.1"
    with pytest.raises(InputError, match="only the model can tell"):
        estimate(assemble(small))


def _model() -> Any:
    from hf_gated_sae.demo.language_model import load_language_model

    return load_language_model(bundled.MODEL)[0]


def test_numbers_for_people() -> None:
    assert [in_bytes(size) for size in (12, 1_500, 999_600, 12_345_678_900)] == ["12 B", "1.5 kB", "1 MB", "12.3 GB"]
    assert [in_time(time) for time in (0.5, 90, 7200, 259_200)] == ["500.0 ms", "1.5 min", "2.0 h", "3.0 d"]
