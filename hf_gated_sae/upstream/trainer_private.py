"""Private names of transformers' `Trainer` on which `SAETrainer` depends, seen in transformers 5.16 and 5.24.

Its public hooks cannot resume a run bit for bit. What is missing upstream, by reason:

* no public hook replaces how a checkpoint is written and read. Callbacks are called after a save, so they can neither
  make it atomic, nor leave out pickles, nor split the optimiser's state over processes;
* the loss summed since the last log, and its total, are not in `TrainerState`; a resumed run would log a different
  first mean;
* training resumes by reading the data loader up to where it was. Our streams seek there directly. A finished run would
  take one more step.

`require_trainer` raises before a run begins if a name is missing: an override of a method that is no longer called
would silently do nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import VersionError

OVERRIDDEN = {
    "_save_checkpoint": "a checkpoint appears whole or not at all",
    "_get_output_dir": "it is written beside its place first",
    "_save_optimizer_and_scheduler": "without pickles, and split over processes",
    "_save_scaler": "without pickles",
    "_save_rng_state": "with the positions of the stream and the state of every SAE",
    "_load_from_checkpoint": "each process reads its part, and other SAEs are refused",
    "_load_optimizer_and_scheduler": "what `_save_optimizer_and_scheduler` wrote",
    "_load_scaler": "what `_save_scaler` wrote",
    "_load_rng_state": "what `_save_rng_state` wrote, and nothing drawn since",
    "_clip_grad_norm": "each SAE of a group is clipped by its own norm, in one pass over the gradients",
    "_get_grad_norm": "the norms that clipping has computed are logged",
    "_run_epoch": "a stream starts where it was; a finished run takes no further step",
    "_finalize_training": "speeds and mean loss are of the whole run",
}
"""Methods that are overridden, each with its reason."""

READ = {
    "_tr_loss": "the loss since the last log",
    "_total_loss_scalar": "the loss before it",
    "_globalstep_last_logged": "the step of the last log",
}
"""Attributes that are saved and restored, each with what it is."""

WRITTEN = {
    "_ddp_params_and_buffers_to_ignore": "torch's DDP does not send buffers that are the same in all processes",
    "_is_accelerate_prepared": "accelerate does not wrap parts of an SAE, to which DDP would give the same weights",
    "_n_gpu": "transformers does not split every batch over the GPUs of one process",
    "_initial_global_step": "speeds of a resumed run do not leave out the steps before; 5.16 always counts them",
}
"""Attributes that are set on module, arguments or trainer, each with what it keeps a library from doing."""


def require_trainer(trainer: type[Any]) -> None:
    """Raise unless transformers' `Trainer` has every name on which resuming depends.

    Args:
        trainer: `transformers.Trainer`.

    Raises:
        VersionError: naming those that are missing.
    """
    missing = [name for name in OVERRIDDEN if not inspect.isfunction(getattr(trainer, name, None))]
    source = inspect.getsource(inspect.getmodule(trainer) or trainer)
    missing += [name for name in READ if f"self.{name}" not in source]
    missing += [name for name in OVERRIDDEN if f"self.{name}(" not in source and name not in missing]
    if missing:
        raise VersionError(
            f"The installed transformers' Trainer has no {', '.join(missing)}, on which training SAEs depends: "
            "install a version that hf-gated-sae is tested with, or a newer hf-gated-sae."
        )
