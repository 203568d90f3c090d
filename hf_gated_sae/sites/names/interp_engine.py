"""interp-engine (Neuronpedia): points such as ``mlp_out_post.4``, and module paths after ``path.``."""

from __future__ import annotations

import re

from .base import LAYER, Library, Meaning, libraries

POINTS = {
    "resid_pre": ("resid_pre", False),
    "attn_in": ("attn_in", False),
    "z": ("attn_z", False),
    "attn_out": ("attn_in", True),
    "attn_out_post": ("attn_out", False),
    "resid_mid": ("resid_mid", False),
    "mlp_in": ("mlp_in", False),
    "mlp_act": ("mlp_neurons", False),
    "mlp_out": ("mlp_in", True),
    "mlp_out_post": ("mlp_out", False),
    "resid_post": ("resid_post", False),
}
"""Site of each point of a block, and whether the point is the output of the module that reads the site.

Its ``mlp_out`` is the feed-forward's output; ours, what is added to the stream, is its ``mlp_out_post``.
"""
ENDS = {"embeddings": "embed", "final_norm": "final_norm"}
KNOWN = (*(f"{point}.L" for point in POINTS), *ENDS, "path.MODULE")

_POINT = re.compile(r"([a-z_]+)(?:\.([0-9]+))?")


def meaning(name: str) -> Meaning | None:
    """Return the meaning of an address.

    Source: decoderesearch/interp-engine, ``docs/ENGINE_HOOK_MAPPINGS.md`` and ``address.py``.
    """
    head, _, path = name.partition(".")
    if head == "path" and path:
        return Meaning(f"{path}.output")
    if name in ENDS:
        return Meaning(ENDS[name])
    point = _POINT.fullmatch(name)
    if point is None or point[1] not in POINTS:
        return None
    site, of_module = POINTS[point[1]]
    return Meaning(f"{site}.{LAYER}", None if point[2] is None else int(point[2]), of_module)


libraries.register("interp_engine", Library("interp-engine", meaning, KNOWN))
