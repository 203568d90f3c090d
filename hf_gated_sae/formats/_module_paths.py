"""Translate module paths of Gemma 2 and 3, by which Gemma Scope 2 names sites."""

from __future__ import annotations

import re

from ..errors import CheckpointError

IN_BLOCK = {
    "input": "resid_pre",
    "output": "resid_post",
    "input_layernorm.input": "resid_pre",
    "input_layernorm.output": "attn_in",
    "self_attn.o_proj.input": "attn_z",
    "post_attention_layernorm.output": "attn_out",
    "pre_feedforward_layernorm.input": "resid_mid",
    "pre_feedforward_layernorm.output": "mlp_in",
    "mlp.input": "mlp_in",
    "mlp.down_proj.input": "mlp_neurons",
    "post_feedforward_layernorm.output": "mlp_out",
}
"""Sites inside a block. A norm is applied to the outputs of attention and MLP before they are added to the stream, so
the output of ``mlp`` itself has no semantic name and keeps its path."""

_BLOCK = re.compile(r"(?:\w+\.)*?layers\.(\d{1,4})\.(.+)")
_PATH = re.compile(r"\w+(\.\w+)*\.(input|output)")
_EMBEDDING = re.compile(r"(?:\w+\.)*embed_tokens\.output")


def site_of_path(path: str) -> str:
    """Return the site at the input or output of a module of Gemma.

    The path before the list of blocks is ignored: it differs between text models and multimodal ones.

    Args:
        path: such as ``"model.layers.12.output"`` or ``"model.language_model.layers.3.mlp.input"``.

    Returns:
        A semantic name where there is one, else the path.

    Raises:
        CheckpointError: if it is not a module path that ends in ``.input`` or ``.output``.

    >>> site_of_path("model.language_model.layers.12.post_feedforward_layernorm.output")
    'mlp_out.12'
    >>> site_of_path("model.layers.3.mlp.output")
    'model.layers.3.mlp.output'
    """
    if _PATH.fullmatch(path) is None:
        raise CheckpointError(
            f"The checkpoint names the site {path[:120]!r}; expected a module path that ends in '.input' or "
            "'.output', such as 'model.layers.12.output'."
        )
    if _EMBEDDING.fullmatch(path):
        return "embed"
    block = _BLOCK.fullmatch(path)
    if block is None or block[2] not in IN_BLOCK:
        return path
    return f"{IN_BLOCK[block[2]]}.{int(block[1])}"
