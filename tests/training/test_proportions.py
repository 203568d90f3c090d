"""How many activations a run reads besides those it learns from, by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_gated_sae.errors import InputError
from hf_gated_sae.training import SAETrainingArguments
from hf_gated_sae.training.proportions import BUFFER, RECORDED, STATISTICS, buffer_size, sequences_per_batch
from hf_gated_sae.training.run import Run, assemble
from hf_gated_sae.training.run.run import write_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("steps", [200, 500, 2_000, 300_000])
@pytest.mark.parametrize("batch", [512, 1024, 4096])
def test_at_most_a_fifth_of_what_a_run_reads_is_not_learned(steps: int, batch: int) -> None:
    learned = steps * batch
    beside = buffer_size(learned, batch) + STATISTICS.of(learned) + RECORDED.of(learned)
    assert beside / (learned + beside) <= 0.2
    assert sequences_per_batch(learned, 1024) * 1024 <= max(0.05 * learned, 1024)


def test_defaults_of_a_run_as_long_as_the_papers() -> None:
    learned = 300_000 * 4096
    assert (buffer_size(learned, 4096), sequences_per_batch(learned, 1024)) == (1_000_000, 32)
    assert (STATISTICS.of(learned), RECORDED.of(learned)) == (65_536, 131_072)


def test_the_buffer_holds_at_least_two_batches() -> None:
    assert buffer_size(10 * 4096, 4096) == 2 * 4096 and BUFFER.of(10) == 1


def test_given_numbers_are_kept(tmp_path: Path) -> None:
    given = {"statistics_activations": 7, "recorded_activations": 0}
    args = SAETrainingArguments(str(tmp_path), use_cpu=True, max_steps=200, **given)
    assert (args.statistics_activations, args.recorded_activations) == (7, 0)


def test_a_run_records_its_defaults_and_resumes_with_them(small: dict[str, Any], tmp_path: Path) -> None:
    for name in ("buffer_size", "sequences_per_batch"):
        del small["data"][name]
    del small["training"]["statistics_activations"]
    small["training"] |= {"max_steps": 100, "save_strategy": "steps", "save_steps": 50}
    run = Run.prepare(assemble(small))
    run.train(quiet=True)
    written = yaml.safe_load((Path(small["output_dir"]) / "run.yaml").read_text())["data"]
    assert (written["buffer_size"], written["sequences_per_batch"], written["held_out_tokens"]) == (320, 4, 1024)
    small["training"]["max_steps"] = 400  # for which the defaults would differ
    longer = Run.prepare(assemble(small), resume=True)
    assert longer.parts.stream.buffer_size == 320 and longer.config.data.held_out_tokens == 1024
    longer.train(quiet=True)
    small["data"]["buffer_size"] = 640
    with pytest.raises(InputError, match="data.buffer_size: 320, but 640 was given"):
        Run.prepare(assemble(small), resume=True)


def test_a_run_of_an_older_version_resumes_without_held_out_text(small: dict[str, Any]) -> None:
    small["data"]["held_out_tokens"] = 0
    small["training"] |= {"save_strategy": "steps", "save_steps": 2, "dead_latent_remedy": None}
    run = Run.prepare(assemble(small))
    run.train(quiet=True)
    path = write_run(run.config)
    old = yaml.safe_load(path.read_text())
    del old["data"]["held_out_tokens"]
    path.write_text(yaml.safe_dump(old))
    del small["data"]["held_out_tokens"]
    small["training"]["max_steps"] = 8
    resumed = Run.prepare(assemble(small), resume=True)
    resumed.train(quiet=True)
    assert resumed.config.data.held_out_tokens == 0
