"""nnterp: accessors such as ``layers_output[3]``, on modules that it renames."""

from __future__ import annotations

import re

from .base import LAYER, Library, Meaning, libraries

ACCESSORS = {
    ("layers", "input"): (f"resid_pre.{LAYER}", False),
    ("layers", "output"): (f"resid_post.{LAYER}", False),
    ("attentions", "input"): (f"attn_in.{LAYER}", False),
    ("attentions", "output"): (f"attn_in.{LAYER}", True),
    ("mlps", "input"): (f"mlp_in.{LAYER}", False),
    ("mlps", "output"): (f"mlp_in.{LAYER}", True),
}
"""Site of each accessor, and whether the accessor is the output of the module that reads the site.

nnterp has no accessor for norms after attention and MLP, and on bloom and mpt its ``mlps_output`` is the whole stream.
"""
ENDS = {"token_embeddings": "embed", "embed_tokens.output": "embed", "ln_final.output": "final_norm"}
MODULES = {"self_attn": "attentions", "mlp": "mlps"}
KNOWN = (*(f"{what}_{side}[L]" for what, side in ACCESSORS), *ENDS)

_ACCESSOR = re.compile(r"(?:\w+\.)?(layers|attentions|mlps)(?:_(input|output)\[(\d+)\]|\[(\d+)\]\.(input|output))")
_MODULE = re.compile(r"(?:\w+\.)?layers\[(\d+)\]\.(self_attn|mlp)\.(input|output)")


def meaning(name: str) -> Meaning | None:
    """Return the meaning of an accessor, with or without a variable for the model before it.

    Source: nnterp, ``StandardizedTransformer``.
    """
    if name in ENDS:
        return Meaning(ENDS[name])
    if accessor := _ACCESSOR.fullmatch(name):
        what, side, layer = accessor[1], accessor[2] or accessor[5], accessor[3] or accessor[4]
    elif module := _MODULE.fullmatch(name):
        what, side, layer = MODULES[module[2]], module[3], module[1]
    else:
        return None
    site, of_module = ACCESSORS[what, side]
    return Meaning(site, int(layer), of_module)


libraries.register("nnterp", Library("nnterp", meaning, KNOWN))
