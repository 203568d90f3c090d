"""transformers' `Trainer` for SAEs: a stream of activations instead of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..errors import InputError, ShapeError
from ..functional import FidelityAccumulator
from ..modeling import SAEModel, TrainingLoss
from .arguments import SAETrainingArguments
from .dead_latents import DeadLatents
from .decoder_norm import UnitNormDecoder
from .objective import training_loss
from .recording import record_activations
from .remedies import DeadLatentRemedy, remedies
from .schedules import LearningRateDip, linear_warmup
from .statistics import ActivationStatistics, measure
from .streams import ActivationStream, TensorActivations
from .units import change_unit, unit_tensors

_UNIT_FILE = "training_units.safetensors"
_ARGUMENTS_FILE = "training_args.json"


class SAETrainer(Trainer):
    """Trains an SAE of any architecture on activations.

    Outside of `train` the SAE always reads activations as the model produces them; only during training are it and its
    input in another unit (`activation_scale`). Checkpoints hold the SAE in the model's unit as well.

    Args:
        model: the SAE.
        args: the recipe.
        train_dataset: where activations come from; a tensor ``[n, d_in]`` is read as `TensorActivations`.
        callbacks: further callbacks, called after our own.

    Raises:
        InputError: if the SAE is a transcoder, normalises its input, or holds only some of its latents.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D.
    """

    args: SAETrainingArguments
    model: SAEModel

    def __init__(
        self,
        model: SAEModel,
        args: SAETrainingArguments,
        train_dataset: ActivationStream | Tensor,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        _require_trainable(model)
        if not model.homogeneous and args.activation_scale != "none":
            raise InputError(
                f"A {type(model).__name__} computes another function of scaled activations, and activation_scale is "
                f"{args.activation_scale!r}: pass activation_scale='none'."
            )
        stream = (
            TensorActivations(train_dataset, seed=args.seed) if isinstance(train_dataset, Tensor) else train_dataset
        )
        self.stream = stream
        self.input_scale = 1.0
        self.dead = DeadLatents(model.config.d_sae, args.dead_after_activations)
        self.dip = LearningRateDip(low=args.lr_dip, steps=args.lr_dip_steps)
        self.remedy: DeadLatentRemedy | None = None
        own: list[TrainerCallback] = [UnitNormDecoder()] if args.unit_norm_decoder else []
        if args.dead_latent_remedy is not None:
            self.remedy = remedies[args.dead_latent_remedy](args, self.dead, self.dip)
            own.append(self.remedy)
        self._logged: tuple[Tensor, TrainingLoss] | None = None
        super().__init__(
            model=model, args=args, train_dataset=_Batches(stream, args), callbacks=own + (callbacks or [])
        )
        self.loss_is_scaled_for_ga = False  # the loss is a mean over the batch
        # On several GPUs without torchrun, transformers would split every batch and copy the SAE at every step.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        self.dead.silent_for = self.dead.silent_for.to(model.device)
        if hasattr(model.config, "use_cache"):
            del model.config.use_cache  # set by transformers on every model; means nothing to an SAE

    # ------------------------------------------------------------------ the run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; afterwards the SAE reads the model's own activations and has its activations recorded.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the latest one.
            *args: as for `transformers.Trainer.train`.
            **kwargs: as for `transformers.Trainer.train`.

        Returns:
            Steps, mean loss and transformers' metrics.

        Raises:
            InputError: if the activations are not finite, or there are none.
            ShapeError: if they are not `d_in` wide.
        """
        self._start()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            change_unit(self.model, 1 / self.input_scale)
            self.input_scale = 1.0
            self._logged = None
            self.model.eval()
        if self.args.recorded_activations:
            record_activations(self.model, self.stream.sample(self.args.recorded_activations))
        return output

    def _start(self) -> None:
        """Measure the activations, centre the SAE on them and change its unit."""
        sample = self.stream.sample(self.args.statistics_activations)
        statistics = measure(sample, centre=self.args.initial_b_dec)
        if statistics.centre.shape != self.model.b_dec.shape or self.model.config.d_in != self.model.d_out:
            raise ShapeError(
                f"The stream gives activations of width {statistics.centre.numel()}; this SAE reads d_in = "
                f"{self.model.config.d_in} and writes d_out = {self.model.d_out}. Expected three equal widths."
            )
        if not self.model.b_dec.any():  # an SAE that was trained before knows its centre
            self.model.b_dec.data.copy_(statistics.centre)
        self.input_scale = _scale(statistics, self.args.activation_scale, self.model.config.d_in)
        change_unit(self.model, self.input_scale)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the architecture's objective on one batch.

        Args:
            model: the SAE, possibly wrapped.
            inputs: ``{"x": [n, d_in]}`` as the model produces them.
            return_outputs: also return the `TrainingLoss`.
            num_items_in_batch: not used: the objective is a mean over the batch.
        """
        sae = self.model if model is self.model else self.accelerator.unwrap_model(model)
        x = inputs["x"].to(sae.dtype) * self.input_scale
        step = self.state.global_step
        coefficient = self.args.sparsity_coefficient * linear_warmup(step, self.args.sparsity_warmup_steps)
        with self.accelerator.autocast():
            loss = training_loss(model, sae, x, coefficient)
        self.dead.update(loss.latents.detach())
        if self.remedy is not None:
            self.remedy.observe(step, x, loss)
        if self._logs_at(step + 1):
            self._logged = (x, loss)
        return (loss.total, loss) if return_outputs else loss.total

    # ------------------------------------------------------------------ what is logged

    def _logs_at(self, step: int) -> bool:
        """Whether the metrics of a step will be asked for; keeping them for every step would cost memory."""
        first = step == 1 and self.args.logging_first_step
        return first or step % max(1, int(self.state.logging_steps)) == 0 or step == self.args.max_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with every loss term and the SAE's fidelity on the latest batch."""
        if self._logged is not None and "loss" in logs:
            x, loss = self._logged
            logs |= {f"loss_{name}": term.item() for name, term in loss.terms.items()}
            logs |= _fidelity(self.model, x, loss)
            logs["dead_latents"] = int(self.dead.mask.sum())
            self._logged = None
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a forward and backward pass: 6 per activation and weight."""
        weights = self.model.W_enc.numel() + self.model.W_dec.numel()
        return 6 * len(inputs["x"]) * weights

    # ------------------------------------------------------------------ data and schedule

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return a loader that passes whole batches through.

        It is not handed to accelerate: every process has a stream of its own, and nothing is left to be split.
        """
        return DataLoader(_Batches(self.stream, self.args), batch_size=None, num_workers=0, pin_memory=False)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Return transformers' schedule, multiplied by the dip after disturbances."""
        if self.lr_scheduler is None:
            # Schedules that follow a metric are the only ones of another class, and transformers refuses them here.
            scheduler = cast(LambdaLR, super().create_scheduler(num_training_steps, optimizer))
            scheduler.lr_lambdas = [_dipped(factor, self.dip) for factor in scheduler.lr_lambdas]
            return scheduler
        return self.lr_scheduler

    # ------------------------------------------------------------------ disk

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the SAE in the model's own unit, what is needed to go on training, and no pickles."""
        folder = Path(output_dir or self.args.output_dir or "")
        scale, training_units = self.input_scale, {k: v.clone() for k, v in unit_tensors(self.model).items()}
        with self._in_model_unit():
            super()._save(str(folder), state_dict)
        if not self.args.should_save:
            return
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths
        (folder / _ARGUMENTS_FILE).write_text(json.dumps(self.args.recipe(), indent=2) + "\n", encoding="utf-8")
        if scale != 1.0:
            # The vectors as they are in training: dividing and multiplying again would not give the same bits.
            scale_tensor = torch.tensor(scale, dtype=torch.float64)
            save_file({"input_scale": scale_tensor, **training_units}, str(folder / _UNIT_FILE))

    @contextmanager
    def _in_model_unit(self) -> Iterator[None]:
        """Put the SAE into the model's unit for a while; afterwards every bit is as before."""
        tensors = unit_tensors(self.model)
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        change_unit(self.model, 1 / self.input_scale)
        try:
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint and return to the unit it was trained in."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        units = Path(resume_from_checkpoint) / _UNIT_FILE
        if units.is_file():
            saved = load_file(str(units))
            self.input_scale = saved.pop("input_scale").item()
            for name, tensor in unit_tensors(self.model).items():
                tensor.copy_(saved[name])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: transformers would write a card of its own over ours."""


class _Batches(IterableDataset[dict[str, Tensor]]):
    """The stream as `torch.utils.data` wants it: items are whole batches."""

    def __init__(self, stream: ActivationStream, args: SAETrainingArguments) -> None:
        self.stream = stream
        self.args = args

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for x in self.stream.batches(self.args.activation_batch_size):
            yield {"x": x}


def _require_trainable(sae: SAEModel) -> None:
    """Raise for an SAE whose objective would not be what it computes afterwards.

    Raises:
        InputError: saying why.
    """
    config = sae.config
    why = ""
    if config.kept_latents is not None:
        why = f"holds only {config.rows} of its {config.d_sae} latents: load it without latents="
    elif config.is_transcoder or config.skip_connection:
        why = "is a transcoder, which learns pairs of activations, and the stream gives single ones"
    elif len(config.sites_read) > 1 or not sae.per_token:
        why = "reads several sites, or several tokens, at once, and the stream gives single activations"
    elif config.normalization != "none":
        why = (
            f"normalises each token ({config.normalization}), and is therefore no homogeneous function of its input, "
            "as the training in another unit needs: train one with normalization='none', scaled by activation_scale="
        )
    if why:
        raise InputError(f"This {type(sae).__name__} cannot be trained here; it {why}.")


def _scale(statistics: ActivationStatistics, kind: str, d_in: int) -> float:
    """Return the factor that gives the activations the wanted root mean square norm."""
    if kind == "none":
        return 1.0
    if not statistics.mean_square_norm:
        raise InputError("All sampled activations are zero, so they cannot be scaled; check the site.")
    wanted = float(d_in) if kind == "sqrt_d_in" else 1.0
    return float((wanted / statistics.mean_square_norm) ** 0.5)


def _dipped(factor: Any, dip: LearningRateDip) -> Any:
    """Multiply a schedule by the dip; a plain function, because torch would save an object's attributes."""
    return lambda step: factor(step) * dip.factor(step)


def _fidelity(sae: SAEModel, x: Tensor, loss: TrainingLoss) -> dict[str, float]:
    """Return the metrics of one batch that are worth watching."""
    accumulator = FidelityAccumulator(sae.config.d_sae, sae.b_dec)
    accumulator.update(x, loss.reconstruction.detach(), loss.latents.detach())
    metrics = asdict(accumulator.compute())
    return {name: metrics[name] for name in ("l0", "fvu", "relative_reconstruction_bias")}
