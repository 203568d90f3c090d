"""The architectures by name; each file of `architectures/` registers its class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import Registry

if TYPE_CHECKING:
    from .model import SAEModel

architectures: Registry[type[SAEModel]] = Registry("architecture", "hf_gated_sae.architectures")
