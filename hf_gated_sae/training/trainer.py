"""`SAETrainer`, transformers' `Trainer` for SAEs on streams of activations."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..errors import CheckpointError, InputError, SAEError, TrainingError, reason
from ..functional import FidelityMetrics
from ..hooks.token_batches import TokenBatches
from ..modeling import SAEModel, TrainingLoss
from ..upstream.trainer_private import require_trainer
from . import checkpoints
from .arguments import SAETrainingArguments
from .gradients import SAEGradients
from .group import SAEGroup
from .held_out import HeldOut
from .memory import TrainingMemory, available_memory, is_out_of_memory
from .objective_call import called_through
from .phases import Phase, PhaseCallback, counted
from .processes import require_launched
from .progress_bar import TrainingProgress
from .recording import record_activations
from .resumable import Resumable
from .run_facts import write_training_facts
from .schedules import LearningRateDip
from .sharding import Grid, own_part
from .statistics import measure
from .streams import ActivationStream, TensorActivations
from .trainee import Trainee

Batch = tuple[Tensor, Tensor]
"""Input ``[n, d_in]`` and target ``[n, d_out]`` of one SAE, in the activation unit of training."""


class SAETrainer(SAEGradients, Resumable):
    """Trains SAEs of any architecture on activations.

    During `train`, an SAE and its input are in another activation unit (`activation_scale`). Before and after, and in
    checkpoints, the SAE reads the model's activations as they are.

    Several SAEs are trained on the same batches, each exactly as if it were trained alone.

    Args:
        model: the SAE, or several by name.
        args: the training arguments.
        train_dataset: a stream of activations; a tensor ``[n, d_in]`` is read as `TensorActivations`.
        callbacks: further callbacks, called after the trainer's own.
        eval_dataset: batches of held-out tokens, on which the SAEs are evaluated `evaluations` times during the run;
            by default those that the stream's tokens hold back, see `HeldBack`.
        grid: the arrangement of the processes, if it was already made to create the SAEs.

    Attributes:
        trainees: the SAEs being trained, with their training state, by name; a single SAE has the name "".
        stream: of activations; with several processes, the part of this one.

    Raises:
        InputError: if an SAE normalises its input, or holds only some of its latents, or if arguments contradict each
            other.
        UnknownNameError: if the stream lacks an SAE's site, or arguments name something unknown.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D.
    """

    def __init__(
        self,
        model: SAEModel | Mapping[str, SAEModel],
        args: SAETrainingArguments,
        train_dataset: ActivationStream | Tensor,
        callbacks: list[TrainerCallback] | None = None,
        eval_dataset: TokenBatches | None = None,
        *,
        grid: Grid | None = None,
    ) -> None:
        stream = (
            TensorActivations(train_dataset, seed=args.seed) if isinstance(train_dataset, Tensor) else train_dataset
        )
        require_launched(args)
        self.grid = grid or Grid.arrange(args.latent_parallel, stream, args.device.type)
        if self.grid.latents.count != args.latent_parallel:
            raise InputError(
                f"The grid lets {self.grid.latents.count} processes share an SAE, and latent_parallel is "
                f"{args.latent_parallel}: arrange it with the same number."
            )
        self.stream = self.grid.part(stream)
        activations = args.max_steps * args.activation_batch_size * args.gradient_accumulation_steps
        self.stream.size_for(activations, args.activation_batch_size)
        given = {"": model} if isinstance(model, SAEModel) else dict(model)
        args.require_saes(given)
        saes = {name: own_part(sae, self.grid.latents, args.dead_latent_remedy) for name, sae in given.items()}
        module: Any = saes[""] if isinstance(model, SAEModel) else SAEGroup(saes)
        # Buffers are the same in all processes, and DDP would send them at every step.
        module._ddp_params_and_buffers_to_ignore = [name for name, _ in module.named_buffers()]
        if not self.grid.latents.alone:
            module._is_accelerate_prepared = True  # prevents wrapping: DDP would give all parts the same weights
        self.trainees = {name: Trainee(name, sae, args, stream, self.grid) for name, sae in saes.items()}
        self.held_out = HeldOut.of(self.stream, self.trainees.values(), eval_dataset)
        self._logged: dict[str, tuple[Batch, TrainingLoss]] | None = None
        self._inputs: dict[str, Tensor] = {}
        self._loss_sum: Tensor | None = None
        require_trainer(Trainer)
        super().__init__(
            model=module,
            args=args,
            train_dataset=_Batches(self.stream, args),
            callbacks=[_Steps(self), *(callbacks or [])],
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TrainingProgress)
        self._require_bare()
        self.loss_is_scaled_for_ga = False  # the loss is a mean over the batch
        # On several GPUs without torchrun, transformers would split every batch and copy the SAE at every step.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        for name, sae in saes.items():
            dead = self.trainees[name].dead
            dead.silent_for = dead.silent_for.to(sae.device)  # where transformers has put the SAE
            if hasattr(sae.config, "use_cache"):
                del sae.config.use_cache  # set by transformers on every model; means nothing to an SAE
            self._broadcast_weights(sae)

    def _require_bare(self) -> None:
        """Raise if accelerate, through its own configuration, would wrap the SAEs in anything but DDP.

        Raises:
            InputError: with what to use instead.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "SAETrainer does not support fsdp or deepspeed: pass latent_parallel=, which splits the SAEs' latents "
                "over processes. hf_gated_sae/training/README.md shows when to use it, and a training loop with FSDP2."
            )
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:  # it bypasses the averaging of gradients
            raise InputError(
                "SAETrainer does not support compilation by accelerate: launch without --dynamo_backend, or remove "
                "dynamo_config from the configuration that `accelerate config` wrote."
            )

    def _broadcast_weights(self, sae: SAEModel) -> None:
        """Copy the first process's weights to all others, which may have created their own SAE."""
        held = sae.state_dict()
        self.grid.data.broadcast(held.values())
        if not self.grid.latents.alone:
            self.grid.latents.broadcast(held[name] for name in sorted(type(sae).shared_names(sae.config)))

    # ------------------------------------------------------------------ the run

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; afterwards the SAEs are in the model's activation unit and hold the statistics of their latents.

        ``output_dir`` then holds the SAEs, ``training_args.json`` and ``training_facts.json``.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one; training then continues bit
                for bit as if it had not been interrupted.
            *args: as for `transformers.Trainer.train`.
            **kwargs: as for `transformers.Trainer.train`.

        Returns:
            Steps, mean loss and transformers' metrics.

        Raises:
            CheckpointError: if the checkpoint is broken, or one could not be written.
            InputError: if the activations are not finite, or there are none.
            MissingFileError: if there is no checkpoint to resume from.
            ShapeError: if the width of the activations differs from the SAE's.
            TrainingError: if loss or gradients are no longer finite, naming the first such value; or if memory is
                insufficient, with settings that would fit.
        """
        self._require_shared_disk(resumes=bool(resume_from_checkpoint))
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        if checkpoint is None and self.state.global_step:
            raise InputError(
                "This trainer has trained already, and its optimiser, schedules and counters keep their final state: "
                "create a new trainer, or pass resume_from_checkpoint=."
            )
        if self.args.should_save:
            checkpoints.remove_unfinished(Path(self.args.output_dir))
        saes = [trainee.sae for trainee in self.trainees.values()]
        with ExitStack() as stack:
            for trainee in self.trainees.values():
                stack.enter_context(trainee.learning())
                stack.callback(trainee.leave_unit)
            stack.callback(self._release_batch)
            try:
                if checkpoint is None:
                    self._start()
                self._since = time.monotonic()
                self.stream.report = self._report
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                advice = TrainingMemory.of(saes).advice(
                    self.args.activation_batch_size, available_memory(self.args.device)
                )
                raise TrainingError(f"Memory ran out at step {self.state.global_step}. {advice}") from error
        self._finish()
        return output

    def _report(self, phase: Phase, done: int, total: int) -> None:
        """Report the progress of a phase to the callbacks that accept it."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PhaseCallback) and self.is_world_process_zero():
                callback.on_phase(phase, done, total)

    def _start(self) -> None:
        """Measure the activations and prepare the SAEs with the statistics."""
        sites = {site for trainee in self.trainees.values() for site in (trainee.reads, trainee.writes)}
        pieces: dict[str, list[Tensor]] = {site: [] for site in sites}
        count = self.args.statistics_activations or 1
        for piece in counted(self.stream.sample(count), self._report, Phase.SCALE, count):
            for site in sites:
                pieces[site].append(piece[site])
        settings: dict[str, Any] = {
            "centre": self.args.initial_b_dec,
            "outlier_multiple": self.args.outlier_multiple,
        }
        statistics = {site: measure(pieces.pop(site), **settings) for site in sites}
        for trainee in self.trainees.values():
            trainee.start(statistics)

    def _finish(self) -> None:
        """Record the activations of the trained SAEs, and write the results into the run's folder.

        Raises:
            CheckpointError: if the folder cannot be written.
            TrainingError: if activations cannot be recorded; the SAEs are written without them.
        """
        trainees, count = list(self.trainees.values()), self.args.recorded_activations
        folder, dead = Path(self.args.output_dir), [trainee.count_dead() for trainee in trainees]
        left_out = [trainee.count_left_out() for trainee in trainees]
        metrics: list[FidelityMetrics] | None = None
        unrecorded: BaseException | None = None
        try:
            if count:
                sample = counted(self.stream.sample(count), self._report, Phase.RECORD, count)
                metrics = record_activations(trainees, sample)
        except (SAEError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
            if not isinstance(error, SAEError) and not self.grid.everyone.alone:
                raise  # the other processes wait and cannot learn of it
            unrecorded = error

        def explained(error: Exception) -> CheckpointError:
            return CheckpointError(
                f"Training has finished, but its result could not be written to {folder} ({reason(error)}). It is "
                "still in memory: free disk space, and call save_model(), or save_pretrained() of the SAE."
            )

        with self.grid.everyone.raising_together(explained):
            self.save_model()
            if self.args.should_save:
                write_training_facts(folder, trainees, dead, left_out, self.state, self.args, self._seconds, metrics)
        if isinstance(unrecorded, KeyboardInterrupt):
            raise unrecorded
        if unrecorded is not None:
            raise TrainingError(
                f"Training has finished and its result is in {folder}, but the latents' maximum (the unit of "
                f"steering) and mean activations could not be recorded ({unrecorded}). evaluate(model, sae, tokens, "
                "record=True) records them, and save_pretrained() stores them."
            ) from unrecorded

    def _release_batch(self) -> None:
        """Release the latest batch and its losses."""
        self._seconds, self._since = self.seconds, 0.0
        self._logged, self._loss_sum = None, None
        self._inputs, self.stream.report = {}, None
        for trainee in self.trainees.values():
            trainee.dead.reset()

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum of the SAEs' objectives on one batch.

        Args:
            model: the module that is trained, possibly wrapped.
            inputs: ``[n, d]`` by site, in the model's activation unit.
            return_outputs: also return the `TrainingLoss` of each SAE by name.
            num_items_in_batch: not used: the objective is a mean over the batch.
        """
        step = self.state.global_step
        batches = {name: trainee.batch(inputs) for name, trainee in self.trainees.items()}

        def objectives(batches: dict[str, Batch]) -> dict[str, dict[str, Any]]:
            return {name: vars(trainee.loss(step, *batches[name])) for name, trainee in self.trainees.items()}

        module = self.model if model is self.model else self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            found = called_through(model, module, objectives, batches)
        losses = {name: TrainingLoss(**loss) for name, loss in found.items()}
        for name, trainee in self.trainees.items():
            trainee.observe(step, *batches[name], losses[name])
        if self._is_logged(step + 1):
            self._logged = {name: (batches[name], losses[name]) for name in losses}
        totals = [loss.total for loss in losses.values()]
        total = sum(totals[1:], start=totals[0])
        self._inputs = inputs
        self._loss_sum = total.detach() if self._loss_sum is None else self._loss_sum + total.detach()
        return (total, losses) if return_outputs else total

    # ------------------------------------------------------------------ logging and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding the loss terms and metrics of each SAE on the latest batch; under its name, if it has one."""
        if self._logged is not None and "loss" in logs:
            for name, (batch, loss) in self._logged.items():
                metrics = self.trainees[name].metrics(*batch, loss)
                if self.state.is_world_process_zero:
                    self.trainees[name].warn_of_outliers(batch[1])
                terms = [value for key, value in metrics.items() if key.startswith("loss_")]
                logs |= {f"{name}/loss": sum(terms)} if name else {}  # transformers logs the sum over all SAEs
                logs |= {f"{name}/{key}" if name else key: value for key, value in metrics.items()}
            self._logged = None
        # A stream has no epochs: log the share of the steps that is done.
        self.state.epoch = self.state.global_step / (self.state.max_steps or self.args.max_steps)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the SAEs with their current weights on held-out text, and log the metrics.

        Args:
            eval_dataset: batches of tokens; by default the trainer's, or those that its stream holds back.
            ignore_keys: not used.
            metric_key_prefix: of the names of the metrics.

        Returns:
            Loss recovered, the three losses that it is computed from, FVU, gamma and L0 of each SAE; with several
            SAEs, under their names.

        Raises:
            InputError: if there is no held-out text, or none of the SAEs can be evaluated.
        """
        trainees = self.trainees.values()
        held_out = self.held_out if eval_dataset is None else HeldOut.of(self.stream, trainees, eval_dataset)
        if held_out is None:
            raise InputError("There is no held-out text to evaluate on: pass eval_dataset=, batches of its tokens.")
        metrics: dict[str, float] = {}
        with self.grid.everyone.raising_together(
            lambda error: TrainingError(f"The evaluation on held-out text failed: {error}")
        ):
            found = held_out.measure(self._report)
        for name, values in found.items():
            lead = f"{metric_key_prefix}_{name}/" if name else f"{metric_key_prefix}_"
            metrics |= {f"{lead}{key}": value for key, value in self.grid.data.mean_by_name(values).items()}
        self.log(dict(metrics))
        control: TrainerControl = self.control  # type: ignore[has-type]  # declared in a method of Trainer
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a forward and backward pass: 6 per activation and weight."""
        saes = [trainee.sae for trainee in self.trainees.values()]
        return 6 * len(next(iter(inputs.values()))) * sum(sae.W_enc.numel() + sae.W_dec.numel() for sae in saes)

    # ------------------------------------------------------------------ data, optimiser and schedule

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return a loader that passes whole batches through.

        It is not prepared by accelerate, as every process already has its own stream.
        """
        # Without its own generator it would draw from the global one, which a resumed run has just restored.
        own = torch.Generator()
        return DataLoader(
            _Batches(self.stream, self.args), batch_size=None, num_workers=0, pin_memory=False, generator=own
        )

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Return the optimiser, with one group of parameters for each SAE."""
        if self.optimizer is None:
            groups = [
                {
                    "params": [p for p in trainee.sae.parameters() if p.requires_grad],
                    "weight_decay": self.args.weight_decay,
                }
                for trainee in self.trainees.values()
            ]
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Return transformers' schedule, multiplied for each SAE by its dip after a resampling."""
        if self.lr_scheduler is None:
            # Only schedules that follow a metric have another class, and transformers refuses them without one.
            scheduler = cast(LambdaLR, super().create_scheduler(num_training_steps, optimizer))
            dips = [trainee.dip for trainee in self.trainees.values()]
            scheduler.lr_lambdas = [self._dipped(*each) for each in zip(scheduler.lr_lambdas, dips, strict=True)]
            return scheduler
        return self.lr_scheduler

    def _dipped(self, factor: Any, dip: LearningRateDip) -> Any:
        """Return a schedule multiplied by the dip; a plain function, because torch would save an object's attributes.

        The dip counts steps of the run; the schedule counts fewer if some overflowed in float16.
        """
        return lambda scheduled: factor(scheduled) * dip.factor(self.state.global_step + 1)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: transformers would overwrite the SAE's card with its own."""


class _Steps(TrainerCallback):
    """Calls every SAE's hooks before and after the optimiser's steps, and triggers evaluations."""

    def __init__(self, trainer: SAETrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adjust the gradients."""
        for trainee in self.trainer.trainees.values():
            trainee.before_step()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adjust the weights, before the learning rate of the next step is computed."""
        for trainee in self.trainer.trainees.values():
            trainee.after_step(state.global_step + 1, kwargs["optimizer"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request an evaluation if one is scheduled for this step."""
        if self.trainer.held_out is not None and state.global_step in args.evaluation_steps:
            control.should_evaluate = True


class _Batches(IterableDataset[dict[str, Tensor]]):
    """The stream as a data set for `torch.utils.data`; its items are whole batches."""

    def __init__(self, stream: ActivationStream, args: SAETrainingArguments) -> None:
        self.stream = stream
        self.args = args

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.stream.batches(self.args.activation_batch_size))
