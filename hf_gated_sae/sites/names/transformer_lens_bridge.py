"""TransformerLens's `TransformerBridge`, as far as it means another tensor than `HookedTransformer` by a name."""

from __future__ import annotations

from ...hub.hook_names import split
from .base import LAYER, Library, Meaning, libraries

IN_BLOCK = {"hook_attn_in": "attn_in", "hook_mlp_in": "mlp_in"}
"""What the sublayer takes, behind the norm; `HookedTransformer` calls copies of the stream before it so."""


def meaning(name: str) -> Meaning | None:
    """Return what a hook point of the bridge is.

    Source: TransformerLens, ``BlockBridge.hook_aliases``.
    """
    layer, suffix = split(name)
    return Meaning(f"{IN_BLOCK[suffix]}.{LAYER}", layer) if suffix in IN_BLOCK else None


libraries.register(
    "transformer_lens_bridge",
    Library("TransformerBridge", meaning, tuple(f"blocks.L.{name}" for name in IN_BLOCK), ("transformer_lens",)),
)
