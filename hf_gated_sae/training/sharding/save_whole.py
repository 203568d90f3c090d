"""Writing an SAE that is split over processes as one ordinary checkpoint."""

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
"""Bytes of a tensor that are sent and written at a time."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def save_whole(part: SAEModel, folder: str | Path, *, bytes_per_file: int = BYTES_PER_FILE) -> None:
    """Write the whole SAE of a part, as `SAEModel.from_pretrained` reads it.

    The first process writes; the others send it their rows, a piece of one tensor at a time. An SAE that is not split
    is saved as usual.

    Args:
        part: see `split`; all processes that hold a part have to call this.
        folder: to write into; only the first process needs access to it.
        bytes_per_file: largest size of a file; a larger tensor gets its own file.

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
        with processes.raising_together(explained):  # before the others wait to send their rows
            if not processes.rank:
                staging = stack.enter_context(written_together(Path(folder)))
        for file, names in files.items():
            out = _FileUntilFull(None if processes.rank else staging / file)
            out.append(_header({name: (tensors[name], rows[name]) for name in names}))
            for name in names:
                for piece in _pieces(tensors[name], processes if rows[name] > 1 else Processes()):
                    out.append(b"" if piece is None else _bytes(piece))
            full = full or out.full
        with processes.raising_together(explained):
            if full is not None:
                raise full
            if not processes.rank:
                _write_config(part, staging)
                if len(files) > 1:
                    file_of = {name: file for file, names in files.items() for name in names}
                    size = sum(tensor.nbytes * rows[name] for name, tensor in tensors.items())
                    index = json.dumps({"metadata": {"total_size": size}, "weight_map": file_of}, indent=2)
                    (staging / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
                stack.close()


class _FileUntilFull:
    """A file to append to, which ignores further data once writing has failed.

    Args:
        path: of the file, which does not exist yet; None to write nothing.

    Attributes:
        full: the error of writing; None if there was none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.full: OSError | None = None

    def append(self, data: bytes) -> None:
        """Append data to the file."""
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
    """Return the names of the tensors in each file."""
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
    """Return the header of a safetensors file, from tensors and the numbers of processes that hold their rows."""
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
    """Return the bytes of a tensor as they are stored in a file."""
    return piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _pieces(tensor: Tensor, processes: Processes) -> Iterator[Tensor | None]:
    """Yield, in the first process, the rows of all processes' tensors piece by piece, in their order."""
    rows = tensor.reshape(1) if not tensor.ndim else tensor
    step = max(1, BYTES_AT_ONCE // max(1, math.prod(rows.shape[1:]) * rows.element_size()))
    for source in range(processes.count):
        for piece in rows.split(step):
            yield processes.send_to_first(piece, source)
