"""The matching-pursuit SAE (Costa et al. 2025, arXiv 2506.03093), with SAELens's rules for when to stop."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ..errors import InputError
from ..functional.linear import linear
from ..modeling import SAEConfig, SAEModel


@strict
class MatchingPursuitSAEConfig(SAEConfig):
    """Configuration of a `MatchingPursuitSAE`.

    Attributes:
        residual_threshold: a token is done when the norm of its residual is below this; 0 turns the rule off.
        max_iterations: largest number of steps per token; `d_in` by default.
        stop_on_duplicate_support: a token is done when a step has turned on no new latent.
    """

    model_type = "matching_pursuit_sae"

    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True

    def validate_stopping(self) -> None:
        """Check the settings of the stopping rules."""
        if self.max_iterations is not None and self.max_iterations < 1:
            raise InputError(f"max_iterations is {self.max_iterations}, expected at least 1.")
        if not (math.isfinite(self.residual_threshold) and self.residual_threshold >= 0):
            raise InputError(f"residual_threshold is {self.residual_threshold}, expected a finite number >= 0.")

    def validate_tied(self) -> None:
        """Check that input and output have one width, as encoder and decoder are the same vectors."""
        if self.d_out not in (None, self.d_in):
            raise InputError(
                f"d_out is {self.d_out} and d_in is {self.d_in}; expected one width for both, as the decoder's rows "
                "are also the encoder's."
            )


class MatchingPursuitSAE(SAEModel):
    """An SAE that chooses latents one after the other, each from what those before it have left over.

    ``r = x - b_dec``; then, until done: ``j = argmax(relu(W_dec @ r))``; ``v = relu(r . W_dec[j])``;
    ``latents[j] += v``; ``r -= v * W_dec[j]``. Expects decoder rows of about unit norm.

    Source: arXiv 2506.03093, section 3; stopping rules as in SAELens.
    """

    config: MatchingPursuitSAEConfig
    config_class = MatchingPursuitSAEConfig
    elementwise: ClassVar[bool] = False  # each latent depends on what the others have left over
    tied: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = False  # residual_threshold, in the configuration, is measured in activations

    def __init__(self, config: MatchingPursuitSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.post_init()

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        centred = self._centred(x)
        found = self._pursue(centred.reshape(-1, self.config.d_in))
        found = found.reshape(*x.shape[:-1], self.config.d_sae)
        return found if latents is None else found[..., latents]

    def margins(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return the first scores of some latents, which compete; see `SAEModel.margins`."""
        return linear(self._centred(x), self.W_dec.index_select(0, latents))

    def _pursue(self, residual: Tensor) -> Tensor:
        """Pursue each row of ``[tokens, d_in]`` until all are done; return the latents ``[tokens, d_sae]``."""
        config = self.config
        latents = residual.new_zeros(len(residual), config.d_sae)
        done = torch.zeros(len(residual), dtype=torch.bool, device=residual.device)
        for _ in range(config.max_iterations or config.d_in):
            with torch.no_grad():  # which latent is chosen has no gradient, and its scores need not be kept for one
                chosen = torch.relu(residual @ self.W_dec.T).argmax(-1)
            rows = self.W_dec[chosen]
            values = torch.relu((residual * rows).sum(-1, keepdim=True)) * ~done[:, None]
            before = latents.detach() != 0
            latents = latents.scatter_add(-1, chosen[:, None], values)
            residual = residual - values * rows
            if config.stop_on_duplicate_support:
                done = done | ((latents.detach() != 0) == before).all(-1)
            if config.residual_threshold > 0:
                done = done | (residual.detach().norm(dim=-1) < config.residual_threshold)
            # A compiled graph cannot end early; further steps change nothing in tokens that are done.
            if not torch.compiler.is_compiling() and bool(done.all()):
                break
        return latents
