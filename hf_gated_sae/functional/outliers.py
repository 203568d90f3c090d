"""High-norm tokens: a few activations, such as those at attention sinks, that hold most of the variance of a text.

Metrics that average over tokens, and an SAE trained on them, say little about the other tokens where such activations
are counted. One rule says everywhere which they are: a norm above a multiple of the median norm.
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
    """Return the norm above which an activation is an outlier; None where the median is 0 or no number.

    Args:
        x: activations ``[..., d]`` of text of the kind; at least one.
        multiple: how many times the median norm.

    >>> import torch
    >>> norm_limit(torch.tensor([[3.0, 4.0], [0.0, 5.0], [0.0, 900.0]]))
    50.0
    """
    limit = multiple * float(norms(x).flatten().median())
    return limit if 0 < limit < math.inf else None


def largest_share(x: Tensor, tokens: float = 0.01) -> float:
    """Return which share of the variance the few tokens that are farthest from the mean hold.

    Args:
        x: activations ``[n, d]``.
        tokens: how many tokens are few, as a share of all; at least one.

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
    """Return which activations are outliers, ``[..., d] -> [...]`` bool; none are where there is no limit."""
    if limit is None:
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    return norms(x) > limit
