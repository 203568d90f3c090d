"""Evaluating SAEs during training, on text that they are not trained on."""

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
"""Metrics of an evaluation by the name under which they are logged."""
NAMES = (*LOSSES, *METRICS)


@dataclass(frozen=True)
class HeldOut:
    """Held-out tokens, the model that reads them, and the SAEs that are evaluated on them.

    Attributes:
        model: the causal LM.
        batches: tokens, read again for every evaluation.
        trainees: the SAEs that can be evaluated: those that write the site that they read.
    """

    model: Any
    batches: TokenBatches
    trainees: tuple[Trainee, ...]

    @classmethod
    def of(
        cls, stream: ActivationStream, trainees: Iterable[Trainee], batches: TokenBatches | None = None
    ) -> HeldOut | None:
        """Return the held-out text of a run; None if there is none, or no SAE can be evaluated on it.

        Args:
            stream: where the activations come from.
            trainees: the SAEs.
            batches: held-out tokens; by default those that the stream holds back.

        Raises:
            InputError: if tokens are given, but the run has no model, or no SAE that can be evaluated.
        """
        own = getattr(stream, "own", stream)  # this process's part, if processes share a stream
        if not isinstance(own, ModelActivations):
            if batches is not None:
                raise InputError(
                    f"Held-out text needs the model that reads it, and {type(own).__name__} has none: omit "
                    "eval_dataset, and call evaluate(model, sae, tokens) after training."
                )
            return None
        refusal = None
        measurable = []
        for trainee in trainees:
            try:
                require_measurable(trainee)
                measurable.append(trainee)
            except InputError as error:
                refusal = error
        if batches is None and isinstance(own.tokens, HeldBack) and own.tokens.sequences:
            batches = list(own.tokens.held_out())
        elif batches is not None and not measurable and refusal is not None:
            raise refusal
        return None if batches is None or not measurable else cls(own.model, batches, tuple(measurable))

    def measure(self, report: Report) -> dict[str, Mapping[str, float]]:
        """Return the metrics of each SAE with its current weights, in the model's activation unit, by its name.

        Args:
            report: called during the evaluation with numbers of tokens.
        """
        total = len(self.trainees) * sum(ids_of(batch).numel() for batch in self.batches)
        found: dict[str, Mapping[str, float]] = {}
        done = 0

        def progress(tokens: int) -> None:
            report(Phase.HELD_OUT, min(done + tokens, total), total)

        report(Phase.HELD_OUT, 0, total)
        for trainee in self.trainees:
            was_training = trainee.sae.training
            with trainee.in_model_unit(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about bad metrics early in training
                try:
                    measured = evaluate(self.model, trainee.sae.eval(), self.batches, progress=progress)
                finally:
                    trainee.sae.train(was_training)
            found[trainee.name] = named(measured)
            done += total // len(self.trainees)
        report(Phase.HELD_OUT, total, total)
        return found


def named(measured: FidelityReport) -> dict[str, float]:
    """Return the metrics of an evaluation that are logged, by name."""
    losses = {name: getattr(measured, name) for name in LOSSES}
    return losses | {name: getattr(measured.metrics, metric) for name, metric in METRICS.items()}


def require_measurable(trainee: Trainee) -> None:
    """Raise unless an SAE can be spliced into the model during training.

    Raises:
        InputError: with the reason.
    """
    require_reconstructing(trainee.sae)
    if not trainee.grid.latents.alone:
        raise InputError(
            f"{trainee.grid.latents.count} processes share the SAE, so none of them can splice it alone: call "
            "evaluate(model, sae, tokens) after the run."
        )
