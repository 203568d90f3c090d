"""Gradients of SAEs that are trained together: averaging, norms, clipping, and detecting non-finite values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..errors import TrainingError
from . import checkpoints
from .arguments import SAETrainingArguments
from .nonfinite import find_nonfinite, find_nonfinite_gradient
from .sharding import Grid
from .streams import ActivationStream
from .trainee import Trainee


class SAEGradients(Trainer):
    """The part of `SAETrainer` that averages, clips and checks gradients, the same in all processes."""

    args: SAETrainingArguments
    trainees: dict[str, Trainee]
    stream: ActivationStream
    grid: Grid
    _inputs: dict[str, Tensor]
    _loss_sum: Tensor | None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute gradients, and average them between processes if no wrapper such as DDP does."""
        loss = super().training_step(*args, **kwargs)
        if not self.grid.latents.alone and self.accelerator.sync_gradients:
            self.grid.data.average_gradients(self.model)
        return loss

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip the gradient of each SAE separately, and return the norm of all gradients before clipping.

        Raises:
            InputError: if one of several processes cannot read further activations.
            TrainingError: if the norm or the loss is not finite.
        """
        self.accelerator.unscale_gradients()
        norms = self._gradient_norms()
        whole = torch.linalg.vector_norm(norms)
        self._require_finite(whole)  # clipping would hide which gradient is not finite
        for trainee, norm in zip(self.trainees.values(), norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_(trainee.sae.parameters(), self.args.max_grad_norm, norm)
        return whole

    def _get_grad_norm(self, model: Any, grad_norm: Tensor | None = None) -> Tensor:
        """Return the norm of all gradients if this step is logged, otherwise of the vectors' gradients only.

        Reading the matrices' gradients would take longer than all other checks. A non-finite value in them also shows
        in a bias gradient, which sums the same numbers, or at the latest in the next loss.

        Raises:
            TrainingError: if the norm or the loss is not finite.
        """
        if grad_norm is None:
            self.accelerator.unscale_gradients()
            grad_norm = torch.linalg.vector_norm(
                self._gradient_norms(whole=self._is_logged(self.state.global_step + 1))
            )
            self._require_finite(grad_norm)
        return grad_norm

    def _gradient_norms(self, *, whole: bool = True) -> Tensor:
        """Return the gradient norm of each SAE, or that of its vectors only, ``[n]``.

        If processes share the SAEs, the norms include the latents of all of them.
        """
        norms, common = [], []
        for trainee in self.trainees.values():
            gradients = {
                name: p.grad
                for name, p in trainee.sae.named_parameters()
                if p.grad is not None and (whole or p.ndim < 2)
            }
            common.append(torch.nn.utils.get_total_norm([gradients.pop(n) for n in trainee.common if n in gradients]))
            norms.append(torch.nn.utils.get_total_norm(gradients.values()))
        held = torch.stack([norm.to(norms[0].device) for norm in norms])
        if self.grid.latents.alone:
            return held
        of_all = torch.stack([norm.to(held.device) for norm in common])
        return (self.grid.latents.sum(held.square()) + of_all.square()).sqrt()

    def _require_finite(self, norm: Tensor) -> None:
        """Raise if loss or gradients are not finite; costs reading one number per step."""
        loss = self._exchange_fired()
        flag = norm if loss is None else norm + loss
        if torch.isfinite(flag):
            return
        step = self.state.global_step
        trainees, everyone = self.trainees.values(), self.grid.everyone
        everyone.raise_first(self.stream.failure)
        if self.accelerator.scaler is not None:
            return  # the scaler skips steps that overflow
        found = everyone.first_text(find_nonfinite(trainees, self._inputs, step))
        found = found or everyone.first_text(find_nonfinite_gradient(trainees))  # averaged: in every process
        if found is None:
            if torch.isfinite(norm) and (loss is None or torch.isfinite(loss)):
                return
            found = "the loss or its gradient was not finite in an earlier part of the batch, or their sum overflowed"
        raise TrainingError(
            f"Step {step + 1} was stopped before it changed any weight: {found}. Check the language model's "
            "activations, or use a smaller learning_rate, a longer warmup_steps, max_grad_norm=1.0 or a wider dtype. "
            f"{checkpoints.advice(Path(self.args.output_dir))}"
        )

    def _exchange_fired(self) -> Tensor | None:
        """Exchange which latents fired between processes; return the loss, NaN if it is not finite in any of them."""
        loss, self._loss_sum = self._loss_sum, None
        dead = [trainee.dead for trainee in self.trainees.values()]
        if self.grid.data.alone or loss is None:
            for each in dead:
                each.advance()
            return loss
        own = [each.fired.to(loss.device) for each in dead if each.fired is not None]
        flags = [*own, ~torch.isfinite(loss)[None]]
        *fired, nonfinite = self.grid.data.any(torch.cat(flags)).split([len(each) for each in flags])
        for each, fired_anywhere in zip(dead, fired, strict=True):
            each.advance(fired_anywhere)
        return loss.masked_fill(nonfinite[0], torch.nan)

    def _is_logged(self, step: int) -> bool:
        """Whether the metrics of a step are logged; storing them for every step would cost memory."""
        first = step == 1 and self.args.logging_first_step
        return first or step % max(1, int(self.state.logging_steps)) == 0 or step == self.args.max_steps
