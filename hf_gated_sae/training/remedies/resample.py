"""Resampling: dead latents get the directions of badly reconstructed inputs."""

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
    """At given steps, sets every dead latent to the direction of a badly reconstructed input.

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
        """Store the inputs of the last steps before a resampling."""
        if any(step < planned <= step + self._window for planned in self._steps):
            self._recent.observe(x, target)

    def after_step(self, step: int, sae: SAEModel, optimizer: Optimizer) -> None:
        """Resample if resampling is scheduled for this step."""
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
            self.dead.reset_counters(revived)
            self.dip.start(step)
            self.resampled += len(revived)

    def state_dict(self) -> dict[str, Any]:
        """Return the inputs stored so far, the state of the generator and the number of resampled latents."""
        return {**self._recent.state_dict(), "generator": self._generator.get_state(), "resampled": self.resampled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
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
    """Give dead latents new directions; only their rows, and the optimiser's moments for these rows, change.

    Inputs are drawn with probability proportional to the square of their reconstruction error. The decoder row becomes
    the input's direction from `b_dec` (or from 0, if the encoder does not subtract it), the encoder row the same
    direction with a norm of `encoder_scale` times the mean of the live encoder rows, and all other per-latent
    parameters their initial values. A transcoder's decoder row becomes the target's direction from `b_dec`. Frozen
    parameters keep their values.

    Args:
        sae: in the activation unit of training.
        dead: indices ``[n]``.
        inputs: activations ``[m, d_in]`` to draw from, without replacement.
        optimizer: its state for the dead rows is set to zero, if it is floats of the parameter's own shape. A warning
            names an optimiser that has other state as well, such as Adafactor's factors or 8-bit codes.
        targets: of a transcoder, for each input, ``[m, d_out]``.
        encoder_scale: norm of a new encoder row, relative to the mean of the live ones.
        generator: source of randomness, on the CPU; in the same state in all processes.
        grid: the processes that train together. Inputs are drawn from those of all, the same ones in each.

    Returns:
        The indices that were resampled: all of `dead`, unless there are fewer inputs.
    """
    targets = inputs if targets is None else targets
    directions, written = _directions(sae, inputs, targets)
    has_direction = (directions.norm(dim=-1) > 0) & (written.norm(dim=-1) > 0)
    grid = grid or Grid()
    weights = grid.data.gather_rows(_reconstruction_errors(sae, inputs, targets).square() * has_direction)
    counts = grid.latents.gather_rows(torch.tensor([len(dead)], device=dead.device))  # of dead latents, per process
    if not (drawn := min(int(counts.sum()), int((weights > 0).sum()))):
        return dead[:0]
    encoder_norm = encoder_scale * _mean_live_norm(sae, dead, grid)
    # Scaled by the largest so that the squares of large errors stay representable.
    chosen = torch.multinomial((weights / weights.max()).double().cpu(), drawn, generator=generator)
    chosen = chosen[int(counts[: grid.latents.rank].sum()) :][: len(dead)].to(directions.device)
    dead = dead[: len(chosen)]
    directions, written = (grid.data.gather_selected_rows(each, chosen) for each in (directions, written))
    reads, writes = (nn.functional.normalize(each, dim=-1).to(sae.dtype) for each in (directions, written))
    fresh = initial_vectors(sae)
    unreset: set[str] = set()
    for name, parameter in ((name, each) for name, each in sae.named_parameters() if each.requires_grad):
        if name == "W_dec":
            parameter[dead] = writes
        elif name in sae.encoder_names:
            parameter[dead] = reads * encoder_norm
        elif name in fresh:
            parameter[dead] = fresh[name][dead].to(parameter.dtype)
        else:
            continue
        unreset |= reset_moments(optimizer, parameter, dead)
    if unreset:
        _warn_of_unreset_state(optimizer, unreset)
    return dead


def _warn_of_unreset_state(optimizer: Optimizer | None, unreset: set[str]) -> None:
    """Warn that an optimiser has state that cannot be reset for single latents."""
    kind = type(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer)
    warnings.warn(
        f"{kind.__module__}.{kind.__name__} has {', '.join(sorted(unreset))}, which cannot be reset for single "
        "latents: resampled latents keep the state of the dead ones. optim='adamw_torch' resets all of its state.",
        UserWarning,
        stacklevel=1,  # the caller is the trainer, not user code
    )


def reset_moments(optimizer: Optimizer | None, parameter: nn.Parameter, rows: Tensor) -> set[str]:
    """Set an optimiser's state to zero for some rows of a parameter, if it is floats of the parameter's own shape.

    Args:
        optimizer: None does nothing.
        parameter: one of its parameters.
        rows: indices ``[n]`` along the first axis.

    Returns:
        The names of other tensors of the state, which stay unchanged; scalars such as the step count are ignored.
    """
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    unreset = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape == parameter.shape and value.is_floating_point():
            value[rows] = 0
        elif value.numel() > 1:  # quantised codes, in which 0 does not stand for the value 0
            unreset.add(name)
    return unreset


def _directions(sae: SAEModel, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return candidate encoder directions ``[m, d_in]`` and decoder directions ``[m, d_out]`` of new latents."""
    read = inputs - sae.b_dec if sae.config.apply_b_dec_to_input else inputs
    return read, targets - sae.b_dec if sae.config.is_transcoder else read


def _mean_live_norm(sae: SAEModel, dead: Tensor, grid: Grid) -> Tensor:
    """Return the mean norm of the encoder rows of live latents, ``[]``; of all if none is alive."""
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
