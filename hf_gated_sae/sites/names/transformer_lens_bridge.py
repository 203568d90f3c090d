"""TransformerLens's `TransformerBridge`: the names that stand for another tensor than in `HookedTransformer`."""

from __future__ import annotations

from ...hub.hook_names import split
from .base import LAYER, Library, Meaning, libraries

IN_BLOCK = {"hook_attn_in": "attn_in", "hook_mlp_in": "mlp_in"}
"""Inputs of the sublayers, after the norm; in `HookedTransformer` these names are the stream before the norm."""


def meaning(name: str) -> Meaning | None:
    """Return the meaning of a hook point of the bridge.

    Source: TransformerLens, ``BlockBridge.hook_aliases``.
    """
    layer, suffix = split(name)
    return Meaning(f"{IN_BLOCK[suffix]}.{LAYER}", layer) if suffix in IN_BLOCK else None


libraries.register(
    "transformer_lens_bridge",
    Library("TransformerBridge", meaning, tuple(f"blocks.L.{name}" for name in IN_BLOCK), ("transformer_lens",)),
)
