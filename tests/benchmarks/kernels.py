"""Measure one way to encode and decode in its own process: `python kernels.py WHAT FOLDER`.

Run by the interpreter of the library that is measured. The folder holds the weights and the activations, which are the
same for all. Each line on standard input is a command that runs it once and is answered by one line of JSON, beginning
with `RESULT`, so that several processes can take turns. `run` gives seconds, also of CPU time; `check` gives a few
values of the reconstruction; `memory` gives the bytes by which the process grew at its peak.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

D_IN, D_SAE, TOKENS, K = 2304, 16384, 4096, 64

Run = Callable[[torch.Tensor], torch.Tensor]


def filled(module: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Set parameters by name."""
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        getattr(module.get_submodule(owner), last).data = tensor
    return module.eval()


def ours(architecture: str, w: dict[str, torch.Tensor], **settings: Any) -> Any:
    from hf_gated_sae.architectures import architectures

    sae_class = architectures[architecture]
    sae = sae_class(sae_class.config_class(d_in=D_IN, d_sae=D_SAE, **settings))
    biases = {
        "gated": {"b_gate": w["b_gate"], "b_mag": w["b_mag"], "r_mag": w["r_mag"]},
        "jumprelu": {"b_enc": w["b_enc"], "threshold": w["threshold"]},
        "topk": {"b_enc": w["b_enc"]},
    }
    return filled(sae, {name: w[name] for name in ("W_enc_T", "W_dec", "b_dec")} | biases[architecture])


def ours_gated(w: dict[str, torch.Tensor]) -> Run:
    return ours("gated", w).reconstruct


def ours_gated_unscreened(w: dict[str, torch.Tensor]) -> Run:
    from hf_gated_sae.functional.cpu import bf16_screening

    bf16_screening.serves = lambda *_: False
    return ours("gated", w).reconstruct


def ours_gated_bf16(w: dict[str, torch.Tensor]) -> Run:
    sae = ours("gated", w).to(torch.bfloat16)
    return lambda x: sae.reconstruct(x.bfloat16())


def ours_gated_live(w: dict[str, torch.Tensor]) -> Run:
    sae = ours("gated", w)
    return lambda x: sae.encode_sparse(x).values


def ours_gated_whole(w: dict[str, torch.Tensor]) -> Run:
    sae = ours("gated", w)
    return lambda x: sae(x).reconstruction


def ours_jumprelu(w: dict[str, torch.Tensor]) -> Run:
    return ours("jumprelu", w).reconstruct


def ours_topk(w: dict[str, torch.Tensor]) -> Run:
    return ours("topk", w, k=K).reconstruct


def torch_jumprelu(w: dict[str, torch.Tensor]) -> Run:
    """The plain dense path: two torch products, and the activation between them."""

    def run(x: torch.Tensor) -> torch.Tensor:
        z = torch.nn.functional.linear(x - w["b_dec"], w["W_enc_T"], w["b_enc"])
        return (torch.relu(z) * (z > w["threshold"])) @ w["W_dec"] + w["b_dec"]

    return run


def saelens_gated(w: dict[str, torch.Tensor]) -> Run:
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig

    sae = GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=True))
    names = ("W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    return filled(sae, {"W_enc": w["W_enc_T"].T.contiguous(), **{name: w[name] for name in names}})


def dictionary_learning_gated(w: dict[str, torch.Tensor]) -> Run:
    from dictionary_learning.dictionary import GatedAutoEncoder

    tensors = {
        "encoder.weight": w["W_enc_T"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "decoder_bias": w["b_dec"],
        "gate_bias": w["b_gate"],
        "mag_bias": w["b_mag"],
        "r_mag": w["r_mag"],
    }
    return filled(GatedAutoEncoder(D_IN, D_SAE), tensors)


def sparsify_topk(w: dict[str, torch.Tensor]) -> Run:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K))
    tensors = {"encoder.weight": w["W_enc_T"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    filled(coder, tensors)

    def run(x: torch.Tensor) -> torch.Tensor:  # its forward adds a loss
        values, indices, _ = coder.encode(x)
        return coder.decode(values, indices)

    return run


WAYS = {
    way.__name__: way
    for way in (
        *(ours_gated, ours_gated_unscreened, ours_gated_bf16, ours_gated_live, ours_gated_whole),
        *(ours_jumprelu, ours_topk, torch_jumprelu, saelens_gated, dictionary_learning_gated, sparsify_topk),
    )
}


def status(field: str) -> int:
    """Return a size from this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def answer(command: str, run: Run, x: torch.Tensor) -> dict[str, Any]:
    if command == "check":
        return {"values": run(x)[:: TOKENS // 8, :8].double().reshape(-1).tolist()}
    if command == "memory":
        run(x[:8])
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        kept = run(x)
        return {"bytes": status("VmHWM") - before, "result": kept.numel() * kept.element_size()}
    start, start_cpu = time.perf_counter(), time.process_time()
    run(x)
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}


@torch.no_grad()
def main(what: str, folder: Path) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "weights.safetensors").items()}
    x = tensors.pop("x")
    run = WAYS[what](tensors)
    for line in sys.stdin:
        sys.stdout.write("RESULT " + json.dumps(answer(line.strip(), run, x)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
