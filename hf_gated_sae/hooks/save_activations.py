"""`save_activations`: harvest a text to disk, as a whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..functional.sparse_latents import SparseLatents
from ..interventions import special_ids_for
from ..modeling import SAEModel
from ..sites.probe import unwrap
from .activation_shards import FORMAT, FORMAT_VERSION, INDEX_FILE, TOKENS, ActivationShards, joined, part_names
from .attach import require_model
from .capture import Wanted, sites_needed
from .harvest import Harvest, TokenSource, harvest, rows_of_active


def save_activations(
    folder: str | Path,
    model: Any,
    what: Sequence[Wanted] | Wanted,
    batches: TokenSource,
    *,
    dtype: torch.dtype | None = None,
    special_tokens: bool = False,
    special_ids: Sequence[int] | None = None,
    norm_limit: float | Mapping[str, float] | None = None,
    tokenizer: Any = None,
    rows_per_shard: int = 1 << 17,
    progress: Callable[[int], None] | None = None,
) -> ActivationShards:
    """Harvest a text to disk; at most one shard is in memory, and either the whole folder is written or nothing.

    Args:
        folder: the folder to write; must not exist, or be empty.
        model: any Hugging Face causal LM.
        what: sites and SAEs, as for `harvest`.
        batches: token ids, as for `harvest`.
        dtype: dtype of activations and values of latents; by default that of the model and of the SAE.
        special_tokens: keep special tokens, as for `harvest`.
        special_ids: which tokens are special, as for `harvest`.
        norm_limit: leave out tokens whose activation has a larger norm, as for `harvest`.
        tokenizer: the tokenizer whose name is written to the index.
        rows_per_shard: tokens per file.
        progress: called with the number of tokens so far after each batch.

    Returns:
        The written shards.

    Raises:
        InputError: if the folder is not empty, or the text has no token that counts; and whatever `harvest` raises.
        CheckpointError: if it cannot be written, as on a full disk.
    """
    if rows_per_shard < 1:
        raise InputError(f"rows_per_shard is {rows_per_shard}; expected at least 1.")
    require_model("save_activations()", model)
    keys = sites_needed("save_activations()", what)
    names = _names(keys)
    special = list(special_ids_for(model, keys) if special_ids is None else special_ids)
    harvests = harvest(
        model, what, batches, special_tokens=special_tokens, special_ids=special, norm_limit=norm_limit, dtype=dtype
    )
    left_out = {
        "special_tokens": special_tokens,
        "special_token_ids": [] if special_tokens else special,
        "norm_limit": dict(norm_limit) if isinstance(norm_limit, Mapping) else norm_limit,
    }
    with _appearing_at_once(Path(folder)) as staging:
        writer = _Writer(staging, names, rows_per_shard)
        for each in harvests:
            writer.add(each)
            if progress is not None:
                progress(writer.rows)
        if not writer.rows:
            raise InputError("The text has no token that counts; expected batches with tokens that are not special.")
        writer.finish({**_origin(model, tokenizer), **left_out})
    return ActivationShards(folder)


class _Writer:
    """Collects harvests and writes a shard whenever there are enough rows for one."""

    def __init__(self, folder: Path, names: Mapping[Any, str], rows_per_shard: int) -> None:
        self.folder, self.names, self.rows_per_shard = folder, names, rows_per_shard
        self.rows = self.documents = 0
        self.shards: list[int] = []
        self.facts: dict[str, dict[str, Any]] = {}
        self._held: list[dict[str, Any]] = []
        self._held_rows = 0

    def add(self, harvested: Harvest) -> None:
        """Add the tokens of one batch."""
        values: dict[str, Any] = {name: getattr(harvested, name).to("cpu", kind) for name, kind in TOKENS.items()}
        values |= {name: harvested[key].to("cpu") for key, name in self.names.items()}
        self.facts = self.facts or {name: _facts(key, values[name]) for key, name in self.names.items()}
        self.rows += len(harvested)
        start = 0
        while start < len(harvested):
            stop = min(len(harvested), start + self.rows_per_shard - self._held_rows)
            # A copy, since a view would keep the whole batch in memory.
            self._held.append({name: _part(value, start, stop) for name, value in values.items()})
            self._held_rows += stop - start
            if self._held_rows == self.rows_per_shard:
                self._flush()
            start = stop

    def _flush(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name in [*TOKENS, *self.facts]:
            value = joined([part.pop(name) for part in self._held], None)
            if isinstance(value, SparseLatents):
                stored = (value.offsets, value.indices.int(), value.values)
                tensors |= dict(zip(part_names(name), (each.contiguous() for each in stored), strict=True))
            else:
                tensors[name] = value.contiguous()
        safetensors.torch.save_file(tensors, self.folder / f"{len(self.shards)}", metadata={"format": "pt"})
        self.shards.append(self._held_rows)
        self._held, self._held_rows = [], 0

    def finish(self, origin: Mapping[str, Any]) -> None:
        """Write what is left, and the index."""
        if self._held_rows:
            self._flush()
        files = [f"activations-{n:05d}-of-{len(self.shards):05d}.safetensors" for n in range(len(self.shards))]
        for number, file in enumerate(files):
            (self.folder / f"{number}").rename(self.folder / file)
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "identity": uuid.uuid4().hex,
            "rows": self.rows,
            "values": self.facts,
            **origin,
            "shards": [{"file": file, "rows": rows} for file, rows in zip(files, self.shards, strict=True)],
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names(keys: Mapping[Any, Sequence[str]]) -> dict[Any, str]:
    """Return the name under which each key is stored: a site's own, and for an SAE the first site that it reads."""
    names: dict[Any, str] = {}
    for key, sites in keys.items():
        stem = f"latents.{sites[0]}" if isinstance(key, SAEModel) else sites[0]
        taken = [name for name in names.values() if name == stem or name.startswith(f"{stem}#")]
        if taken and not isinstance(key, SAEModel):
            raise InputError(f"{stem} was named twice; expected each site once.")
        names[key] = f"{stem}#{len(taken) + 1}" if taken else stem
    return names


def _facts(key: Any, value: Any) -> dict[str, Any]:
    """Return the index entry of a key."""
    dtype = str(value.values.dtype if isinstance(value, SparseLatents) else value.dtype).removeprefix("torch.")
    facts = {"kind": "activations", "width": value.shape[-1], "dtype": dtype}
    if not isinstance(key, SAEModel):
        return facts
    origin = key.checkpoint
    return facts | {
        "kind": "latents",
        "sites": key.config.sites_read,
        "architecture": key.config.architecture,
        "sae": None if origin is None else str(origin),
    }


def _origin(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the index entries about the origin of the values."""
    config: Any = unwrap(model)[0].config
    return {
        "base_model": config.name_or_path or None,
        "base_model_revision": getattr(config, "_commit_hash", None),
        "model_type": config.model_type,
        "tokenizer": getattr(tokenizer, "name_or_path", None),
        "versions": {name: version(name) for name in ("hf-gated-sae", "torch", "transformers")},
    }


def _part(value: Tensor | SparseLatents, start: int, stop: int) -> Tensor | SparseLatents:
    """Return a copy of some rows."""
    if isinstance(value, SparseLatents):
        return rows_of_active(value, torch.arange(start, stop))
    return value[start:stop].clone()


@contextmanager
def _appearing_at_once(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` on success and removed on failure.

    Raises:
        InputError: if `folder` exists and is not empty.
        CheckpointError: if it cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} exists already; choose a new folder, or remove this one first.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}.") from error
    try:
        yield staging
        staging.chmod(0o755)
        staging.replace(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written, and nothing was kept: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
