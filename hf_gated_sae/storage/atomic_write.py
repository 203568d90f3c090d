"""Write a set of files to a folder, all or none."""

from __future__ import annotations

import filecmp
import logging
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..errors import InputError

# Exactly the names that save_pretrained writes, whole or in shards: no other files are removed as stale.
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
FACTS_FILE = "sae_metrics.json"
"""Name of the file with the measurements of the weights in the same folder."""

_log = logging.getLogger(__name__)


@contextmanager
def written_together(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; at the end its files replace those in `target`, or after an error none do.

    Ctrl-C is such an error, but is deferred while the files are being replaced.

    Weights of an earlier save that were not written again are removed, and so are facts that were measured on other
    weights than the new ones.

    Args:
        target: folder, created if it does not exist.

    Raises:
        InputError: if `target` is a file.
    """
    if target.is_file():
        raise InputError(f"{target} is a file; expected a folder to save into.")
    is_new, staging = not target.exists(), None
    try:
        with _interrupts_deferred():
            target.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        yield staging
        with _interrupts_deferred():
            _replace(staging, target)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if is_new and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def _replace(staging: Path, target: Path) -> None:
    """Move the files of one folder into another, and remove the files there that are then stale."""
    written = sorted(staging.iterdir())
    names = {file.name for file in written}
    has_weights = any(WEIGHT_FILES.fullmatch(name) for name in names)
    stale = _stale_facts(staging, target) if has_weights and FACTS_FILE not in names else None
    for file in written:
        file.replace(target / file.name)
    if has_weights:
        for file in list(target.iterdir()):
            if WEIGHT_FILES.fullmatch(file.name) and file.name not in names:
                file.unlink()
    if stale is not None:
        stale.unlink()
        _log.warning(
            "%s was measured on the previous weights in %s and is removed. A card there still describes them: write a "
            "new one with hf_gated_sae.publishing.save.",
            FACTS_FILE,
            target,
        )


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block; only the main thread receives it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
    if pressed and callable(before):
        before(*pressed[0])


def _stale_facts(staging: Path, target: Path) -> Path | None:
    """Return the facts in `target` if its weights are not those in `staging`."""
    facts = target / FACTS_FILE
    if not facts.is_file():
        return None
    weights = [file.name for file in staging.iterdir() if WEIGHT_FILES.fullmatch(file.name)]
    same = all((target / name).is_file() and filecmp.cmp(staging / name, target / name, False) for name in weights)
    return None if same else facts
