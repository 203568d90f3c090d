"""Measure GPT-2-small with an SAE attached in its own process: `python splicing.py WHAT FOLDER`.

Run by the interpreter of the library that is measured. The folder holds the model, the SAE's weights and the ids,
which are the same for all. Each line on standard input names a forward, ``plain``, ``splice`` or ``error``, which is
run once and answered by one line of JSON, beginning with `RESULT`, with seconds and a few of the logits.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

D_IN, D_SAE, LAYER, ROWS, COLUMNS = 768, 24_576, 6, 8, 128

Forward = Callable[[], torch.Tensor]
Attached = dict[str, Callable[[], AbstractContextManager[Any]]]


def filled(module: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Set parameters by name."""
    for name, tensor in tensors.items():
        getattr(module, name).data = tensor
    return module.eval()


def ours(folder: Path, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> tuple[Forward, Attached]:
    from transformers import AutoModelForCausalLM

    from hf_gated_sae import GatedSAE, GatedSAEConfig, Splice, attach

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sae = filled(GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE, site=f"resid_post.{LAYER}")), tensors)
    splice, error = attach(model, Splice(sae)), attach(model, Splice(sae, error=True))
    return lambda: model(ids, use_cache=False).logits, {"splice": lambda: splice, "error": lambda: error}


def saelens(folder: Path, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> tuple[Forward, Attached]:
    """SAELens on TransformerLens's bridge to the same transformers model, its faster way."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = SAETransformerBridge.boot_transformers(
        str(folder),
        hf_model=AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
    )
    metadata = SAEMetadata(hook_name=f"blocks.{LAYER}.hook_resid_post")
    config = GatedSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=True, metadata=metadata)
    names = ("W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    sae = filled(GatedSAE(config), {"W_enc": tensors["W_enc_T"].T.contiguous(), **{n: tensors[n] for n in names}})
    attached = {
        "splice": lambda: model.saes([sae], use_error_term=False),
        "error": lambda: model.saes([sae], use_error_term=True),
    }
    return lambda: model(ids, return_type="logits"), attached


@torch.no_grad()
def main(what: str, folder: Path) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    tensors = load_file(folder / "sae.safetensors")
    ids = tensors.pop("ids")
    forward, attached = {"ours": ours, "saelens": saelens}[what](folder, tensors, ids)
    for line in sys.stdin:
        with attached.get(line.strip(), nullcontext)():
            start = time.perf_counter()
            logits = forward()
            seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "values": logits[:, -1, :8].double().reshape(-1).tolist()}
        sys.stdout.write("RESULT " + json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
