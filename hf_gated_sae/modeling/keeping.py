"""What architectures have in common that keep so many latents of every token."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional.activations import scattered
from ..functional.support import DENSEST, DenseSupport, LiveSupport, Support
from .config import SAEConfig
from .model import SAEModel
from .objective import KeptObjective


class KeepingSAE(SAEModel):
    """``latents = v * [v is kept]`` with ``v = activate((x - b_dec) @ W_enc + b_enc)``.

    A subclass defines `kept_per_token` and `_choose`, and `_activate` where it is no ReLU; if latents can be negative,
    it says so.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.
    """

    elementwise: ClassVar[bool] = False  # whether a latent is kept depends on others
    objective_class = KeptObjective

    def __init__(self, config: SAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    @property
    @abstractmethod
    def kept_per_token(self) -> int:
        """Number of latents that are kept of a token."""

    @abstractmethod
    def _choose(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return which latents are kept of activated projections ``[..., d_sae]``, and their values."""

    def margins(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return the pre-latents of some latents; see `SAEModel.margins`."""
        return self._project(x, latents) + self._take(self.b_enc, latents)

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        return torch.relu(projection + self._take(self.b_enc, latents))

    def _kept(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._choose(self._activate(self._project(x, None), None))

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        kept = scattered(*self._kept(x), self.config.d_sae)
        return kept if latents is None else kept[..., latents]

    def kept_support(self, x: Tensor) -> tuple[Support, Tensor]:
        """Return the projections that an objective is computed from, and the latents made of them.

        Args:
            x: activations ``[..., d_in]``.
        """
        shift = self.b_dec if self.config.apply_b_dec_to_input else None
        live = None
        few = self.kept_per_token <= DENSEST * self.config.d_sae
        if few and LiveSupport.serves(x, self.W_enc_T):
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                live = self._few_kept(x.reshape(-1, x.shape[-1]))
        if live is None:
            support: Support = DenseSupport(x, shift, self.W_enc_T)
            kept = self._choose(self._activate(support.projection, None))
            return support, scattered(*kept, self.config.d_sae)
        support = LiveSupport(x, shift, self.W_enc_T, live.tokens, live.indices)
        return support, self._activate(support.projection, support.latents)
