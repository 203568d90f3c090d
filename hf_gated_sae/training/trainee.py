"""One SAE while it is trained."""

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
"""Metrics of single batches that are logged."""


class Trainee:
    """One SAE while it is trained: its objective, its unit, its dead latents, and what is remembered for them.

    Nothing here is shared with other SAEs that are trained on the same stream.

    Args:
        name: of the SAE among several; empty if it is alone.
        sae: on the device that it is trained on.
        args: the run's arguments.
        stream: where its activations come from.
        grid: the processes that train together; this one alone by default.

    Attributes:
        common: names of the parameters that processes which share the SAE hold alike, if it is shared.
        reads: the stream's name of the site that is encoded.
        writes: the stream's name of the site that is reconstructed: the same, unless the SAE is a transcoder.
        objective: what is minimised.
        scale_in: unit of the input while training: activations are multiplied by it.
        scale_out: the same for what is reconstructed.
        limits: the largest norms, in the model's unit, of what is learned: where it reads, and where it writes; None
            for no limit.
        left_out: how many activations were not learned for their norm, in this process.
        dead: which latents are dead.
        dip: of the learning rate.
        remedy: what is done about dead latents, if anything.
        annealing: of the sparsity's power.

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
        self._said = False
        self.special_ids = stream.special_ids
        if sae.config.is_transcoder:
            self.writes = stream.key(sae.config.site_out)
            if self.reads == self.writes:
                raise InputError(
                    f"This {type(sae).__name__} is a transcoder from {sae.config.site} to {sae.config.site_out}, and "
                    "the stream has the same activations for both: give a stream of the two sites."
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
                f"A {kind} computes another function of scaled activations, and activation_scale is "
                f"{args.activation_scale!r}: pass activation_scale='none'."
            )
        if args.sparsity_power_end != 1 and not self.objective.anneals:
            raise InputError(
                f"The sparsity of a {kind} has no power that could be annealed, and sparsity_power_end is "
                f"{args.sparsity_power_end}: leave it at 1."
            )
        if args.unit_norm_decoder and getattr(self.objective, "weighted_by_decoder_norm", False):
            raise InputError(
                "weighted_by_decoder_norm=True is for decoders that are free to grow, and unit_norm_decoder=True "
                "keeps every norm at 1, where the weights mean nothing: choose one of the two."
            )

    # ------------------------------------------------------------------ before and after a run

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Freeze for a while what the objective does not train; afterwards everything is as before, in evaluation."""
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
        """Centre the SAE on the activations, change its unit and normalise its decoder.

        Args:
            statistics: of the sites that it reads and writes.

        Raises:
            ShapeError: if the activations have another width than the SAE.
        """
        sae, read, written = self.sae, statistics[self.reads], statistics[self.writes]
        widths = (read.centre.numel(), written.centre.numel())
        if widths != (sae.config.d_in, sae.d_out):
            raise ShapeError(
                f"The stream gives activations of width {widths[0]}; this SAE reads d_in = {sae.config.d_in} and "
                f"writes d_out = {sae.d_out}, for which it gives a width of {widths[1]}. Expected equal widths."
            )
        if sae.b_dec.requires_grad and not sae.b_dec.any():  # an SAE that was trained before knows its centre
            sae.b_dec.data.copy_(written.centre)
        self._limit(read.norm_limit, written.norm_limit)
        new = decoder_norm.have_unit_norm(sae.W_dec)  # a transcoder's rows change with the units
        untouched = {name: each for name, each in self._vectors() if torch.equal(getattr(sae, name), each)}
        self.scale_in = read.scale(self.args.activation_scale)
        self.scale_out = written.scale(self.args.activation_scale)
        change_unit(sae, self.scale_in, self.scale_out)
        for name, initial in untouched.items():  # a threshold starts, as the kernel around it, in the training's unit
            getattr(sae, name).data.copy_(initial)
        self.objective.constrain(sae)
        if self.args.unit_norm_decoder and sae.W_dec.requires_grad:
            decoder_norm.normalise_first(sae.W_dec, expected=new)

    def _limit(self, read: float | None, written: float | None) -> None:
        """Fix, for the whole run, which activations are learned, and record it with the SAE."""
        config, self.limits = self.sae.config, (read, written)
        config.norm_limit, config.norm_limit_out = read, written if config.is_transcoder else None
        if self.special_ids is not None:
            config.special_token_ids = list(self.special_ids)

    def _vectors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the SAE's per-latent vectors are when it is new."""
        for name, vector in initial_vectors(self.sae).items():
            if vector.ndim == 1:
                yield name, vector.to(getattr(self.sae, name).dtype)

    def leave_unit(self) -> None:
        """Let the SAE read activations as the model produces them."""
        change_unit(self.sae, 1 / self.scale_in, 1 / self.scale_out)
        self.scale_in = self.scale_out = 1.0

    @contextmanager
    def in_model_unit(self) -> Iterator[None]:
        """Put the SAE into the model's unit for a while; afterwards every bit is as before."""
        tensors = unit_tensors(self.sae)
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        change_unit(self.sae, 1 / self.scale_in, 1 / self.scale_out)
        try:
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])

    # ------------------------------------------------------------------ one step

    def batch(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return input and target ``[n, d_in]``, ``[n, d_out]`` in the unit of training, out of a batch by site.

        In the place of each outlier stands another activation of the batch, so that batches of all processes are of
        one size; NaN where there is no other.
        """
        given, written = inputs[self.reads], inputs[self.writes]
        self._outliers = 0
        if self.limits != (None, None):
            outlier = self.outliers(inputs)
            self._outliers = int(outlier.sum())
        if self._outliers:
            rows = _instead_of(outlier)
            given, written = (
                each[rows] if len(rows) else torch.full_like(each, torch.nan) for each in (given, written)
            )
        x = self._scaled(given, self.scale_in)
        return x, x if self.reads == self.writes else self._scaled(written, self.scale_out)

    def outliers(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return which activations of a batch by site are not learned for their norm, ``[n]`` bool."""
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
            x: input in the unit of training.
            target: what is to be written.
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
        """Remember what is needed of a batch that is trained on."""
        self.left_out += self._outliers
        self.dead.update(loss.fired, len(x))
        self.annealing.observe(step, x, target)
        if self.remedy is not None:
            self.remedy.observe(step, x, target)

    def before_step(self) -> None:
        """Act between the gradients and the optimiser."""
        if self.args.unit_norm_decoder:
            decoder_norm.before_step(self.sae.W_dec)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Act after the optimiser.

        Args:
            step: number of steps done, this one included.
            optimizer: of the run.
        """
        if self.sae.config.recorded_tokens:
            self.sae.forget_statistics()  # of the weights that it had
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
        """Return what is worth watching of one batch, by name: of the batches of all processes together."""
        accumulator = FidelityAccumulator(self.sae.config.d_sae, self.sae.b_dec)
        accumulator.update(target, loss.reconstruction.detach(), loss.latents)
        if not self.grid.data.alone:
            accumulator.pool(self.grid.data.sum, self.grid.data.largest)
        found = accumulator.compute()
        l0 = torch.tensor(found.l0, dtype=torch.float64, device=self.grid.latents.device)
        watched = {name: getattr(found, name) for name in WATCHED}
        terms = self.grid.data.numbers({f"loss_{name}": term.item() for name, term in loss.terms.items()})
        return {**terms, **watched, "l0": float(self.grid.latents.sum(l0)), "dead_latents": self.count_dead()}

    def warn_of_few(self, target: Tensor) -> None:
        """Warn, once in a run, if a hundredth of a batch ``[n, d_out]`` holds most of its variance."""
        if self._said or len(target) < 100 or not (share := largest_share(target)) > 0.5:
            return
        self._said = True
        multiple = self.args.outlier_multiple
        advice = f"a smaller outlier_multiple than {multiple:g}" if multiple else "outlier_multiple=10"
        _log.warning(
            "One percent of the activations of a batch at %s%s hold %.0f%% of its variance: the SAE learns little but "
            "these, and FVU and gamma say little about the others. Take %s, which leaves them out.",
            self.writes or "the given site",
            f" (of the SAE {self.name!r})" if self.name else "",
            100 * share,
            advice,
        )

    def count_dead(self) -> int:
        """Return how many latents are dead, of those of all processes that share the SAE."""
        return int(self.grid.latents.sum(self.dead.mask.sum().to(self.grid.latents.device)))

    def count_left_out(self) -> int:
        """Return how many activations were not learned for their norm, of those that all processes have read."""
        return int(self.grid.data.sum(torch.tensor(self.left_out, device=self.grid.data.device)))

    # ------------------------------------------------------------------ disk

    def state_dict(self) -> dict[str, Any]:
        """Return everything beside weights and optimiser that is needed to go on."""
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
        """Go on from a saved state; the SAE holds the weights that were saved, in the model's unit.

        Raises:
            CheckpointError: if there was another remedy for dead latents.
        """
        if state["remedy_name"] != self.args.dead_latent_remedy:
            raise CheckpointError(
                f"The run was started with dead_latent_remedy={state['remedy_name']!r}, and this one has "
                f"{self.args.dead_latent_remedy!r}: resume with the same."
            )
        self.scale_in, self.scale_out = state["scale_in"], state["scale_out"]
        for name, tensor in unit_tensors(self.sae).items():
            # The vectors as they were in training: dividing and multiplying again would not give the same bits.
            tensor.copy_(state["unit"][name])
        self._limit(*state.get("limits", (None, None)))  # there were none in older checkpoints
        self.left_out = state.get("left_out", 0)
        self.dead.silent_for.copy_(state["silent_for"])
        self.dead.reset()
        self.dip.since = state["dip_since"]
        self.annealing.load_state_dict(state["annealing"], self.sae.device)
        if self.remedy is not None:
            self.remedy.load_state_dict(state["remedy"])


def _instead_of(outlier: Tensor) -> Tensor:
    """Return which rows stand in a batch, ``[n]`` int64, given which are outliers; none if all are."""
    ordinary = (~outlier).nonzero().squeeze(1)
    if not len(ordinary):
        return ordinary
    rows = torch.arange(len(outlier), device=outlier.device)
    missing = len(outlier) - len(ordinary)
    rows[outlier] = ordinary[torch.arange(missing, device=outlier.device) % len(ordinary)]
    return rows


def require_trainable(sae: SAEModel) -> None:
    """Raise for an SAE whose objective would not be what it computes afterwards.

    Raises:
        InputError: saying why.
    """
    config = sae.config
    why = sae.training_obstacle()
    if config.skip_connection and not config.is_transcoder:
        why = "has a skip connection from a site to itself, which learns to copy: name the site_out of a transcoder"
    elif len(config.sites_read) > 1 or not sae.per_token:
        why = "reads several sites, or several tokens, at once, and the stream gives single activations"
    if why:
        raise InputError(f"This {type(sae).__name__} cannot be trained here; it {why}.")
