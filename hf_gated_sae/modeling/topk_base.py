"""The base class of architectures that select a number of latents for every token."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional import cpu
from ..functional.activations import scattered
from ..functional.dense_support import DenseSupport
from ..functional.sparse_latents import SparseLatents
from ..functional.support import Support
from .config import SAEConfig
from .model import SAEModel
from .objective import TopKObjective


class TopKBaseSAE(SAEModel):
    """``latents = v * [v is kept]`` with ``v = activate((x - b_dec) @ W_enc + b_enc)``.

    A subclass defines `latents_per_token` and `_choose`, `_activate` where it is not a ReLU, and `signed` where
    latents can be negative.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.
    """

    elementwise: ClassVar[bool] = False  # whether a latent is kept depends on others
    objective_class = TopKObjective

    def __init__(self, config: SAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    @property
    @abstractmethod
    def latents_per_token(self) -> int:
        """Number of latents kept per token."""

    @abstractmethod
    def _choose(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices and values of the latents to keep of activated projections ``[..., d_sae]``."""

    def margins(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return the pre-latents of some latents; see `SAEModel.margins`."""
        return self._project(x, latents) + self._take(self.b_enc, latents)

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        return torch.relu(projection + self._take(self.b_enc, latents))

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._choose(self._activate(self._project(x, None), None))

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        kept = scattered(*self._select(x), self.config.d_sae)
        return kept if latents is None else kept[..., latents]

    def _highest(self, x: Tensor, *, rounding: bool = False) -> tuple[Tensor, Tensor] | None:
        """Return the latents to keep, and their projections, without computing all others.

        Args:
            x: activations ``[tokens, d_in]``.
            rounding: whether rounding to bfloat16 may decide which of two close latents is kept.

        Returns:
            ``[tokens, k]`` each; None where there is no such way.
        """
        return None

    def _select_sparse(self, x: Tensor) -> SparseLatents | None:
        found = self._highest(x)
        if found is None:
            return super()._select_sparse(x)
        indices, projections = found
        values = self._activate(projections.reshape(-1), indices.reshape(-1))
        return SparseLatents.from_indices(indices, values.view_as(indices), self.config.d_sae)

    def _sparse_support(self, x: Tensor, shift: Tensor | None) -> cpu.SparseSupport | None:
        """Return the projections of the kept latents alone; None where a dense step is faster, or needed."""
        few = self.latents_per_token <= cpu.DENSEST * self.config.d_sae
        if not few or not cpu.serves_sparse_step(x, self.W_enc_T):
            return None
        rounding, flat = cpu.autocast_rounds(x), x.reshape(-1, x.shape[-1])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            found = self._highest(flat, rounding=rounding)
            live = super()._select_sparse(flat) if found is None else None
        if live is not None:
            return cpu.SparseSupport(x, shift, self.W_enc_T, live.tokens, live.indices)
        if found is None:
            return None
        tokens = torch.arange(len(flat)).repeat_interleave(found[0].shape[1])
        latents, projections = (each.reshape(-1) for each in found)
        return cpu.SparseSupport(x, shift, self.W_enc_T, tokens, latents, projections)

    def kept_support(self, x: Tensor) -> tuple[Support, Tensor]:
        """Return the projections that an objective is computed from, and the latents made of them.

        Args:
            x: activations ``[..., d_in]``.
        """
        shift = self.b_dec if self.config.apply_b_dec_to_input else None
        live = self._sparse_support(x, shift)
        if live is not None:
            return live, self._activate(live.projection, live.latents)
        support = DenseSupport(x, shift, self.W_enc_T)
        kept = self._choose(self._activate(support.projection, None))
        return support, scattered(*kept, self.config.d_sae)
