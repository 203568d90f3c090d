"""High-norm tokens: a few activations, such as those at attention sinks, that hold most of the variance of a text.

If they are included, metrics that average over tokens say little about all other tokens, and so does an SAE trained on
them. One rule identifies them everywhere: a norm above a multiple of the median norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OUTLIER_MULTIPLE = 10.0
"""Norms above this many times the median are outliers, as in dictionary_learning's activation buffer."""


def norms(x: Tensor) -> Tensor:
    """Return the norm of each activation in float32, ``[..., d] -> [...]``."""
    return x.detach().float().norm(dim=-1)


def norm_limit(x: Tensor, multiple: float = OUTLIER_MULTIPLE) -> float | None:
    """Return the norm above which an activation is an outlier; None if the median is 0, infinite or NaN.

    Args:
        x: activations ``[..., d]`` of similar text; at least one.
        multiple: multiple of the median norm.

    >>> import torch
    >>> norm_limit(torch.tensor([[3.0, 4.0], [0.0, 5.0], [0.0, 900.0]]))
    50.0
    """
    limit = multiple * float(norms(x).flatten().median())
    return limit if 0 < limit < math.inf else None


def largest_share(x: Tensor, tokens: float = 0.01) -> float:
    """Return the share of the variance that the few tokens farthest from the mean account for.

    Args:
        x: activations ``[n, d]``.
        tokens: share of the tokens that counts as few; at least one token is used.

    Returns:
        From 0 to 1; NaN if there is no variance.

    >>> import torch
    >>> round(largest_share(torch.tensor([[1.0], [-1.0]] * 99 + [[60.0], [-60.0]])), 4)
    0.9732
    """
    distances = (x.detach().double() - x.detach().double().mean(0)).square().sum(-1)
    few = distances.topk(max(1, int(tokens * len(distances)))).values if len(distances) else distances
    return float(few.sum() / distances.sum())


def is_outlier(x: Tensor, limit: float | None) -> Tensor:
    """Return which activations are outliers, ``[..., d] -> [...]`` bool; none are without a limit."""
    if limit is None:
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    return norms(x) > limit
