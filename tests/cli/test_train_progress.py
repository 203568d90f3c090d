"""Progress of a run, in a terminal and in a file."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hf_gated_sae.cli.training.live_progress import LiveProgress
from hf_gated_sae.cli.training.pace import Pace
from hf_gated_sae.training.phases import Phase, counted


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def run(steps: int, batch: int, size: int, *, step: float, row: float) -> list[tuple[float, float]]:
    """Return the predicted and the actual time left after each step of a run."""
    clock = Clock()
    pace, held, foreseen = Pace(clock), 0, []
    for number in range(1, steps + 1):
        if held - batch < (size // 2 if number > 1 else 1):
            pace.filling(held, size)
            clock.time += (size - held) * row
            held = size
            pace.filling(held, size)
        pace.step_begins()
        clock.time += step
        held -= batch
        pace.step_ends(batch)
        foreseen.append((clock.time, pace.left(steps - number, batch) or 0.0))
    return [(left, clock.time - when) for when, left in foreseen]


@pytest.mark.parametrize(("step", "row"), [(1.0, 0.0), (0.5, 0.01), (0.01, 0.01)])
def test_the_time_left_is_right_from_the_first_step(step: float, row: float) -> None:
    for foreseen, left in run(200, 16, 320, step=step, row=row):
        assert foreseen == pytest.approx(left, rel=0.1, abs=160 * row + step)


def test_pending_measurements_count() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.left(10, 4) is None
    pace.step_begins()
    clock.time += 2
    pace.step_ends(4)
    pace.paused(30)
    assert pace.left(5, 4, pauses=2) == 70


ARGS = SimpleNamespace(activation_batch_size=16, gradient_accumulation_steps=1, evaluation_steps={2})


def shown(console: Console) -> str:
    with LiveProgress(console) as progress:
        state = SimpleNamespace(global_step=0, max_steps=2)
        list(counted(({"": [0] * 50} for _ in range(2)), progress.on_phase, Phase.SCALE, 100))
        for number in range(1, 3):
            progress.on_phase(Phase.FILL, 0, 64)
            progress.on_phase(Phase.FILL, 64, 64)
            progress.on_step_begin(ARGS, state, None)
            state.global_step = number
            progress.on_step_end(ARGS, state, None)
            progress.on_log(ARGS, state, None, {"loss": 1.0, "l0": 31.0, "fvu": 0.25})
        progress.on_phase(Phase.HELD_OUT, 0, 32)
        progress.on_phase(Phase.HELD_OUT, 32, 32)
        progress.on_log(ARGS, state, None, {"eval_loss_recovered": 0.9, "eval_fvu": 0.5, "eval_l0": 30.0})
        progress.on_phase(Phase.RECORD, 0, 10)
        progress.on_phase(Phase.RECORD, 10, 10)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_file_has_a_line_for_each_phase_and_each_log() -> None:
    lines = shown(Console(file=io.StringIO(), width=80)).splitlines()
    assert lines == [
        "measuring the scale: 100 activations",
        "measuring the scale: 100 activations, took 0:00:00",
        "filling the buffer: 64 activations",
        "filling the buffer: 64 activations, took 0:00:00",
        "step 1: loss 1, L0 31, FVU 0.25 (0:00:00 left)",
        "step 2: loss 1, L0 31, FVU 0.25 (0:00:00 left)",
        "measuring held-out text: 32 tokens",
        "measuring held-out text: 32 tokens, took 0:00:00",
        "step 2 held-out: loss recovered 0.9, FVU 0.5, L0 30",
        "recording latents: 10 activations",
        "recording latents: 10 activations, took 0:00:00",
    ]


def test_a_terminal_ends_with_every_phase_and_the_latest_numbers() -> None:
    console = Console(file=io.StringIO(), width=80, height=40, force_terminal=True, legacy_windows=False)
    last = shown(console).split("\x1b[2K")[-1]
    for phrase in ("measuring the scale", "training", "recording latents", "2/2", "held-out text, step 2", "0.9"):
        assert phrase in shown(console), phrase
    assert "measuring held-out text" not in last


def test_a_phase_ends_even_if_there_was_less_than_expected() -> None:
    seen: list[Any] = []
    list(counted([{"": [0] * 5}], lambda *each: seen.append(each), Phase.RECORD, 10))
    assert seen[-1] == (Phase.RECORD, 10, 10) and seen[0] == (Phase.RECORD, 0, 10)
