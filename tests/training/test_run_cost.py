"""The cost of a run, measured or estimated before it starts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_gated_sae.demo import bundled
from hf_gated_sae.errors import (
    InputError,
)
from hf_gated_sae.training.memory import in_bytes
from hf_gated_sae.training.phases import Phase, PhaseCallback
from hf_gated_sae.training.run import Run, assemble, estimate, measured, tokens_read
from hf_gated_sae.training.run.estimate import in_time
from hf_gated_sae.training.run.tokens_read import TRAIN

pytestmark = pytest.mark.slow


def test_the_cost_is_measured_on_real_steps(small: dict) -> None:
    found = measured(assemble(small))
    assert found.measured and not Path(small["output_dir"]).exists()
    assert found.parameters == {"": 2 * 48 * 128 + 128 + 3 * 48}
    assert found.buffer == 128 * 128 * 4
    assert found.training.seconds > 0 and found.reading.seconds > 0
    assert found.training.operations == 6 * 32 * 2 * 48 * 128
    layers = sum(each.numel() for each in _model().parameters()) - 1024 * 128
    assert found.reading.operations == pytest.approx(2 * layers * 2 / 4), "2 of 4 layers"
    assert found.time == pytest.approx(sum(found.seconds.values())) and min(found.seconds.values()) > 0
    assert found.steps == 4 and found.batch == 32
    assert 0 < found.activations < 10**7


RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "short": {"data": {"buffer_size": None, "sequences_per_batch": None}, "training": {"max_steps": 20}},
    "several epochs": {"data": {}, "training": {"max_steps": 150, "activation_batch_size": 64}},
    "not packed": {"data": {"packing": False}, "training": {"max_steps": 12, "gradient_accumulation_steps": 2}},
    "nothing but steps": {"data": {"held_out_tokens": 0}, "training": {"recorded_activations": 0, "evaluations": 0}},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_token_of_a_run_is_counted(small: dict, name: str) -> None:
    for section, changes in RUNS[name].items():
        small[section] |= changes
    small["saes"] = {"one": {}, "two": {"architecture": "standard"}}
    predicted = measured(assemble(small)).tokens
    run = Run.prepare(assemble(small))
    seen = Seen(run.parts.model)
    run.train([seen], quiet=True)
    assert predicted.exact and predicted.total == seen.total > 0
    assert predicted.by_phase == {name: seen.by_phase.get(name, 0) for name in predicted.by_phase}


class Seen(PhaseCallback):
    """Counts the tokens that the model reads, in each phase."""

    def __init__(self, model: Any) -> None:
        self.total, self.by_phase, self._phase = 0, Counter[str](), ""
        model.get_input_embeddings().register_forward_pre_hook(self._note)

    def _note(self, module: Any, inputs: Any) -> None:
        self.total += inputs[0].numel()
        self.by_phase[self._phase] += inputs[0].numel()

    def on_phase(self, phase: Phase, done: int, total: int) -> None:
        if phase in (Phase.SCALE, Phase.HELD_OUT, Phase.RECORD):
            self._phase = phase

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._phase = Phase.FILL

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._phase = TRAIN

    on_evaluate = on_step_begin


def test_tokens_of_a_long_run_are_extrapolated_from_a_part(small: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    small["training"]["max_steps"] = 400
    whole = measured(assemble(small)).tokens
    monkeypatch.setattr(tokens_read, "MOST_SECONDS", 0.0)
    part = measured(assemble(small)).tokens
    assert whole.exact and not part.exact
    assert part.total == pytest.approx(whole.total, rel=0.05)


def test_the_cost_of_an_annealed_run_is_measured(small: dict) -> None:
    small["training"] |= {"max_steps": 20, "sparsity_power_end": 0.5, "sparsity_power_steps": [10, 18]}
    found = measured(assemble(small))
    assert found.steps == 20 and found.training.seconds > 0


def test_the_size_of_a_checkpoint_is_estimated(small: dict) -> None:
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
    with pytest.raises(InputError, match="known only once the model is loaded"):
        estimate(assemble(small))


def _model() -> Any:
    from hub_scripts.demo_assets.language_model import load_language_model

    return load_language_model(bundled.MODEL)[0]


def test_numbers_for_people() -> None:
    assert [in_bytes(size) for size in (12, 1_500, 999_600, 12_345_678_900)] == ["12 B", "1.5 kB", "1 MB", "12.3 GB"]
    assert [in_time(time) for time in (0.5, 90, 7200, 259_200)] == ["500.0 ms", "1.5 min", "2.0 h", "3.0 d"]
