"""The AbsTopK SAE of arXiv 2510.00404: latents of both signs."""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor

from ..errors import InputError
from ..modeling import SAEConfig, TopKBaseSAE


@strict
class AbsTopKSAEConfig(SAEConfig):
    """Configuration of an `AbsTopKSAE`.

    Attributes:
        k: number of latents kept per token.
    """

    model_type = "abs_topk_sae"

    k: int = 32

    def validate_k(self) -> None:
        """Check that `k` latents exist."""
        if not 1 <= self.k <= self.d_sae:
            raise InputError(f"k is {self.k}, expected 1 .. d_sae = {self.d_sae}.")


class AbsTopKSAE(TopKBaseSAE):
    """``z = (x - b_dec) @ W_enc + b_enc``; ``latents = z * [|z| is among the k largest]``.

    One latent stands for a direction and its opposite, so that latents may be negative.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: arXiv 2510.00404.
    """

    config: AbsTopKSAEConfig
    config_class = AbsTopKSAEConfig
    signed: ClassVar[bool] = True

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        return projection + self._take(self.b_enc, latents)

    @property
    def latents_per_token(self) -> int:
        """Number of latents kept per token."""
        return self.config.k

    def _choose(self, values: Tensor) -> tuple[Tensor, Tensor]:
        indices = values.abs().topk(self.config.k, dim=-1, sorted=False).indices
        return indices, values.gather(-1, indices)
