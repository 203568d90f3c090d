"""The standard (ReLU, L1) SAE: the paper's baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..modeling import Objective, SAEConfig, SAEModel, Sparsity, TrainingLoss, squared_error

if TYPE_CHECKING:
    from .tanh_relu import TanhReLUSAE


@dataclass(frozen=True)
class StandardObjective(Objective):
    """``|y - y^|^2 + lambda |latents|_1``; the decoder's rows are expected to have unit norm.

    Attributes:
        weighted_by_decoder_norm: penalise ``|W_dec[i]| latents_i``, what each latent writes, rather than
            ``latents_i``; for decoders without unit norm, whatever the power of the penalty.

    Source: Bricken et al. 2023; Conerly et al. 2024 for the weights.
    """

    anneals: ClassVar[bool] = True
    penalises: ClassVar[bool] = True

    weighted_by_decoder_norm: bool = False

    def loss(self, sae: StandardSAE | TanhReLUSAE, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Return the objective on some activations; arguments as for `Objective.loss`."""
        support = sae._support(x, -sae.b_enc)
        latents = sae._activate(support.projection, support.latents)
        reconstruction = support.decode(latents, sae.W_dec) + sae.constant(x)
        paid = latents
        if self.weighted_by_decoder_norm:
            paid = latents * sae._take(sae.W_dec.norm(dim=-1), support.latents)
        terms = {
            "reconstruction": squared_error(target, reconstruction),
            "sparsity": sparsity.coefficient * support.mean_sum(sparsity.penalty(paid)),
        }
        return TrainingLoss.of(terms, reconstruction, support.code(latents))


@strict
class StandardSAEConfig(SAEConfig):
    """Configuration of a `StandardSAE`."""

    model_type = "standard_sae"


class StandardSAE(SAEModel):
    """``latents = relu((x - b_dec) @ W_enc + b_enc)``.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: Bricken et al. 2023; section 2 of Rajamanoharan et al. 2024 (arXiv 2404.16014).
    """

    config: StandardSAEConfig
    config_class = StandardSAEConfig
    objective_class = StandardObjective

    def __init__(self, config: StandardSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        return torch.relu(projection + self._take(self.b_enc, latents))

    def _cut(self) -> Tensor:
        return -self.b_enc
