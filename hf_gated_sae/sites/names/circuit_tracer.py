"""circuit-tracer: `feature_input_hook` and `feature_output_hook` are TransformerLens's names without the block."""

from __future__ import annotations

from .base import Library, Meaning, libraries


def meaning(name: str) -> Meaning | None:
    """Return nothing: circuit-tracer has no names of its own."""
    return None


libraries.register("circuit_tracer", Library("circuit-tracer", meaning, (), ("transformer_lens",)))
