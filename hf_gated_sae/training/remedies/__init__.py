"""One file per remedy for dead latents; see `DeadLatentRemedy` for how to add one."""

from .base import DeadLatentRemedy, remedies

__all__ = ["DeadLatentRemedy", "remedies"]
