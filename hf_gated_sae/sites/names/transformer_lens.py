"""TransformerLens: the hook points of `HookedTransformer`, and those of the bridge with the same meaning."""

from __future__ import annotations

from ...hub.hook_names import GLOBAL, IN_BLOCK, MODULE_OUTPUTS, split
from ..transforms import NORM_NO_GAIN
from .base import LAST, LAYER, Library, Meaning, libraries

ENDS = {
    **GLOBAL,
    "ln_final.hook_in": f"resid_post.{LAST}",
    "ln_final.hook_normalized": f"resid_post.{LAST}|{NORM_NO_GAIN}",
    "ln_final.hook_out": "final_norm",
    "unembed.hook_in": "final_norm",
}
"""Names outside the blocks."""
KNOWN = (*(f"blocks.L.{name}" for name in IN_BLOCK), *ENDS)


def meaning(name: str) -> Meaning | None:
    """Return the meaning of a hook point, with or without its block.

    Source: TransformerLens, ``components`` and ``model_bridge/generalized_components``.
    """
    if name in ENDS:
        return Meaning(ENDS[name])
    layer, suffix = split(name)
    if suffix not in IN_BLOCK:
        return None
    kind, normalization = IN_BLOCK[suffix]
    if suffix in MODULE_OUTPUTS:
        return Meaning(f"{MODULE_OUTPUTS[suffix].site_in}.{LAYER}", layer, of_module=True)
    return Meaning(f"{kind}.{LAYER}" + (f"|{NORM_NO_GAIN}" if normalization == "rms_norm" else ""), layer)


libraries.register("transformer_lens", Library("TransformerLens", meaning, KNOWN))
