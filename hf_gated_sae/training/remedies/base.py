"""Base class and registry of the remedies for dead latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ...modeling import SAEModel, TrainingLoss
from ...registry import Registry
from ..dead_latents import DeadLatents
from ..schedules import LearningRateDip
from ..sharding import Grid

if TYPE_CHECKING:
    from ..arguments import SAETrainingArguments


class DeadLatentRemedy:
    """A method that revives the dead latents of one SAE.

    A remedy is one file here: a subclass with a `name` that overrides `terms` (further terms of the objective),
    `observe` or `after_step` (which may change weights), as needed.

    Args:
        args: the run's arguments.
        dead: which latents are dead.
        dip: lowers the learning rate after a resampling.
        grid: the processes that train together; this one alone by default. All of them see the same dead latents or,
            if they share an SAE, their own.
    """

    name: ClassVar[str]

    def __init__(
        self, args: SAETrainingArguments, dead: DeadLatents, dip: LearningRateDip, grid: Grid | None = None
    ) -> None:
        self.args = args
        self.dead = dead
        self.dip = dip
        self.grid = grid or Grid()

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Register the remedy under its name."""
        super().__init_subclass__(**kwargs)
        remedies.register(cls.name, cls)

    def terms(self, sae: SAEModel, x: Tensor, target: Tensor, loss: TrainingLoss) -> Mapping[str, Tensor]:
        """Return further terms of the objective by name; none by default.

        Args:
            sae: in the activation unit of training.
            x: activations ``[n, d_in]``.
            target: ``[n, d_out]``; `x` itself unless the SAE is a transcoder.
            loss: the objective on them.
        """
        return {}

    def observe(self, step: int, x: Tensor, target: Tensor) -> None:
        """Observe a batch that is being trained on; does nothing by default.

        Args:
            step: number of steps done.
            x: activations ``[n, d_in]``, in the activation unit of training.
            target: ``[n, d_out]``.
        """

    def after_step(self, step: int, sae: SAEModel, optimizer: Optimizer) -> None:
        """Act after the optimiser's step, before the learning rate of the next step is computed.

        Args:
            step: number of steps done, this one included.
            sae: in the activation unit of training.
            optimizer: of the run; its moments may have to be reset.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume: tensors, numbers, strings, lists and mappings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""


remedies: Registry[type[DeadLatentRemedy]] = Registry("dead-latent remedy", "hf_gated_sae.training.remedies")
