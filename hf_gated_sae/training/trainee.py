"""An SAE being trained, with its objective, activation unit, dead latents and their remedy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import CheckpointError, InputError, ShapeError
from ..functional import FidelityAccumulator
from ..functional.cpu import forget
from ..functional.outliers import is_outlier, largest_share
from ..modeling import SAEModel, TrainingLoss
from . import decoder_norm
from .activation_unit import change_unit, require_two_units, unit_tensors
from .annealing import PowerAnnealing
from .arguments import SAETrainingArguments
from .dead_latents import DeadLatents
from .initial_latents import initial_vectors
from .objective_call import build_objective
from .remedies import DeadLatentRemedy, remedies
from .schedules import LearningRateDip, linear_warmup
from .sharding import Grid
from .statistics import ActivationStatistics
from .streams import ActivationStream

_log = logging.getLogger(__name__)

WATCHED = ("l0", "fvu", "relative_reconstruction_bias")
"""Metrics of single batches that are logged, besides the loss terms."""


class Trainee:
    """An SAE being trained: its objective, activation unit, outliers, dead latents and their remedy.

    It shares no state with other SAEs that are trained on the same stream.

    Args:
        name: of the SAE among several; empty for a single SAE.
        sae: on the device that it is trained on.
        args: the run's arguments.
        stream: of its activations.
        grid: the processes that train together; this one alone by default.

    Attributes:
        common: if processes share the SAE, the names of the parameters that are the same in all of them.
        reads: the stream's key of the site that is encoded.
        writes: the stream's key of the site that is reconstructed: the same, unless the SAE is a transcoder.
        objective: the training objective.
        scale_in: factor on the input in training.
        scale_out: factor on the target in training.
        limits: norm limits, in the model's activation unit, of the site read and the site written: activations with a
            larger norm are not trained on; None for no limit.
        left_out: number of outliers that were not trained on, in this process.
        dead: counters of dead latents.
        dip: of the learning rate.
        remedy: for dead latents; None for none.
        annealing: of the sparsity penalty's power.

    Raises:
        InputError: if the SAE cannot be trained, or the arguments contradict each other.
        UnknownNameError: if the stream lacks its site, or the arguments name something unknown.
    """

    def __init__(
        self,
        name: str,
        sae: SAEModel,
        args: SAETrainingArguments,
        stream: ActivationStream,
        grid: Grid | None = None,
    ) -> None:
        require_trainable(sae)
        self.name = name
        self.sae = sae
        self.args = args
        self.grid = grid or Grid()
        self.common = frozenset() if self.grid.latents.alone else type(sae).shared_names(sae.config)
        self.reads = self.writes = stream.key(sae.config.site)
        self.objective = build_objective(sae, args.of_sae("objective", name, {}))
        self.coefficient = float(args.of_sae("sparsity_coefficient", name))
        self.scale_in = self.scale_out = 1.0
        self.limits: tuple[float | None, float | None] = (None, None)
        self.left_out = self._outliers = 0
        self._has_warned = False
        self.special_ids = stream.special_ids
        if sae.config.is_transcoder:
            self.writes = stream.key(sae.config.site_out)
            if self.reads == self.writes:
                raise InputError(
                    f"This {type(sae).__name__} is a transcoder from {sae.config.site} to {sae.config.site_out}, and "
                    "the stream has the same activations for both: give a stream with both sites."
                )
            if args.activation_scale != "none":
                require_two_units(sae)
        self._check()
        self.dead = DeadLatents(sae.config.d_sae, args.dead_after_activations, sae.device, self.grid.data)
        self.dip = LearningRateDip(low=args.lr_dip, steps=args.lr_dip_steps)
        self.remedy: DeadLatentRemedy | None = None
        if args.dead_latent_remedy is not None:
            self.remedy = remedies[args.dead_latent_remedy](args, self.dead, self.dip, self.grid)
        self.annealing = PowerAnnealing(
            args.sparsity_power_end,
            first=args.sparsity_power_steps[0],
            last=args.sparsity_power_steps[1],
            changes=args.sparsity_power_changes,
            batches=args.sparsity_power_batches,
        )

    def _check(self) -> None:
        """Raise for arguments that this SAE cannot be trained with."""
        kind, args = type(self.sae).__name__, self.args
        if not self.sae.homogeneous and args.activation_scale != "none":
            raise InputError(
                f"activation_scale is {args.activation_scale!r}, and a {kind} is not homogeneous: scaling its "
                "activations would change the function that it computes. Pass activation_scale='none'."
            )
        if args.sparsity_power_end != 1 and not self.objective.anneals:
            raise InputError(
                f"sparsity_power_end is {args.sparsity_power_end}, and the sparsity term of a {kind} has no power "
                "that could be annealed: leave it at 1."
            )
        if args.unit_norm_decoder and getattr(self.objective, "weighted_by_decoder_norm", False):
            raise InputError(
                "weighted_by_decoder_norm=True weights latents by their decoder norms, and unit_norm_decoder=True "
                "keeps all of them at 1, so the weights have no effect: choose one of the two."
            )

    # ------------------------------------------------------------------ before and after a run

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Context of training: freezes the parameters that the objective does not train, and restores them at the end.

        The SAE is in evaluation mode afterwards.
        """
        frozen = self.objective.frozen(self.sae)
        parameters = {name: parameter for name, parameter in self.sae.named_parameters() if name in frozen}
        before = {name: parameter.requires_grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self.sae.data_group = None if self.grid.data.alone else self.grid.data
        try:
            yield
        finally:
            self.sae.data_group = None
            for name, parameter in parameters.items():
                parameter.requires_grad_(before[name])
            self.sae.zero_grad()
            forget(self.sae.parameters())
            self.sae.eval()

    def start(self, statistics: Mapping[str, ActivationStatistics]) -> None:
        """Initialise `b_dec` from the activations, change to the activation unit and normalise the decoder.

        Args:
            statistics: of the sites that it reads and writes.

        Raises:
            ShapeError: if the width of the activations differs from the SAE's.
        """
        sae, read, written = self.sae, statistics[self.reads], statistics[self.writes]
        widths = (read.centre.numel(), written.centre.numel())
        if widths != (sae.config.d_in, sae.d_out):
            raise ShapeError(
                f"The stream has activations of width {widths[0]} to read and {widths[1]} to write; this SAE reads "
                f"d_in = {sae.config.d_in} and writes d_out = {sae.d_out}. Expected equal widths."
            )
        if sae.b_dec.requires_grad and not sae.b_dec.any():  # a trained SAE keeps its own
            sae.b_dec.data.copy_(written.centre)
        self._limit(read.norm_limit, written.norm_limit)
        is_new = decoder_norm.have_unit_norm(sae.W_dec)  # checked first: change_unit scales a transcoder's rows
        untrained = {name: each for name, each in self._initial_vectors() if torch.equal(getattr(sae, name), each)}
        self.scale_in = read.scale(self.args.activation_scale)
        self.scale_out = written.scale(self.args.activation_scale)
        change_unit(sae, self.scale_in, self.scale_out)
        for name, initial in untrained.items():  # initial thresholds, like the kernel, are in the unit of training
            getattr(sae, name).data.copy_(initial)
        self.objective.constrain(sae)
        if self.args.unit_norm_decoder and sae.W_dec.requires_grad:
            decoder_norm.normalise_initial(sae.W_dec, expected=is_new)

    def _limit(self, read: float | None, written: float | None) -> None:
        """Set the norm limits for the whole run, and record them and the special tokens with the SAE."""
        config, self.limits = self.sae.config, (read, written)
        config.norm_limit, config.norm_limit_out = read, written if config.is_transcoder else None
        if self.special_ids is not None:
            config.special_token_ids = list(self.special_ids)

    def _initial_vectors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the initial values of the SAE's per-latent vectors, by name."""
        for name, vector in initial_vectors(self.sae).items():
            if vector.ndim == 1:
                yield name, vector.to(getattr(self.sae, name).dtype)

    def leave_unit(self) -> None:
        """Convert the SAE to the model's activation unit."""
        change_unit(self.sae, 1 / self.scale_in, 1 / self.scale_out)
        self.scale_in = self.scale_out = 1.0

    @contextmanager
    def in_model_unit(self) -> Iterator[None]:
        """Context in which the SAE is in the model's activation unit; afterwards its weights are restored exactly."""
        tensors = unit_tensors(self.sae)
        saved = {name: tensor.clone() for name, tensor in tensors.items()}
        change_unit(self.sae, 1 / self.scale_in, 1 / self.scale_out)
        try:
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])

    # ------------------------------------------------------------------ one step

    def batch(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return input ``[n, d_in]`` and target ``[n, d_out]`` of a batch by site, in the activation unit of training.

        Each outlier is replaced by another activation of the batch, so that the batches of all processes have one
        size; by NaN if all are outliers.
        """
        given, written = inputs[self.reads], inputs[self.writes]
        self._outliers = 0
        if self.limits != (None, None):
            outlier = self.outliers(inputs)
            self._outliers = int(outlier.sum())
        if self._outliers:
            rows = _rows_without_outliers(outlier)
            given, written = (
                each[rows] if len(rows) else torch.full_like(each, torch.nan) for each in (given, written)
            )
        x = self._scaled(given, self.scale_in)
        return x, x if self.reads == self.writes else self._scaled(written, self.scale_out)

    def outliers(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return which activations of a batch by site are outliers, which are not trained on, ``[n]`` bool."""
        read, written = self.limits
        found = is_outlier(inputs[self.reads], read)
        return found if self.reads == self.writes else found | is_outlier(inputs[self.writes], written)

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        converted = x.to(self.sae.dtype)
        return converted if scale == 1 else converted * scale

    def loss(self, step: int, x: Tensor, target: Tensor) -> TrainingLoss:
        """Return the objective on a batch, with the terms of the remedy.

        Args:
            step: number of steps done.
            x: input in the activation unit of training.
            target: of the reconstruction.
        """
        warm = linear_warmup(step, self.args.sparsity_warmup_steps)
        loss = self.sae.training_loss(
            x,
            target=target,
            sparsity_coefficient=self.coefficient * warm * self.annealing.factor,
            sparsity_power=self.annealing.power,
            objective=self.objective,
        )
        if self.remedy is None or not (more := self.remedy.terms(self.sae, x, target, loss)):
            return loss
        return replace(loss, total=sum(more.values(), start=loss.total), terms={**loss.terms, **more})

    def observe(self, step: int, x: Tensor, target: Tensor, loss: TrainingLoss) -> None:
        """Update counters, annealing and remedy with a batch that is trained on."""
        self.left_out += self._outliers
        self.dead.update(loss.fired, len(x))
        self.annealing.observe(step, x, target)
        if self.remedy is not None:
            self.remedy.observe(step, x, target)

    def before_step(self) -> None:
        """Adjust the gradients before the optimiser's step."""
        if self.args.unit_norm_decoder:
            decoder_norm.before_step(self.sae.W_dec)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Apply constraints, remedy and annealing after the optimiser's step.

        Args:
            step: number of steps done, this one included.
            optimizer: of the run.
        """
        if self.sae.config.recorded_tokens:
            self.sae.forget_statistics()  # they are those of the previous weights
        if self.args.unit_norm_decoder:
            decoder_norm.after_step(self.sae.W_dec)
        if self.remedy is not None:
            self.remedy.after_step(step, self.sae, optimizer)
        self.objective.constrain(self.sae)
        self.annealing.advance(step, self._penalty, self.grid.data)

    @torch.no_grad()
    def _penalty(self, power: float, x: Tensor, target: Tensor) -> float:
        loss = self.sae.training_loss(
            x, target=target, sparsity_coefficient=1.0, sparsity_power=power, objective=self.objective
        )
        return float(loss.terms["sparsity"])

    def metrics(self, x: Tensor, target: Tensor, loss: TrainingLoss) -> dict[str, float]:
        """Return the metrics to log of one batch, by name, over the batches of all processes together."""
        accumulator = FidelityAccumulator(self.sae.config.d_sae, self.sae.b_dec)
        accumulator.update(target, loss.reconstruction.detach(), loss.latents)
        if not self.grid.data.alone:
            accumulator.pool(self.grid.data.sum, self.grid.data.largest)
        found = accumulator.compute()
        l0 = torch.tensor(found.l0, dtype=torch.float64, device=self.grid.latents.device)
        watched = {name: getattr(found, name) for name in WATCHED}
        terms = self.grid.data.mean_by_name({f"loss_{name}": term.item() for name, term in loss.terms.items()})
        return {**terms, **watched, "l0": float(self.grid.latents.sum(l0)), "dead_latents": self.count_dead()}

    def warn_of_outliers(self, target: Tensor) -> None:
        """Warn, once in a run, if one percent of a batch ``[n, d_out]`` holds most of its variance."""
        if self._has_warned or len(target) < 100 or not (share := largest_share(target)) > 0.5:
            return
        self._has_warned = True
        multiple = self.args.outlier_multiple
        advice = f"a smaller outlier_multiple than {multiple:g}" if multiple else "outlier_multiple=10"
        _log.warning(
            "One percent of the activations of a batch at %s%s hold %.0f%% of its variance: they dominate the loss, "
            "and FVU and gamma do not describe the others. Use %s, which leaves them out.",
            self.writes or "the given site",
            f" (of the SAE {self.name!r})" if self.name else "",
            100 * share,
            advice,
        )

    def count_dead(self) -> int:
        """Return the number of dead latents, over all processes that share the SAE."""
        return int(self.grid.latents.sum(self.dead.mask.sum().to(self.grid.latents.device)))

    def count_left_out(self) -> int:
        """Return the number of outliers that were not trained on, over all processes."""
        return int(self.grid.data.sum(torch.tensor(self.left_out, device=self.grid.data.device)))

    # ------------------------------------------------------------------ disk

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume, besides weights and optimiser."""
        return {
            "scale_in": self.scale_in,
            "scale_out": self.scale_out,
            "unit": unit_tensors(self.sae),
            "limits": self.limits,
            "left_out": self.left_out,
            "silent_for": self.dead.silent_for,
            "dip_since": self.dip.since,
            "annealing": self.annealing.state_dict(),
            "remedy_name": None if self.remedy is None else self.remedy.name,
            "remedy": {} if self.remedy is None else self.remedy.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state; the SAE already holds the saved weights, in the model's activation unit.

        Raises:
            CheckpointError: if the state has another remedy for dead latents.
        """
        if state["remedy_name"] != self.args.dead_latent_remedy:
            raise CheckpointError(
                f"The run was started with dead_latent_remedy={state['remedy_name']!r}, and "
                f"{self.args.dead_latent_remedy!r} was given: resume with the same."
            )
        self.scale_in, self.scale_out = state["scale_in"], state["scale_out"]
        for name, tensor in unit_tensors(self.sae).items():
            # The exact values in the unit of training: converting the saved weights back would round differently.
            tensor.copy_(state["unit"][name])
        self._limit(*state.get("limits", (None, None)))  # older checkpoints have none
        self.left_out = state.get("left_out", 0)
        self.dead.silent_for.copy_(state["silent_for"])
        self.dead.reset()
        self.dip.since = state["dip_since"]
        self.annealing.load_state_dict(state["annealing"], self.sae.device)
        if self.remedy is not None:
            self.remedy.load_state_dict(state["remedy"])


def _rows_without_outliers(outlier: Tensor) -> Tensor:
    """Return indices ``[n]`` int64 that replace outliers ``[n]`` bool by other rows; empty if all are outliers."""
    ordinary = (~outlier).nonzero().squeeze(1)
    if not len(ordinary):
        return ordinary
    rows = torch.arange(len(outlier), device=outlier.device)
    missing = len(outlier) - len(ordinary)
    rows[outlier] = ordinary[torch.arange(missing, device=outlier.device) % len(ordinary)]
    return rows


def require_trainable(sae: SAEModel) -> None:
    """Raise for an SAE that the trainer's objective does not apply to.

    Raises:
        InputError: with the reason.
    """
    config = sae.config
    why = sae.training_obstacle()
    if config.skip_connection and not config.is_transcoder:
        why = "has a skip connection from a site to itself, which learns to copy: set the site_out of a transcoder"
    elif len(config.sites_read) > 1 or not sae.per_token:
        why = "reads several sites, or several tokens, at once, and the stream has single activations"
    if why:
        raise InputError(f"This {type(sae).__name__} cannot be trained by SAETrainer; it {why}.")
