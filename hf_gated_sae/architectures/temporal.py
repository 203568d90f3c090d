"""The temporal SAE of arXiv 2511.01836: what context predicts, and what is new at each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..errors import InputError, ShapeError
from ..functional import topk
from ..functional.normalization import TokenNormalization
from ..functional.sparse_latents import SparseLatents
from ..modeling import Objective, SAEConfig, SAEModel, SAEOutput, Sparsity, TrainingLoss

NORM_EPS = 1e-6
LARGEST_ATTENTION = 64


@dataclass(frozen=True)
class TemporalObjective(Objective):
    """A placeholder that raises: training needs whole sequences, and the activation stream gives shuffled tokens."""

    def loss(self, sae: SAEModel, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Raise an error that says why there is no objective.

        Raises:
            InputError: always.
        """
        raise InputError(
            "A TemporalSAE cannot be trained here: it learns from whole sequences, and activations come as single "
            "shuffled tokens. Train it with its authors' code (arXiv 2511.01836) and load the checkpoint."
        )


@strict
class TemporalSAEConfig(SAEConfig):
    """Configuration of a `TemporalSAE`.

    Attributes:
        heads: attention heads of each predicting layer.
        attention_layers: number of predicting layers.
        bottleneck: queries and keys are ``d_sae / bottleneck`` wide.
        k: number of novel latents kept per token; None keeps all that are positive.
        scaling_factor: activations are multiplied by this before encoding, and the output is divided by it.
    """

    model_type = "temporal_sae"

    heads: int = 1
    attention_layers: int = 1
    bottleneck: int = 1
    k: int | None = None
    scaling_factor: float = 1.0

    def validate_k(self) -> None:
        """Check that `k` latents exist."""
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise InputError(f"k is {self.k}, expected 1 .. d_sae = {self.d_sae}, or null.")

    def validate_attention(self) -> None:
        """Check that heads divide the widths, and the number of layers."""
        if self.heads < 1 or self.bottleneck < 1 or self.d_sae % (self.heads * self.bottleneck):
            raise InputError(
                f"heads is {self.heads} and bottleneck {self.bottleneck}; expected numbers whose product divides "
                f"d_sae = {self.d_sae}."
            )
        if not 0 <= self.attention_layers <= LARGEST_ATTENTION:
            raise InputError(f"attention_layers is {self.attention_layers}, expected 0 .. {LARGEST_ATTENTION}.")

    def validate_scaling_factor(self) -> None:
        """Check that the scale can be undone."""
        if not 0 < self.scaling_factor < float("inf"):
            raise InputError(f"scaling_factor is {self.scaling_factor}, expected a positive number.")

    def validate_one_width(self) -> None:
        """Check that input and output have one width: what is predicted is subtracted from the input."""
        if self.d_out not in (None, self.d_in):
            raise InputError(f"d_out is {self.d_out} and d_in is {self.d_in}; a temporal SAE needs one width.")


class ContextAttention(nn.Module):
    """Attention of each token's codes over those of the tokens before it, ``[..., seq, d_sae]``."""

    def __init__(self, config: TemporalSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__()
        self.heads = config.heads
        narrow = config.d_sae // config.bottleneck
        self.query = nn.Linear(config.d_sae, narrow)
        self.key = nn.Linear(config.d_sae, narrow)
        self.value = nn.Linear(config.d_sae, config.d_sae)
        self.output = nn.Linear(config.d_sae, config.d_sae)

    def forward(self, codes: Tensor) -> Tensor:
        """Return ``relu(output(attention(query(codes), key(earlier), value(earlier))))``.

        ``earlier`` is ``codes`` one position later, with zeros at the first; the attention is causal.
        """
        earlier = torch.cat([torch.zeros_like(codes[..., :1, :]), codes[..., :-1, :]], dim=-2)
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for projected in (self.query(codes), self.key(earlier), self.value(earlier))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return torch.relu(self.output(attended.transpose(-3, -2).flatten(-2)))


class TemporalSAE(SAEModel):
    """An SAE whose attention predicts part of each activation from earlier ones; latents are sparse codes of the rest.

    ``r = scaling_factor * x - b_dec``, ``E = W_enc / (4 d_in)``. Each layer:
    ``p = relu(attention(relu(r @ E)))``; ``s = <p @ W_dec, r> / (|p @ W_dec| + 1e-6)^2``; ``predicted += s * p``;
    ``r -= s * p @ W_dec``. Then ``latents = topk(relu(r @ E), k)``, and
    ``reconstruction = ((latents + predicted) @ W_dec + b_dec) / scaling_factor``.

    A token's latents depend on all tokens before it: give whole sequences ``[..., seq, d_in]``, from the first
    position on. The predicted part is not sparse, and not among the latents; `decode` computes it from the
    activations, which it therefore needs. Edits of latents change what is written as in any other SAE.

    Attributes:
        attention: the predicting layers.

    Source: arXiv 2511.01836; scales and epsilon as in the published code.
    """

    config: TemporalSAEConfig
    config_class = TemporalSAEConfig
    objective_class = TemporalObjective
    elementwise: ClassVar[bool] = False
    sliceable: ClassVar[bool] = False  # the attention reads and writes all of them
    per_token: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False  # the attention has biases of its own

    def __init__(self, config: TemporalSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.attention = nn.ModuleList([ContextAttention(config) for _ in range(config.attention_layers)])
        self.post_init()

    def token_normalization(self, x: Tensor) -> TokenNormalization:
        """Return the configuration's normalisation combined with its `scaling_factor`."""
        one = torch.ones_like(x[..., :1])
        token_normalization = super().token_normalization(x) or TokenNormalization(torch.zeros_like(one), one, one)
        factor = self.config.scaling_factor
        return TokenNormalization(
            token_normalization.shift, token_normalization.divisor / factor, token_normalization.scale / factor
        )

    def _output_normalization(self, x: Tensor | None) -> TokenNormalization:
        return self.token_normalization(self._needed(x))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the novel and the predicted codes.

        Args:
            x: whole sequences of activations ``[..., seq, d_in]``.

        Returns:
            The latents, and what context predicts, both ``[..., seq, d_sae]``.

        Raises:
            ShapeError: if `x` has no axis of positions.
        """
        residual, predicted = self._predict(self._normalized(x))
        return self._novel(residual), predicted

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        novel = self._novel(self._predict(x)[0])
        return novel if latents is None else novel[..., latents]

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split normalised activations into what context does not predict ``[..., d_in]`` and the predicted codes."""
        if x.ndim < 2:
            raise ShapeError(
                f"Given activations {list(x.shape)}, but a temporal SAE reads whole sequences: expected "
                f"[..., seq, {self.config.d_in}]."
            )
        residual = x - self.b_dec if self.config.apply_b_dec_to_input else x
        predicted = residual.new_zeros(*residual.shape[:-1], self.config.d_sae)
        for layer in self.attention:
            codes = layer(torch.relu(self._scores(residual)))
            written = codes @ self.W_dec
            length = written.norm(dim=-1, keepdim=True) + NORM_EPS
            share = (written * residual).sum(-1, keepdim=True) / length.square()
            predicted = predicted + share * codes
            residual = residual - share * written
        return residual, predicted

    def _scores(self, residual: Tensor) -> Tensor:
        return nn.functional.linear(residual / (4 * self.config.d_in), self.W_enc_T)

    def _novel(self, residual: Tensor) -> Tensor:
        scores = self._scores(residual)
        return torch.relu(scores) if self.config.k is None else topk(scores, self.config.k)

    def decode(self, latents: Tensor | SparseLatents, x: Tensor | None = None) -> Tensor:
        """Turn latents and what context predicts into a reconstruction.

        Args:
            latents: ``[..., seq, d_sae]``, or those that are on.
            x: the activations ``[..., seq, d_in]`` that were encoded; always needed.

        Returns:
            Reconstruction ``[..., seq, d_in]``.

        Raises:
            ShapeError: if the last axis is not `d_sae` wide.
            InputError: if `x` is not given.
        """
        if isinstance(latents, SparseLatents):
            latents = latents.dense()
        if latents.shape[-1:] == (self.config.d_sae,):  # else the base class raises
            latents = latents + self.codes(self._needed(x))[1]
        return super().decode(latents, x)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode; the prediction is computed once."""
        novel, predicted = self.codes(x)
        return SAEOutput(reconstruction=super().decode(novel + predicted, x), latents=novel)
