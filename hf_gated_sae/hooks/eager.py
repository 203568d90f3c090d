"""Compiled functions run as plain Python while interventions act.

Code that was compiled before a hook was registered does not contain it, and torch.compile does not check for new
hooks: a compiled function that calls the model would run unedited.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn

from ..errors import AttachError

# Reentrant: the garbage collector may finalise a model while this thread holds the lock.
_LOCK = threading.RLock()
_holders = 0
_stance: Any = None


def run_eagerly(model: nn.Module) -> weakref.finalize[Any, nn.Module]:
    """Let every compiled function of the process run eagerly until the result is called, or the model is gone.

    torch has one stance for all threads, which is restored once no model needs eager execution.

    Args:
        model: the model with the hooks.

    Raises:
        AttachError: inside a compiled function, where the stance cannot be changed.
    """
    global _holders, _stance
    with _LOCK:
        if not _holders:
            try:
                _stance = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:
                raise AttachError(
                    "attach() was enabled inside a function that is being compiled, where hooks cannot be added: "
                    "enable it outside of that function, and call the function in the block."
                ) from error
        _holders += 1
    release = weakref.finalize(model, _release)
    release.atexit = False
    return release


def _release() -> None:
    """Restore torch's stance if no other model needs eager execution."""
    global _holders
    with _LOCK:
        _holders -= 1
        if not _holders:
            _stance.__exit__(None, None, None)
