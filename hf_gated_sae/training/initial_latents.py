"""Initial values of a latent's biases and thresholds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling import SAEModel


def initial_vectors(sae: SAEModel) -> dict[str, Tensor]:
    """Return the initial per-latent parameters of this architecture, other than encoder and decoder directions.

    These are biases (mostly 0) and thresholds, and, as a column ``[d_sae, 1]``, further matrices that start with one
    value everywhere, such as the second encoder of a GLU.

    Args:
        sae: of the architecture and width; its own weights are not read.

    Returns:
        ``[d_sae]`` or ``[d_sae, 1]`` by name, on the SAE's device.
    """
    settings = {name: getattr(sae.config, name) for name in sae.config.own_fields()}
    thin = {**settings, "d_in": 1, "d_out": 1}  # these parameters do not depend on the widths
    with torch.random.fork_rng(devices=[]):
        new = type(sae)(type(sae.config)(**thin))
    device, d_sae = sae.W_dec.device, sae.config.d_sae
    directions = {"b_dec", "W_dec", "W_skip", *sae.encoder_names}
    return {
        name: parameter.detach().to(device)
        for name, parameter in new.named_parameters()
        if name not in directions and parameter.shape in ((d_sae,), (d_sae, 1))
    }
