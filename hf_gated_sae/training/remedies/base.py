"""What every remedy for dead latents has in common."""

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
    """Something that is done about latents that no longer fire, for one SAE.

    A remedy is one file here: a subclass that names itself and defines what it needs of `terms` (something more to
    minimise), `observe` and `after_step` (which may change weights).

    Args:
        args: the run's arguments.
        dead: which latents are dead.
        dip: lowers the learning rate after a disturbance.
        grid: the processes that train together; this one alone by default. All of them see the same dead latents, or,
            where they share an SAE, those that they hold.
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
        """Return further terms of the objective by name; none unless a remedy has some.

        Args:
            sae: in the unit of training.
            x: activations ``[n, d_in]``.
            target: what is to be written, ``[n, d_out]``; `x` itself unless the SAE is a transcoder.
            loss: the objective on them.
        """
        return {}

    def observe(self, step: int, x: Tensor, target: Tensor) -> None:
        """See a batch that is being trained on; does nothing unless a remedy needs it.

        Args:
            step: number of steps done.
            x: activations ``[n, d_in]``, in the unit of training.
            target: ``[n, d_out]``.
        """

    def after_step(self, step: int, sae: SAEModel, optimizer: Optimizer) -> None:
        """Act after the optimiser's step; the learning rate of the next one is decided afterwards.

        Args:
            step: number of steps done, this one included.
            sae: in the unit of training.
            optimizer: its moments may have to be forgotten.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on: tensors, numbers, texts, lists and mappings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


remedies: Registry[type[DeadLatentRemedy]] = Registry("dead-latent remedy", "hf_gated_sae.training.remedies")
