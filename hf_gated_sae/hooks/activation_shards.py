"""A harvest on disk: safetensors shards beside an ``index.json``, read through memory maps.

Activations are a tensor ``[rows, d]`` under the name of their site; active latents are the three tensors of
`SparseLatents` under ``latents.SITE``. ``token_ids``, ``documents`` and ``positions`` are stored for every row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, InputError, MissingFileError, unknown_name
from ..functional.short_repr import few_lines
from ..functional.sparse_latents import SparseLatents
from .harvest import Harvest, rows_of_active

INDEX_FILE = "index.json"
FORMAT = "hf_gated_sae.activations"
FORMAT_VERSION = 1
TOKENS = {"token_ids": torch.int32, "documents": torch.int64, "positions": torch.int32}
"""The tensors that identify the token of every row, and the dtypes in which they are stored."""


def part_names(name: str) -> tuple[str, str, str]:
    """Return the names of the three tensors of active latents; their indices are stored as int32."""
    return f"{name}.offsets", f"{name}.indices", f"{name}.values"


class ActivationShards:
    """A folder that `save_activations` wrote; values are read from the disk on demand.

    Args:
        folder: the folder.

    Attributes:
        index: the content of ``index.json``: names, base model, revision, tokenizer, versions.

    Raises:
        MissingFileError: if the folder, its index or one of its shards does not exist.
        CheckpointError: if the index has another format, or a shard contradicts it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        facts = self.index["values"]
        self._shards = [_Shard(self.folder / each["file"], each["rows"], facts) for each in self.index["shards"]]
        self._starts = torch.tensor([0, *(shard["rows"] for shard in self.index["shards"])]).cumsum(0)

    @property
    def names(self) -> list[str]:
        """Names of the stored values: sites, and ``latents.SITE``."""
        return list(self.index["values"])

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._starts[-1])

    def rows(self, rows: Tensor | Sequence[int] | slice, names: Sequence[str] | None = None) -> Harvest:
        """Read the values of some tokens.

        Args:
            rows: numbers of rows, in any order, which the result keeps; or a slice.
            names: the values to read; all by default.

        Returns:
            Their values by name, on the CPU.

        Raises:
            InputError: if a row does not exist, or a name is unknown.
        """
        wanted = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows).long().reshape(-1)
        if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise InputError(
                f"Given rows {wanted.tolist()[:8]}; there are {len(self)} rows, so expected 0 .. {len(self) - 1}."
            )
        chosen = self.names if names is None else list(names)
        for name in chosen:
            if name not in self.index["values"]:
                raise unknown_name("activations", name, self.names)
        shard_of = torch.searchsorted(self._starts, wanted, right=True) - 1
        order = shard_of.argsort(stable=True)
        parts = []
        for shard in shard_of.unique().tolist():
            here = wanted[order][shard_of[order] == shard] - self._starts[shard]
            parts.append({name: self._shards[shard].read(name, here) for name in (*TOKENS, *chosen)})
        back = order.argsort()
        if not parts:
            parts = [{name: self._shards[0].read(name, wanted) for name in (*TOKENS, *chosen)}]
        values = {name: joined([part[name] for part in parts], back) for name in parts[0]}
        tokens: Any = {name: values.pop(name).long() for name in TOKENS}
        return Harvest(values=values, **tokens)

    def batches(
        self, batch_size: int, *, names: Sequence[str] | None = None, seed: int | None = None
    ) -> Iterator[Harvest]:
        """Yield all tokens once.

        Args:
            batch_size: tokens per batch; the last one may be smaller.
            names: the values to read; all by default.
            seed: seed of a random order over all shards; None keeps the order of the text.

        Raises:
            InputError: if `batch_size` is less than 1, or a name is unknown.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1.")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        order = torch.arange(len(self)) if seed is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(batch_size):
            yield self.rows(rows, names)

    def to_dataset(self, names: Sequence[str] | None = None) -> Any:
        """Copy into a `datasets.Dataset`, one row per token, active latents as lists of indices and values.

        Args:
            names: the values to copy; all by default.

        Raises:
            InputError: if the `datasets` library is not installed, or a name is unknown.
        """
        try:
            import datasets
        except ImportError as error:
            raise InputError("to_dataset() needs the datasets library: pip install datasets.") from error
        chosen = self.names if names is None else list(names)
        self.rows([], chosen)  # raises for unknown names
        features: dict[str, Any] = {name: datasets.Value(str(kind).split(".")[-1]) for name, kind in TOKENS.items()}
        for name in chosen:
            facts = self.index["values"][name]
            kind = datasets.Value(facts["dtype"] if facts["dtype"] in ("float16", "float64") else "float32")
            features[name] = datasets.List(kind, length=facts["width"])
            if facts["kind"] == "latents":
                features[name] = {"indices": datasets.List(datasets.Value("int32")), "values": datasets.List(kind)}
        # The identity is among the arguments because the library caches by them. The names are a tuple because it
        # divides lists among its workers.
        arguments = {"folder": str(self.folder), "names": tuple(chosen), "identity": self.index["identity"]}
        return datasets.Dataset.from_generator(_examples, features=datasets.Features(features), gen_kwargs=arguments)

    def __repr__(self) -> str:
        """Name the folder and what is in it."""
        return few_lines([f"ActivationShards({str(self.folder)!r}, {len(self)} rows of {', '.join(self.names)})"])


def _examples(folder: str, names: tuple[str, ...], identity: str) -> Iterator[dict[str, Any]]:
    """Yield every token as plain numbers."""
    for batch in ActivationShards(folder).batches(1024, names=names):
        columns: dict[str, Any] = {name: getattr(batch, name).tolist() for name in TOKENS}
        for name, value in batch.values.items():
            if isinstance(value, Tensor):
                columns[name] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
            else:
                ends = value.offsets.tolist()
                columns[name] = [
                    {"indices": value.indices[a:b].tolist(), "values": value.values[a:b].tolist()}
                    for a, b in zip(ends, ends[1:], strict=False)
                ]
        for row in range(len(batch)):
            yield {name: column[row] for name, column in columns.items()}


class _Shard:
    """One file, mapped into memory on first use.

    Args:
        path: the file.
        rows: number of tokens in it.
        facts: the index's entries for the values.
    """

    def __init__(self, path: Path, rows: int, facts: Mapping[str, Mapping[str, Any]]) -> None:
        if not path.is_file():
            raise MissingFileError(f"There is no {path}, which the index beside it lists: copy the whole folder.")
        self.path, self._rows, self._facts = path, rows, facts
        self._tensors: dict[str, Tensor] = {}

    def read(self, name: str, rows: Tensor) -> Tensor | SparseLatents:
        """Return a copy of some rows."""
        if not self._tensors:
            self._tensors = self._mapped()
        if name in self._tensors:
            return self._tensors[name][rows]
        offsets, indices, values = (self._tensors[part] for part in part_names(name))
        live = SparseLatents(offsets, indices, values, (self._rows, self._facts[name]["width"]))
        chosen = rows_of_active(live, rows)
        return SparseLatents(chosen.offsets, chosen.indices.long(), chosen.values, chosen.shape)

    def _mapped(self) -> dict[str, Tensor]:
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}): copy or write the folder again.") from error
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(TOKENS, (self._rows,))
        for name, facts in self._facts.items():
            if facts["kind"] == "activations":
                shapes[name] = (self._rows, facts["width"])
            else:
                offsets, indices, values = part_names(name)
                live = (len(tensors[indices]),) if indices in tensors else (0,)
                shapes |= {offsets: (self._rows + 1,), indices: live, values: live}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise CheckpointError(
                f"{self.path} holds {', '.join(sorted(tensors))}; expected {self._rows} rows of "
                f"{', '.join(self._facts)}, as wide as the index beside it states: copy or write the folder again."
            )
        return tensors


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise MissingFileError(f"There is no {path}; expected a folder that save_activations() wrote.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}).") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is not an index of format {FORMAT!r}, version {FORMAT_VERSION}: write the folder again with "
            "save_activations(), or read it with the version of this library that wrote it."
        )
    return index


def joined(parts: Sequence[Any], order: Tensor | None) -> Any:
    """Return the rows of all parts in one value, reordered if an order is given."""
    if isinstance(parts[0], SparseLatents):
        live = SparseLatents.cat(parts, (sum(part.shape[0] for part in parts), parts[0].d_sae))
        return live if order is None else rows_of_active(live, order)
    whole = torch.cat(list(parts))
    return whole if order is None else whole[order]
