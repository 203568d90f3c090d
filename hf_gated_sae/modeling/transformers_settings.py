"""Using transformers' own loading and saving: without its remarks, and by one thread at a time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_one_at_a_time = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bar and load report: what they would say is raised instead.

    These are settings of the process, and `from_pretrained` of transformers changes more of them (two at once leave
    torch building every later model on the meta device), so that other threads of ours wait.
    """
    with _one_at_a_time:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            with without_bars():
                yield
        finally:
            transformers_logging.set_verbosity(verbosity)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' own progress bars out of what is shown."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            with warnings.catch_warnings():  # the Hub's client says each time that the environment forbids its own
                warnings.simplefilter("ignore", UserWarning)
                transformers_logging.enable_progress_bar()
