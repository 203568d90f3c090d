"""Resampling: dead latents are pointed at what the SAE reconstructs worst."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from ...modeling import SAEModel
from ..initial_latents import initial_vectors
from ..recent_batches import RecentBatches
from ..sharding import Grid
from .base import DeadLatentRemedy


class Resample(DeadLatentRemedy):
    """At given steps, every dead latent gets the direction of a badly reconstructed input.

    Source: Bricken et al. 2023, "Neuron resampling"; Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D, which
    adds the dip of the learning rate.
    """

    name: ClassVar[str] = "resample"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._steps = frozenset(self.args.resample_steps)
        self._window = math.ceil(self.args.resample_inputs / self.args.activations_per_step)
        self._recent = RecentBatches()
        self._generator = torch.Generator().manual_seed(self.args.seed)
        self.resampled = 0

    def observe(self, step: int, x: Tensor, target: Tensor) -> None:
        """Keep the inputs of the last steps before a resampling."""
        if any(step < planned <= step + self._window for planned in self._steps):
            self._recent.observe(x, target)

    def after_step(self, step: int, sae: SAEModel, optimizer: Optimizer) -> None:
        """Resample if this is one of the steps."""
        if step not in self._steps or not self._recent:
            return
        dead = self.dead.indices
        inputs = torch.cat([x for x, _ in self._recent])
        targets = torch.cat([target for _, target in self._recent]) if sae.config.is_transcoder else None
        self._recent.clear()
        if int(self.grid.latents.sum(torch.tensor(len(dead), device=dead.device))):
            revived = resample(
                sae, dead, inputs, optimizer, targets=targets, generator=self._generator, grid=self.grid
            )
            self.dead.forgive(revived)
            self.dip.start(step)
            self.resampled += len(revived)

    def state_dict(self) -> dict[str, Any]:
        """Return the inputs kept so far, the state of the generator and the count."""
        return {**self._recent.state_dict(), "generator": self._generator.get_state(), "resampled": self.resampled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._recent.load_state_dict(state, self.dead.silent_for.device)
        self._generator.set_state(state["generator"])
        self.resampled = state["resampled"]


@torch.no_grad()
def resample(
    sae: SAEModel,
    dead: Tensor,
    inputs: Tensor,
    optimizer: Optimizer | None = None,
    *,
    targets: Tensor | None = None,
    encoder_scale: float = 0.2,
    generator: torch.Generator | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """Give dead latents new directions; nothing but their rows, and the optimiser's moments of these rows, is touched.

    Inputs are drawn with probability proportional to the square of their reconstruction error. The decoder row becomes
    the input's direction (seen from `b_dec`, as the encoder sees it), the encoder row the same direction at
    `encoder_scale` times the mean norm of the live encoder rows, and all other per-latent parameters what a new SAE
    has. A transcoder's decoder row becomes the direction of the target instead, seen from `b_dec`. Parameters that do
    not learn keep their values.

    Args:
        sae: in the unit of training.
        dead: indices ``[n]``.
        inputs: activations ``[m, d_in]`` to draw from, without replacement.
        optimizer: its state for the dead rows is set to zero, where it is floats of the parameter's own shape. A
            warning names one that has other state as well, such as Adafactor's factors, or codes of 8 bits.
        targets: what a transcoder is to write for each input, ``[m, d_out]``.
        encoder_scale: how loud a new encoder row is.
        generator: source of randomness, on the CPU; in the same state in all processes.
        grid: the processes that train together. Inputs are drawn from those of all, the same ones in each.

    Returns:
        The indices that were resampled: all of `dead`, unless there are fewer inputs.
    """
    targets = inputs if targets is None else targets
    directions, written = _directions(sae, inputs, targets)
    has_direction = (directions.norm(dim=-1) > 0) & (written.norm(dim=-1) > 0)
    grid = grid or Grid()
    weights = grid.data.rows(_reconstruction_errors(sae, inputs, targets).square() * has_direction)
    counts = grid.latents.rows(torch.tensor([len(dead)], device=dead.device))  # each process has its own dead latents
    if not (drawn := min(int(counts.sum()), int((weights > 0).sum()))):
        return dead[:0]
    loudness = encoder_scale * _sparse_norm(sae, dead, grid)
    # Scaled by the largest so that the squares of large errors stay representable.
    chosen = torch.multinomial((weights / weights.max()).double().cpu(), drawn, generator=generator)
    chosen = chosen[int(counts[: grid.latents.rank].sum()) :][: len(dead)].to(directions.device)
    dead = dead[: len(chosen)]
    directions, written = (grid.data.chosen(each, chosen) for each in (directions, written))
    reads, writes = (nn.functional.normalize(each, dim=-1).to(sae.dtype) for each in (directions, written))
    fresh = initial_vectors(sae)
    kept: set[str] = set()
    for name, parameter in ((name, each) for name, each in sae.named_parameters() if each.requires_grad):
        if name == "W_dec":
            parameter[dead] = writes
        elif name in sae.encoder_names:
            parameter[dead] = reads * loudness
        elif name in fresh:
            parameter[dead] = fresh[name][dead].to(parameter.dtype)
        else:
            continue
        kept |= forget_moments(optimizer, parameter, dead)
    if kept:
        _warn_of(optimizer, kept)
    return dead


def _warn_of(optimizer: Optimizer | None, kept: set[str]) -> None:
    """Warn of an optimiser that remembers something of dead latents which cannot be forgotten."""
    kind = type(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer)
    warnings.warn(
        f"{kind.__module__}.{kind.__name__} has {', '.join(sorted(kept))}, of which nothing can be forgotten for "
        "some latents alone: resampled ones go on with what it remembers of the dead. optim='adamw_torch' would "
        "forget all of it.",
        UserWarning,
        stacklevel=1,  # the caller is the trainer, which knows no more of it
    )


def forget_moments(optimizer: Optimizer | None, parameter: nn.Parameter, rows: Tensor) -> set[str]:
    """Set an optimiser's state to zero for some rows of a parameter, where it is floats of the parameter's own shape.

    Args:
        optimizer: None does nothing.
        parameter: one of its parameters.
        rows: indices ``[n]`` along the first axis.

    Returns:
        The names of other state, which stays as it is; numbers for the whole parameter, such as steps, are none.
    """
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    kept = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape == parameter.shape and value.is_floating_point():
            value[rows] = 0
        elif value.numel() > 1:  # 0 would be just another code in a table of values
            kept.add(name)
    return kept


def _directions(sae: SAEModel, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what new latents could read, ``[m, d_in]``, and write, ``[m, d_out]``, as encoder and decoder see it."""
    read = inputs - sae.b_dec if sae.config.apply_b_dec_to_input else inputs
    return read, targets - sae.b_dec if sae.config.is_transcoder else read


def _sparse_norm(sae: SAEModel, dead: Tensor, grid: Grid) -> Tensor:
    """Return the mean norm of the encoder rows of active latents, ``[]``; of all if none is alive."""
    alive = torch.ones(sae.config.d_sae, dtype=torch.bool, device=dead.device)
    alive[dead] = False
    norms = sae.W_enc.norm(dim=0)
    of_all = alive.new_tensor(len(alive), dtype=norms.dtype)
    sums = grid.latents.sum(torch.stack([norms[alive].sum(), alive.sum(), norms.sum(), of_all]))
    return sums[0] / sums[1] if sums[1] else sums[2] / sums[3]


def _reconstruction_errors(sae: SAEModel, inputs: Tensor, targets: Tensor, chunk: int = 4096) -> Tensor:
    """Return ``|y - y^|^2`` for every input, ``[m]``."""
    pieces = zip(inputs.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([(target - sae.reconstruct(x)).square().sum(-1) for x, target in pieces])
