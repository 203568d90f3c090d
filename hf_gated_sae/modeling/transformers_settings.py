"""Use transformers' loading and saving without its log messages, and by one thread at a time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_one_at_a_time = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bar and load report: the problems that it would report are raised instead.

    These settings are global to the process, and transformers' `from_pretrained` changes more of them (two at once
    leave torch building every later model on the meta device), so our other threads wait.
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
    """Disable transformers' own progress bars."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            with warnings.catch_warnings():  # the Hub's client warns each time that the environment disables its bars
                warnings.simplefilter("ignore", UserWarning)
                transformers_logging.enable_progress_bar()
