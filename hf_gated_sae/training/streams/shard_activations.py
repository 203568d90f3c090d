"""Activations that `save_activations` wrote to disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, unknown_name
from ...hooks.activation_shards import ActivationShards
from .rows import RowActivations


class ShardActivations(RowActivations):
    """Activations in a folder of `save_activations`; every epoch is a new permutation over all shards.

    Only the rows of a batch are read, through memory maps; besides them only the permutation is in memory, 8 bytes per
    row. Several processes split every batch between them: batch `i` of all their shards together is batch `i` of one
    process with a `world_size` times larger batch.

    Args:
        folder: the folder, or an `ActivationShards` of it.
        sites: to read; by default all whose activations the folder holds.
        seed: of the permutations.
        device: of the batches; the CPU by default.
        dtype: of the batches; by default that of the files.

    Raises:
        InputError: if the folder holds no activations, or none of a site.
        MissingFileError: if the folder, its index or one of its shards does not exist.
        CheckpointError: if it is not a folder of activations.
    """

    def __init__(
        self,
        folder: str | Path | ActivationShards,
        sites: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.shards = folder if isinstance(folder, ActivationShards) else ActivationShards(folder)
        self.device, self.dtype = device, dtype
        known = [name for name, facts in self.shards.index["values"].items() if facts["kind"] == "activations"]
        if not known:
            raise InputError(
                f"{self.shards.folder} holds {', '.join(self.shards.names) or 'nothing'}, and no activations: write "
                "some with save_activations(folder, model, [sites], batches)."
            )
        special = self.shards.index.get("special_token_ids")  # not in older indices
        self.special_ids = None if special is None else tuple(special)
        self.sites = tuple(known if sites is None else [sites] if isinstance(sites, str) else sites)
        for site in self.sites:
            if site not in known:
                raise unknown_name("site", site, known)
        if not self.sites:
            raise InputError(f"Asked for no sites; expected some of {', '.join(known)}, or None for all.")

    def __len__(self) -> int:
        """Number of activations of each site."""
        return len(self.shards)

    def facts(self) -> dict[str, Any]:
        """Return the folder's identity, a number chosen when it was written."""
        return {**super().facts(), "identity": self.shards.index["identity"]}

    def rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Read some rows, site -> ``[n, d]``."""
        found = self.shards.rows(rows, self.sites)
        return {site: found[site].to(device=self.device, dtype=self.dtype) for site in self.sites}
