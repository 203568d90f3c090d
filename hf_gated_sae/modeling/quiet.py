"""Loading without transformers' own remarks, in several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


class _Quiet:
    """Settings of the process, which the first of several threads changes and the last one puts back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = (0, False)

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
                transformers_logging.set_verbosity_error()
                transformers_logging.disable_progress_bar()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                verbosity, bar = self._before
                transformers_logging.set_verbosity(verbosity)
                if bar:
                    transformers_logging.enable_progress_bar()


_quiet = _Quiet()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bar and load report: what they would say is raised instead."""
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()
