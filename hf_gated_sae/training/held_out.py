"""Measuring SAEs while they are trained, on text that they do not learn."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..evaluation import FidelityReport, evaluate
from ..evaluation.fidelity import require_reconstructing
from ..hooks.token_batches import TokenBatches
from .phases import Phase, Report
from .streams import ActivationStream, HeldBack, ModelActivations
from .streams.tokens import ids_of
from .trainee import Trainee

LOSSES = ("loss_recovered", "loss_clean", "loss_spliced", "loss_zero_ablated")
METRICS = {"fvu": "fvu", "gamma": "relative_reconstruction_bias", "l0": "l0"}
"""What is kept of a measurement, by the name under which it is logged."""
NAMES = (*LOSSES, *METRICS)


@dataclass(frozen=True)
class HeldOut:
    """Text, the model that reads it, and the SAEs that are measured on it.

    Attributes:
        model: the causal LM.
        batches: tokens, which are read again for every measurement.
        trainees: those of the SAEs that can be measured: they write the site that they read.
    """

    model: Any
    batches: TokenBatches
    trainees: tuple[Trainee, ...]

    @classmethod
    def of(
        cls, stream: ActivationStream, trainees: Iterable[Trainee], batches: TokenBatches | None = None
    ) -> HeldOut | None:
        """Return what can be measured in a run; None if nothing can.

        Args:
            stream: where the activations come from.
            trainees: the SAEs.
            batches: held-out tokens; by default those that the stream holds back.

        Raises:
            InputError: if tokens are given, and there is no model or SAE to measure with them.
        """
        own = getattr(stream, "own", stream)  # what this process reads itself, where processes share a stream
        if not isinstance(own, ModelActivations):
            if batches is not None:
                raise InputError(
                    f"Held-out text needs the model that reads it, and {type(own).__name__} has none: leave "
                    "eval_dataset out, and evaluate(model, sae, tokens) afterwards."
                )
            return None
        refused = None
        able = []
        for trainee in trainees:
            try:
                require_measurable(trainee)
                able.append(trainee)
            except InputError as error:
                refused = error
        if batches is None and isinstance(own.tokens, HeldBack) and own.tokens.sequences:
            batches = list(own.tokens.held_out())
        elif batches is not None and not able and refused is not None:
            raise refused
        return None if batches is None or not able else cls(own.model, batches, tuple(able))

    def measure(self, report: Report) -> dict[str, Mapping[str, float]]:
        """Return what was measured of each SAE as it is now, in the unit of the model, by its name.

        Args:
            report: called as the measurement goes on, with numbers of tokens.
        """
        total = len(self.trainees) * sum(ids_of(batch).numel() for batch in self.batches)
        found: dict[str, Mapping[str, float]] = {}
        done = 0

        def progress(tokens: int) -> None:
            report(Phase.HELD_OUT, min(done + tokens, total), total)

        report(Phase.HELD_OUT, 0, total)
        for trainee in self.trainees:
            learning = trainee.sae.training
            with trainee.in_model_unit(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of an SAE that is not trained yet; the curve shows it
                try:
                    measured = evaluate(self.model, trainee.sae.eval(), self.batches, progress=progress)
                finally:
                    trainee.sae.train(learning)
            found[trainee.name] = named(measured)
            done += total // len(self.trainees)
        report(Phase.HELD_OUT, total, total)
        return found


def named(measured: FidelityReport) -> dict[str, float]:
    """Return the numbers of a measurement that are logged."""
    losses = {name: getattr(measured, name) for name in LOSSES}
    return losses | {name: getattr(measured.metrics, metric) for name, metric in METRICS.items()}


def require_measurable(trainee: Trainee) -> None:
    """Raise unless an SAE can be spliced into the model while it is trained.

    Raises:
        InputError: saying why not.
    """
    require_reconstructing(trainee.sae)
    if not trainee.grid.latents.alone:
        raise InputError(
            f"{trainee.grid.latents.count} processes share the SAE, and none of them can splice it alone: measure it "
            "after the run, with evaluate(model, sae, tokens)."
        )
