"""A private name of nnsight, seen in 0.8: whether a wrapper counts the rows of its input has no public name."""

from __future__ import annotations

from typing import Any


def counts_rows(wrapper: Any) -> bool:
    """Whether an nnsight wrapper counts the rows of an invoke; the base class returns 1 for any input."""
    from nnsight.intervention.envoy import Envoy

    return type(wrapper)._batch_size is not Envoy._batch_size
