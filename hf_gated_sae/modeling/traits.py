"""What code that works with any architecture may want to know of it."""

from __future__ import annotations

from typing import ClassVar

from .printing import Introduction


class ArchitectureTraits(Introduction):
    """Properties of an architecture, all as the paper's SAE has them; a class that differs says so."""

    elementwise: ClassVar[bool] = True
    """Whether a latent depends on its own pre-latent only, so that a few latents cost a few encoder rows."""

    sliceable: ClassVar[bool] = True
    """Whether a few latents can be held alone: whether every tensor is one row per latent, or shared by all."""

    per_token: ClassVar[bool] = True
    """Whether a token's latents depend on that token alone. Otherwise `encode` and `decode` need whole sequences,
    ``[..., seq, d_in]`` from the first position on, and `decode` needs the activations, too."""

    one_site: ClassVar[bool] = True
    """Whether one vector of one site is encoded by itself. Otherwise `input_shape` begins with an axis of sites, and
    there is no single `W_enc_T` or `W_dec`."""

    signed: ClassVar[bool] = False
    """Whether latents can be negative."""

    tied: ClassVar[bool] = False
    """Whether the encoder is the decoder's transpose: there is no `W_enc_T`, and `d_out` is `d_in`."""

    encoder_names: ClassVar[tuple[str, ...]] = ("W_enc_T",)
    """Matrices ``[d_sae, d_in]`` of which a row is a direction that is read; a new latent's are all the same."""

    homogeneous: ClassVar[bool] = True
    """Whether input, biases and thresholds times a positive factor give latents and output times that factor."""
