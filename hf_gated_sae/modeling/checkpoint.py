"""One SAE that was found and identified but not loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CheckpointError, LatentIndexError
from ..hub.origin import Origin
from ..storage import StoredTensor

if TYPE_CHECKING:
    from .config import SAEConfig
    from .model import SAEModel

Tensors = dict[str, Tensor]


def as_stored(tensors: Tensors) -> Tensors:
    """Return the tensors unchanged: the layout has our names, shapes and conventions."""
    return tensors


@dataclass(frozen=True)
class Checkpoint:
    """One SAE, found and identified but not loaded.

    Attributes:
        model_class: the architecture's class.
        config: its complete configuration.
        origin: where it is.
        stored: its tensors, known by their headers; one row per latent (transposed lazily where the file has columns).
        shared: names among them of tensors that are not one row per latent.
        finish: turns the tensors read into those of the architecture. It must be row-wise in the latents, may write
            into its input, and must work on the meta device, where shapes are tried before anything is read.
        unsaid: required keys of the configuration that its files do not state, each with the error to raise if the
            user does not give it either.
    """

    model_class: type[SAEModel]
    config: SAEConfig
    origin: Origin
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    shared: frozenset[str] = frozenset({"b_dec", "W_skip"})
    finish: Callable[[Tensors], Tensors] = as_stored
    unsaid: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the name to use in messages."""
        return str(self.origin)

    def shapes(self, config: SAEConfig) -> Tensors:
        """Return the finished tensors on the meta device, for an SAE that holds the latents that `config` lists.

        Raises:
            CheckpointError: if the stored shapes do not fit each other.
        """
        empty = {}
        for name, tensor in self.stored.items():
            shape = tensor.shape
            if self._per_latent(name) and config.kept_latents != self.config.kept_latents:
                shape = (config.rows, *shape[1:])
            empty[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        try:
            return self.finish(empty)
        except (RuntimeError, IndexError, KeyError, ValueError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.stored.items())
            raise CheckpointError(
                f"The tensors of {self} do not fit each other ({str(error).splitlines()[0]}): it holds {shapes}. "
                "Fetch or convert it again."
            ) from error

    def read(self, config: SAEConfig, dtype: torch.dtype | None = None) -> Tensors:
        """Return the finished tensors; for an SAE that holds only some latents, only their rows are read.

        Args:
            config: says which latents are held.
            dtype: the dtype to load in. If it is wider than the stored one, tensors are cast before the layout's
                arithmetic, which would otherwise be rounded to the stored one.
        """
        rows = self._rows(config)
        read = {}
        for name, tensor in self.stored.items():
            if rows is None:
                read[name] = tensor.read()
            else:
                read[name] = tensor.rows(rows) if self._per_latent(name) else tensor.small()
            if dtype is not None and torch.promote_types(read[name].dtype, dtype) == dtype:
                read[name] = read[name].to(dtype)
        return self.finish(read)

    def bytes_read(self) -> int:
        """Return how many bytes have been read of its files."""
        sources = {id(tensor.source): tensor.source for tensor in self.stored.values()}
        return sum(source.bytes_read for source in sources.values())

    def _per_latent(self, name: str) -> bool:
        return name not in self.shared and self.stored[name].ndim > 0

    def _rows(self, config: SAEConfig) -> list[int] | None:
        """Return which stored rows are wanted; None for all."""
        wanted, held = config.kept_latents, self.config.kept_latents
        if wanted is None or wanted == held:
            return None
        if held is None:
            return wanted
        place = {latent: row for row, latent in enumerate(held)}
        if missing := [latent for latent in wanted if latent not in place]:
            raise LatentIndexError(
                f"{self} holds {len(held)} of {config.d_sae} latents, and latent {missing[0]} is not among them."
            )
        return [place[latent] for latent in wanted]
