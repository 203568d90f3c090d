"""How far latents are from firing, which is where a gradient can take hold of those that never do."""

from __future__ import annotations

from torch import Tensor

from ..functional.linear import linear
from ..modeling import SAEModel


def pre_latents(sae: SAEModel, x: Tensor, latents: Tensor) -> Tensor:
    """Return how far some latents are above the point where they turn on; below it they are negative.

    Where a latent is a function of its own projection that point is the architecture's (a threshold, a gate's bias);
    where latents compete, it is the pre-latent 0.

    Args:
        sae: the SAE.
        x: activations ``[n, d_in]``.
        latents: indices ``[m]``.

    Returns:
        ``[n, m]``, with gradients to the encoder and to what decides that point.
    """
    projection = linear(sae._centred(x), sae.W_enc.T.index_select(0, latents))
    cut = sae._cut()
    if cut is not None:
        return projection - cut.index_select(0, latents)
    bias = getattr(sae, "b_enc", None)  # what competes by its projection alone has none
    return projection if bias is None else projection + bias.index_select(0, latents)
