"""Measure one library from tokens to a trained SAE in its own process: `python pipelines.py WHAT FOLDER`.

Run by the interpreter of the library that is measured. The folder holds a causal LM, the initial weights of the SAEs
and the token ids, which are the same for all. Each line on standard input is `run N`, which trains for N steps from
the beginning and is answered by one line of JSON, beginning with `RESULT`, with the seconds of the run. The difference
between two lengths is the time of the steps between them, without loading, filling the buffer and the last checkpoint.

Each library runs its own trainer on its own source of activations: after the second of four layers, in batches of 16
sequences, with equally large shuffle buffers where it has one. sparsify has none, and runs the whole model.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

D_IN, D_SAE, K, LAYER = 256, 8192, 64, 1
CONTEXT, ROWS, BUFFER = 128, 16, 8
"""Tokens per sequence, sequences per batch, and batches in the shuffle buffer, half of which is served at a time."""
TOKENS = CONTEXT * ROWS
COEFFICIENT, RATE = 1.0, 1e-6

Weights = dict[str, Tensor]
Run = Callable[[int], None]


@torch.no_grad()
def filled(module: torch.nn.Module, tensors: Weights) -> Any:
    for name, tensor in tensors.items():
        module.get_parameter(name).copy_(tensor)
    return module.train()


def language_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def bare_run(folder: str, steps: int, tokens: int, rate: float = RATE) -> dict[str, Any]:
    """Return arguments of a run that only takes steps."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": steps,
        "activation_batch_size": tokens,
        "sparsity_coefficient": COEFFICIENT,
        "activation_scale": "none",
        "learning_rate": rate,
        "warmup_steps": 0,
        "sparsity_warmup_steps": 0,
        "statistics_activations": tokens,
        "recorded_activations": 0,
        "logging_steps": 10**6,
        "disable_tqdm": True,
    }


def ours(architecture: str, folder: Path, w: Weights, ids: Tensor, **settings: Any) -> Run:
    from hf_gated_sae.architectures import architectures
    from hf_gated_sae.training import ModelActivations, SAETrainer, SAETrainingArguments

    model, site = language_model(folder), f"resid_post.{LAYER}"
    sae_class = architectures[architecture]

    def run(steps: int) -> None:
        config = sae_class.config_class(d_in=D_IN, d_sae=D_SAE, site=site, **settings)
        sae = filled(sae_class(config), {name: w[name] for name in ("W_enc_T", "W_dec", "b_dec")})
        if architecture == "gated":
            filled(sae, {name: w[name] for name in ("b_gate", "b_mag", "r_mag")})
        with tempfile.TemporaryDirectory() as output:
            args = SAETrainingArguments(**bare_run(output, steps, TOKENS), dead_latent_remedy=None)
            stream = ModelActivations(model, site, list(ids.split(ROWS)), buffer_size=BUFFER * TOKENS)
            SAETrainer(sae, args, stream).train()

    return run


def ours_gated(folder: Path, w: Weights, ids: Tensor) -> Run:
    return ours("gated", folder, w, ids)


def ours_topk(folder: Path, w: Weights, ids: Tensor) -> Run:
    return ours("topk", folder, w, ids, k=K)


def saelens(architecture: str, folder: Path, w: Weights, ids: Tensor, **settings: Any) -> Run:
    """Its runner on a transformers model, which it stops after the layer."""
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(architecture)
    names = {"gated": ("b_gate", "b_mag", "r_mag"), "topk": ()}[architecture]
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})

    def run(steps: int) -> None:
        config: Any = LanguageModelSAERunnerConfig(
            sae=config_class(d_in=D_IN, d_sae=D_SAE, **settings),
            model_name=str(folder / "model"),
            model_class_name="AutoModelForCausalLM",
            hook_name=f"model.layers.{LAYER}",
            is_dataset_tokenized=True,
            streaming=False,
            context_size=CONTEXT,
            n_batches_in_buffer=BUFFER * ROWS,
            training_tokens=steps * TOKENS,
            store_batch_size_prompts=ROWS,
            train_batch_size_tokens=TOKENS,
            device="cpu",
            lr=RATE,
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=None,
            verbose=False,
        )
        sae = filled(sae_class(config.sae), {"W_enc": w["W_enc_T"].T, **{n: w[n] for n in ("W_dec", "b_dec", *names)}})
        LanguageModelSAETrainingRunner(config, override_dataset=dataset, override_sae=sae).run()

    return run


def saelens_gated(folder: Path, w: Weights, ids: Tensor) -> Run:
    return saelens("gated", folder, w, ids, l1_coefficient=COEFFICIENT)


def saelens_topk(folder: Path, w: Weights, ids: Tensor) -> Run:
    return saelens("topk", folder, w, ids, k=K)


def sparsify_topk(folder: Path, w: Weights, ids: Tensor) -> Run:
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    model = language_model(folder)
    dataset = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")

    def run(steps: int) -> None:
        with tempfile.TemporaryDirectory() as output:
            config = TrainConfig(
                SparseCoderConfig(num_latents=D_SAE, k=K),
                batch_size=ROWS,
                hookpoints=[f"layers.{LAYER}"],
                lr=RATE,
                save_every=10**9,
                save_dir=output,
                log_to_wandb=False,
            )
            Trainer(config, dataset.select(range(steps * ROWS)), model).fit()

    return run


WAYS = {way.__name__: way for way in (ours_gated, ours_topk, saelens_gated, saelens_topk, sparsify_topk)}


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tensors = load_file(folder / "weights.safetensors")
    ids = tensors.pop("ids")
    with contextlib.redirect_stdout(sys.stderr):
        run = WAYS[what](folder, tensors, ids)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            start = time.perf_counter()
            run(int(line.removeprefix("run ")))
            seconds = time.perf_counter() - start
        sys.stdout.write("RESULT " + json.dumps({"seconds": seconds}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
