"""SAELens: `hook_name` is TransformerLens's, or the path of a module of transformers."""

from __future__ import annotations

from .base import Library, Meaning, libraries


def meaning(name: str) -> Meaning | None:
    """Return nothing: SAELens has no names of its own."""
    return None


libraries.register("saelens", Library("SAELens", meaning, (), ("transformer_lens", "sparsify")))
