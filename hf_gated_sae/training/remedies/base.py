"""What every remedy for dead latents has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from transformers import TrainerCallback

from ...modeling import TrainingLoss
from ...registry import Registry
from ..dead_latents import DeadLatents
from ..schedules import LearningRateDip

if TYPE_CHECKING:
    from ..arguments import SAETrainingArguments


class DeadLatentRemedy(TrainerCallback):
    """Something that is done about latents that no longer fire.

    A remedy is one file here: a subclass that names itself and acts in the `transformers.TrainerCallback` events it
    needs. `on_optimizer_step` is the place to change weights: the learning rate of the next step is decided after it.

    Args:
        args: the run's arguments.
        dead: which latents are dead.
        dip: lowers the learning rate after a disturbance.
    """

    name: ClassVar[str]

    def __init__(self, args: SAETrainingArguments, dead: DeadLatents, dip: LearningRateDip) -> None:
        self.args = args
        self.dead = dead
        self.dip = dip

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Register the remedy under its name."""
        super().__init_subclass__(**kwargs)
        remedies.register(cls.name, cls)

    def observe(self, step: int, x: Tensor, loss: TrainingLoss) -> None:
        """See a batch that is being trained on; does nothing unless a remedy needs it.

        Args:
            step: number of steps done.
            x: activations ``[n, d_in]`` in the unit of training.
            loss: the objective on them.
        """


remedies: Registry[type[DeadLatentRemedy]] = Registry("dead-latent remedy", "hf_gated_sae.training.remedies")
