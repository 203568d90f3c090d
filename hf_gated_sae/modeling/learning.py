"""What training needs of an SAE: its objective, and what that is computed from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from ..functional import cpu
from ..functional.dense_support import DenseSupport
from ..functional.linear import linear
from ..functional.parallel import LatentParallelSupport
from ..functional.support import Support
from .dtypes import Widest
from .objective import Objective, Sparsity
from .output import TrainingLoss

if TYPE_CHECKING:
    from .model import SAEModel


class Learning(Widest):
    """An SAE while it is trained.

    Attributes:
        objective_class: what the architecture is trained with; its fields are the variants.
    """

    objective_class: ClassVar[type[Objective]] = Objective

    def training_loss(
        self: SAEModel | Any,
        x: Tensor,
        *,
        target: Tensor | None = None,
        sparsity_coefficient: float = 0.0,
        sparsity_power: float = 1.0,
        objective: Objective | None = None,
    ) -> TrainingLoss:
        """Return the objective that the architecture is trained with, term by term.

        Where few latents are on, on a CPU, the memory of the large gradients stays with the weights once they are
        cleared, for the next step; ``functional.cpu.forget(sae.parameters())`` lets go of it.

        Args:
            x: activations ``[..., d_in]``.
            target: what is to be written, ``[..., d_out]``; `x` itself by default.
            sparsity_coefficient: weight of the sparsity term, in units of a squared error summed over the width.
            sparsity_power: power of the latents in it, for objectives that anneal it.
            objective: a variant; ``objective_class()`` by default.

        Raises:
            InputError: if the SAE normalises its input, or holds only some of its latents.
            ShapeError: if activations or target are not as wide as the SAE.
        """
        if obstacle := self.learning_obstacle():
            raise InputError(f"This {type(self).__name__} has no training loss; it {obstacle}.")
        target = x if target is None else target
        fits = x.shape[-1:] == (self.config.d_in,) and target.shape == (*x.shape[:-1], self.d_out)
        if self.one_site and not fits:
            raise ShapeError(
                f"Given activations {list(x.shape)} and a target {list(target.shape)}, but this SAE reads d_in = "
                f"{self.config.d_in} and writes d_out = {self.d_out}: expected [..., {self.config.d_in}] and "
                f"[..., {self.d_out}]."
            )
        chosen: Objective = self.objective_class() if objective is None else objective
        return chosen.loss(self, x, target, Sparsity(sparsity_coefficient, sparsity_power))

    def forget_statistics(self: SAEModel | Any) -> None:
        """Forget what `record_statistics` remembered: of other weights it would be wrong."""
        self.record_statistics(torch.zeros_like(self.max_activation), torch.zeros_like(self.mean_activation), 0)

    def learning_obstacle(self: SAEModel | Any) -> str:
        """Return why no objective can be computed of this SAE; empty if one can."""
        config = self.config
        if config.kept_latents is not None:
            return f"holds only {config.rows} of its {config.d_sae} latents: load it without latents="
        if config.normalization != "none":
            return (
                f"normalises each token ({config.normalization}), and is therefore no homogeneous function of its "
                "input, as the training in another unit needs: train one with normalization='none', scaled by "
                "activation_scale="
            )
        return ""

    def constant(self: SAEModel | Any, x: Tensor) -> Tensor:
        """Return what is written when no latent is on, in the SAE's own frame.

        Args:
            x: activations ``[..., d_in]``.

        Returns:
            ``[d_out]``; ``[..., d_out]`` where there is a skip connection.
        """
        written: Tensor = self.b_dec
        return written + self._skipped(x) if self.config.skip_connection else written

    def _support(self: SAEModel | Any, x: Tensor, cut: Tensor | None) -> Support:
        """Return the projections that an objective is computed from.

        Args:
            x: activations ``[..., d_in]``.
            cut: ``[d_sae]``; what is at or below it has no part in the objective. None if everything may have.
        """
        shift = self._shift()
        live = None if cut is None else cpu.support_above(x, shift, self.W_enc_T, cut.detach())
        support = DenseSupport(x, shift, self.W_enc_T) if live is None else live
        return support if self.latent_group is None else LatentParallelSupport(support, self.latent_group)

    def margins(self: SAEModel | Any, x: Tensor, latents: Tensor) -> Tensor:
        """Return how far some latents are above the point where they turn on; below it they are negative.

        Where latents compete to be kept, that point is the pre-latent 0.

        Args:
            x: activations ``[n, d_in]``.
            latents: rows ``[m]``.

        Returns:
            ``[n, m]``, with gradients to the encoder and to what decides that point.
        """
        cut = self._cut()
        if cut is None:
            raise NotImplementedError(f"{type(self).__name__} must define margins.")
        return linear(self._centred(x), self.W_enc_T.index_select(0, latents)) - cut.index_select(0, latents)
