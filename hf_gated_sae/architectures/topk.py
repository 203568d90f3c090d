"""The TopK SAE of Gao et al. 2024 (arXiv 2406.04093)."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ..errors import InputError
from ..functional import cpu
from ..functional.activations import topk_indices
from ..modeling import SAEConfig, TopKBaseSAE


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


class TopKSAE(TopKBaseSAE):
    """``latents = topk(relu((x - b_dec) @ W_enc + b_enc), k)``.

    Without ``config.rectified`` there is no ReLU; with ``config.rank_by_decoder_norm`` the `k` latents are chosen by
    what they would write, ``value * |W_dec[i]|``, and keep their value.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: arXiv 2406.04093, section 2.3.
    """

    config: TopKSAEConfig
    config_class = TopKSAEConfig

    def __init__(self, config: TopKSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.signed = not config.rectified  # type: ignore[misc]  # here it depends on the configuration

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        pre_latents = projection + self._take(self.b_enc, latents)
        return torch.relu(pre_latents) if self.config.rectified else pre_latents

    @property
    def latents_per_token(self) -> int:
        """Number of latents kept per token."""
        return self.config.k

    def _choose(self, values: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.W_dec.detach().norm(dim=-1) if self.config.rank_by_decoder_norm else None
        return topk_indices(values, self.config.k, rectified=False, weights=weights)

    def _highest(self, x: Tensor, *, rounding: bool = False) -> tuple[Tensor, Tensor] | None:
        if self.config.rank_by_decoder_norm:
            return None
        return cpu.highest(self._centred(x), self.W_enc_T, self.b_enc, self.config.k, rounding=rounding)
