"""Write SAEs and transcoders with EleutherAI's sparsify. Usage: write_sparsify.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from cases import D_IN, inputs, scramble, write_case, write_versions
from sparsify import SaeConfig, SparseCoder
from sparsify.__main__ import RunConfig

PLAN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "topk": ("layers.3", {"k": 4, "expansion_factor": 3}, {"site": "resid_post.3", "k": 4}),
    "not_normalised": ("layers.3", {"k": 4, "num_latents": 24, "normalize_decoder": False}, {"d_sae": 24}),
    "multi_topk": ("layers.3", {"k": 4, "num_latents": 24, "multi_topk": True}, {"k": 4}),
    "groupmax": ("layers.3/seed1", {"k": 6, "num_latents": 24, "activation": "groupmax"}, {"site": "resid_post.3"}),
    "skip": ("h.2", {"k": 4, "num_latents": 24, "skip_connection": True}, {"site": "resid_post.2"}),
    "transcoder": (
        "layers.1.mlp",
        {"k": 4, "num_latents": 24, "transcode": True},
        {"site": "layers.1.mlp.input", "site_out": "layers.1.mlp.output"},
    ),
    "skip_transcoder": (
        "layers.1.mlp",
        {"k": 4, "num_latents": 24, "transcode": True, "skip_connection": True},
        {"base_model": "acme/lm", "base_model_revision": "step10"},
    ),
    "groupmax_transcoder": (
        "layers.1",
        {"k": 6, "num_latents": 24, "transcode": True, "activation": "groupmax"},
        {"site": "resid_pre.1", "site_out": "resid_post.1"},
    ),
}


@torch.no_grad()
def main(root: Path) -> None:
    """Write every case."""
    write_versions(root, "eai-sparsify")
    x = inputs()
    for name, (address, settings, expected) in PLAN.items():
        config = SaeConfig(**settings)
        coder = SparseCoder(D_IN, config)
        scramble(coder)
        repository = root / name / "repository"
        coder.save_to_disk(repository / address)
        run = RunConfig(sae=config, model="acme/lm", revision="step10", hookpoints=[address.partition("/")[0]])
        run.save_json(repository / "config.json")
        coder = SparseCoder.load_from_disk(repository / address)
        values, places, before = coder.encode(x)
        latents = torch.zeros_like(before).scatter(-1, places, values)
        # With `multi_topk` the library's forward gives what its second, wider loss reconstructs; decoding does not.
        output = coder.decode(values, places) if config.multi_topk else coder(x).sae_out
        write_case(root, name, address, x, latents, output, **expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
