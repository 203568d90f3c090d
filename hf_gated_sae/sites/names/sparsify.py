"""EleutherAI's sparsify: the path of a module inside the base model, which stands for the module's output."""

from __future__ import annotations

from ...formats.sparsify import is_module, sites_of
from .base import Library, Meaning, libraries


def meaning(name: str) -> Meaning | None:
    """Return the output of the module; for a block, the residual stream after it.

    Source: EleutherAI/sparsify, ``trainer.py``.
    """
    hooked = any(part.startswith("hook_") for part in name.split("."))  # a TransformerLens hook point, not a module
    return Meaning(sites_of(name)[1]) if is_module(name) and not hooked else None


libraries.register("sparsify", Library("sparsify", meaning, ("layers.L", "layers.L.mlp", "layers.L.self_attn")))
