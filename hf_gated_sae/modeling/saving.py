"""Writing a set of files all at once."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError

# Exactly what save_pretrained writes, whole or in shards: nobody else's files are ever removed as stale.
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@contextmanager
def replaced_together(target: Path) -> Iterator[Path]:
    """Give an empty folder to write into; if all goes well its files replace those in `target`, else nothing changes.

    Weights of an earlier save that were not written again are removed.

    Args:
        target: folder, created if need be.

    Raises:
        InputError: if `target` is a file.
    """
    if target.is_file():
        raise InputError(f"{target} is a file; expected a folder to save into.")
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield staging
        written = sorted(staging.iterdir())
        for file in written:
            file.replace(target / file.name)
        names = {file.name for file in written}
        if any(WEIGHT_FILES.fullmatch(name) for name in names):
            for file in list(target.iterdir()):
                if WEIGHT_FILES.fullmatch(file.name) and file.name not in names:
                    file.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)
