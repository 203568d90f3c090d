"""The TopK SAE of Gao et al. 2024 (arXiv 2406.04093)."""

from __future__ import annotations

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..errors import InputError
from ..functional import screen
from ..functional.activations import scattered, topk_places
from ..functional.live import LiveLatents
from ..modeling import SAEConfig, SAEModel, TrainingLoss
from ..modeling.output import reconstruction_loss


@strict
class TopKSAEConfig(SAEConfig):
    """Configuration of a `TopKSAE`.

    Attributes:
        k: number of latents kept per token.
        rectified: whether a ReLU precedes the selection; without one negative latents are kept where fewer than `k`
            pre-latents are positive.
        rank_by_decoder_norm: whether the latents that are kept are those with the largest ``value * |W_dec[i]|``.
    """

    model_type = "topk_sae"

    k: int = 32
    rectified: bool = True
    rank_by_decoder_norm: bool = False

    def validate_k(self) -> None:
        """Check that `k` latents exist."""
        if not 1 <= self.k <= self.d_sae:
            raise InputError(f"k is {self.k}, expected 1 .. d_sae = {self.d_sae}.")


class TopKSAE(SAEModel):
    """``latents = topk(relu((x - b_dec) @ W_enc + b_enc), k)``.

    Without ``config.rectified`` there is no ReLU; with ``config.rank_by_decoder_norm`` the `k` latents are chosen by
    what they would write, ``value * |W_dec[i]|``, and keep their value.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: arXiv 2406.04093, section 2.3.
    """

    config: TopKSAEConfig
    config_class = TopKSAEConfig
    elementwise: ClassVar[bool] = False  # whether a latent is kept depends on all others

    def __init__(self, config: TopKSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.signed = not config.rectified  # type: ignore[misc]  # of this class it is a matter of the configuration
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        kept = scattered(*self._kept(x), self.config.d_sae)
        return kept if latents is None else kept[..., latents]

    def _kept(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.W_dec.detach().norm(dim=-1) if self.config.rank_by_decoder_norm else None
        pre_latents = self._project(x, None) + self.b_enc
        return topk_places(pre_latents, self.config.k, rectified=self.config.rectified, weights=weights)

    def _few_kept(self, x: Tensor) -> LiveLatents | None:
        found = None
        if not self.config.rank_by_decoder_norm:
            found = screen.highest(self._centred(x), self.W_enc_T, self.b_enc, self.config.k)
        if found is None:
            return super()._few_kept(x)
        indices, values = found
        return LiveLatents.from_places(
            indices, torch.relu(values) if self.config.rectified else values, self.config.d_sae
        )

    def training_loss(self, x: Tensor, *, sparsity_coefficient: float = 0.0) -> TrainingLoss:
        """``|x - x^|^2``; sparsity is exact by construction and `sparsity_coefficient` has no effect."""
        return reconstruction_loss(self, x)
