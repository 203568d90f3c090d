"""Measure one load in its own process: `python loading.py WHAT PATH [LATENTS]` prints JSON.

Run by the interpreter of the library that is measured, so that every library has its own environment. Times are CPU
seconds since the end of the imports: `load` until the SAE is loaded, `encode` until a first prompt of 128 tokens is
encoded. `process` includes the imports.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

D_IN, D_SAE, TOKENS = 2304, 65536, 128


def resident() -> int:
    """Memory of this process in bytes, without pages of mapped files that could be dropped at any time."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def read_bytes(path: Path) -> None:
    """The lower bound: the file's bytes, read once."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 22)
        while file.readinto(buffer):
            pass


def ours(path: Path, latents: list[int] | None) -> Any:
    from hf_gated_sae import SAEModel

    return SAEModel.from_pretrained(path.parent, latents=latents)


def saelens_npz(path: Path) -> Any:
    """SAELens's own Gemma Scope loader, its download replaced by the local file."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders

    pretrained_sae_loaders.hf_hub_download = lambda *_, **__: str(path)
    return SAE.from_pretrained("gemma-scope-2b-pt-res", "layer_12/width_65k/average_l0_72")


def saelens(path: Path) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(str(path.parent))


def dictionary_learning(path: Path) -> Any:
    from dictionary_learning.dictionary import JumpReluAutoEncoder

    return JumpReluAutoEncoder.from_pretrained(str(path))


IMPORTS = {
    "bytes": (),
    "ours": (
        "torch",
        "transformers.modeling_utils",
        "hf_gated_sae.architectures",
        "hf_gated_sae.formats",
        "hf_gated_sae.formats._opening",
    ),
    "saelens": ("sae_lens", "sae_lens.loading.pretrained_sae_loaders"),
    "saelens_npz": ("sae_lens", "sae_lens.loading.pretrained_sae_loaders"),
    "dictionary_learning": ("dictionary_learning.dictionary",),
}
"""What each load imports first, outside the measured time."""


def main(what: str, path: Path, latents: list[int] | None) -> dict[str, float]:
    start = time.process_time()
    for module in IMPORTS[what]:
        importlib.import_module(module)
    if what == "ours":  # the registries import their modules on first use
        from hf_gated_sae.architectures import architectures
        from hf_gated_sae.formats import formats

        list(architectures), list(formats)
    imported, wall, before = time.process_time(), time.perf_counter(), resident()
    if what == "bytes":
        read_bytes(path)
        sae = None
    elif what == "ours":
        sae = ours(path, latents)
    else:
        sae = {"saelens_npz": saelens_npz, "saelens": saelens, "dictionary_learning": dictionary_learning}[what](path)
    loaded, loaded_wall = time.process_time(), time.perf_counter()
    if sae is not None:
        import torch

        with torch.no_grad():
            x = torch.ones(TOKENS, D_IN)
            sae.encode(x, latents) if latents else sae.encode(x)
    return {
        "load": loaded - imported,
        "load_wall": loaded_wall - wall,
        "encode": time.process_time() - imported,
        "process": time.process_time() - start,
        "memory": resident() - before,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "bytes_read": getattr(getattr(sae, "checkpoint", None), "bytes_read", 0),
    }


if __name__ == "__main__":
    chosen = [int(latent) for latent in sys.argv[3].split(",")] if len(sys.argv) > 3 else None
    sys.stdout.write("RESULT " + json.dumps(main(sys.argv[1], Path(sys.argv[2]), chosen)) + "\n")
