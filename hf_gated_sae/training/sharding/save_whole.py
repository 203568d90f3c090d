"""Writing an SAE that no process holds whole as one ordinary checkpoint."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError, SAEError, reason
from ...modeling import SAEModel
from ...storage.atomic_write import written_together
from ..processes import Processes
from .latent_split import whole_config

BYTES_PER_FILE = 40 * 10**9
"""The Hub takes files of up to 50 GB."""

BYTES_AT_ONCE = 1 << 28
"""Of one tensor, what is handed over and written together."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def save_whole(part: SAEModel, folder: str | Path, *, bytes_per_file: int = BYTES_PER_FILE) -> None:
    """Write the SAE of which this is a part, as `SAEModel.from_pretrained` reads it.

    The first process writes; the others hand it their rows, a piece of one tensor at a time. An SAE that is no part is
    simply saved.

    Args:
        part: see `split`; to be called in all of its processes.
        folder: to write into, which only the first process needs to reach.
        bytes_per_file: a tensor that is larger has a file for itself.

    Raises:
        CheckpointError: in all processes, if it cannot be written.
    """
    processes = part.latent_group
    if not isinstance(processes, Processes):
        part.save_pretrained(folder)
        return
    shared = type(part).shared_names(part.config)
    tensors = {name: tensor.detach() for name, tensor in part.state_dict().items()}
    rows = {name: 1 if name in shared else processes.count for name in tensors}
    files = _files({name: tensor.nbytes * rows[name] for name, tensor in tensors.items()}, bytes_per_file)

    def explained(error: Exception) -> SAEError:
        if isinstance(error, SAEError):
            return error
        return CheckpointError(f"{folder} cannot be written ({reason(error)}).")

    with ExitStack() as stack:
        staging, full = Path(), None
        with processes.agreed(explained):  # before the others wait for somebody to take their rows
            if not processes.rank:
                staging = stack.enter_context(written_together(Path(folder)))
        for file, names in files.items():
            out = _UntilFull(None if processes.rank else staging / file)
            out.append(_header({name: (tensors[name], rows[name]) for name in names}))
            for name in names:
                for piece in _pieces(tensors[name], processes if rows[name] > 1 else Processes()):
                    out.append(b"" if piece is None else _bytes(piece))
            full = full or out.full
        with processes.agreed(explained):
            if full is not None:
                raise full
            if not processes.rank:
                _write_config(part, staging)
                if len(files) > 1:
                    places = {name: file for file, names in files.items() for name in names}
                    size = sum(tensor.nbytes * rows[name] for name, tensor in tensors.items())
                    index = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2)
                    (staging / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
                stack.close()


class _UntilFull:
    """A file that takes what it is given, and after the disk was full nothing more.

    Args:
        path: of the file, which is not there yet; None for a file of nothing.

    Attributes:
        full: the error of the disk; None if there was none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.full: OSError | None = None

    def append(self, data: bytes) -> None:
        """Write some more at the end."""
        if self.path is not None and self.full is None:
            try:
                with self.path.open("ab") as file:
                    file.write(data)
            except OSError as error:
                self.full = error


def _write_config(part: SAEModel, folder: Path) -> None:
    config = whole_config(part)
    config.architectures = [type(part).__name__]
    config.dtype = part.dtype
    config.save_pretrained(folder)


def _files(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """Return which tensors stand in which file."""
    groups: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if size > left or not groups:
            groups.append([])
            left = most
        groups[-1].append(name)
        left -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{k:05}-of-{len(groups):05}.safetensors": names for k, names in enumerate(groups, start=1)}


def _header(tensors: Mapping[str, tuple[Tensor, int]]) -> bytes:
    """Return the beginning of a safetensors file; each tensor is given with how many times its rows there are."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (tensor, times) in tensors.items():
        shape = [tensor.shape[0] * times, *tensor.shape[1:]] if tensor.ndim else []
        begin, end = end, end + tensor.nbytes * times
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def _bytes(piece: Tensor) -> bytes:
    """Return the numbers of a tensor as they stand in a file."""
    return piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _pieces(tensor: Tensor, processes: Processes) -> Iterator[Tensor | None]:
    """Yield, in the first process, the rows of all processes' tensors piece by piece, in their order."""
    rows = tensor.reshape(1) if not tensor.ndim else tensor
    step = max(1, BYTES_AT_ONCE // max(1, math.prod(rows.shape[1:]) * rows.element_size()))
    for source in range(processes.count):
        for piece in rows.split(step):
            yield processes.to_first(piece, source)
