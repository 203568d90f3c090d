"""Measure one way to take a training step in its own process: `python train.py WHAT FOLDER`.

Run by the interpreter of the library that is measured. The folder holds the weights and the activations, which are the
same for all. A step is the forward and backward pass, the decoder's constraint where the library has one, the
optimiser's step and the clearing of gradients, as in the library's own loop, including its count of which latents
fired. The learning rate is so low that every step has the same active latents.

Each line on standard input has a command and a number of tokens and is answered by one line of JSON, beginning with
`RESULT`: `run N` takes one step and gives its seconds; `check N` gives the terms of the objective, and for our own
implementations the norms of the gradients; `memory N` takes two steps and gives the bytes by which the process has
grown at its peak since the library was imported, weights and moments included.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

D_IN, D_SAE, TOKENS, K = 768, 24_576, 4096, 64
COEFFICIENT, RATE = 1.0, 1e-7

Weights = dict[str, Tensor]
Step = Callable[[Tensor], Any]
Terms = Callable[[Tensor], dict[str, float]]

LIBRARIES = {
    "ours": "hf_gated_sae.architectures",
    "torch": "torch",
    "saelens": "sae_lens.training.sae_trainer",
    "dictionary_learning": "dictionary_learning.trainers",
    "sparsify": "sparsify",
}
"""What an implementation imports before it is built, by the prefix of its name."""


@torch.no_grad()
def filled(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """Set parameters by name, keeping the memory layout that the library gave them."""
    for name, tensor in tensors.items():
        module.get_parameter(name).copy_(tensor)
    return module.train()


def plain_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: torch.as_tensor(value).item() for name, value in values.items()}


# ---------------------------------------------------------------------- ours


def our_sae(architecture: str, w: Weights, **settings: Any) -> Any:
    from hf_gated_sae.architectures import architectures

    sae_class = architectures[architecture]
    d_sae, d_in = w["W_enc_T"].shape
    sae = sae_class(sae_class.config_class(d_in=d_in, d_sae=d_sae, **settings))
    biases = {
        "gated": {"b_gate": w["b_gate"], "b_mag": w["b_mag"], "r_mag": w["r_mag"]},
        "standard": {"b_enc": w["b_gate"]},
        "jumprelu": {"b_enc": w["b_enc"], "threshold": w["threshold"]},
    }
    filled(sae, {name: w[name] for name in ("W_enc_T", "W_dec", "b_dec")})
    return filled(sae, biases.get(architecture, {"b_enc": w["b_enc"]}))


def ours(sae: Any, *, bf16: bool = False) -> tuple[Step, Terms]:
    from hf_gated_sae.functional import remove_parallel_component, unit_norm_rows

    optimiser = torch.optim.Adam(sae.parameters(), lr=RATE, betas=(0.0, 0.999), fused=True)

    def loss(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return sae.training_loss(x, sparsity_coefficient=COEFFICIENT)

    def step(x: Tensor) -> None:
        loss(x).total.backward()
        remove_parallel_component(sae.W_dec.grad, sae.W_dec)
        optimiser.step()
        unit_norm_rows(sae.W_dec)
        optimiser.zero_grad()

    def terms(x: Tensor) -> dict[str, float]:
        found = loss(x)
        found.total.backward()
        gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        norms = {f"gradient of {name}": gradient.double().norm() for name, gradient in gradients.items()}
        found_numbers = plain_numbers({**found.terms, **norms, "l0": found.l0})
        optimiser.zero_grad()
        return found_numbers

    return step, terms


def ours_gated(w: Weights) -> tuple[Step, Terms]:
    return ours(our_sae("gated", w))


def ours_gated_bf16(w: Weights) -> tuple[Step, Terms]:
    return ours(our_sae("gated", w), bf16=True)


def ours_standard(w: Weights) -> tuple[Step, Terms]:
    return ours(our_sae("standard", w))


def ours_jumprelu(w: Weights) -> tuple[Step, Terms]:
    return ours(our_sae("jumprelu", w))


def ours_topk(w: Weights) -> tuple[Step, Terms]:
    return ours(our_sae("topk", w, k=K))


def ours_topk_bf16(w: Weights) -> tuple[Step, Terms]:
    return ours(our_sae("topk", w, k=K), bf16=True)


def ours_batch_topk(w: Weights) -> tuple[Step, Terms]:
    return ours(our_sae("batch_topk", w, k=K))


# ---------------------------------------------------------------------- lower bounds: one product of the encoder


@torch.no_grad()
def none(x: Tensor) -> dict[str, float]:
    return {}


def ours_product(w: Weights) -> tuple[Step, Terms]:
    from hf_gated_sae.functional.linear import linear

    weight = w["W_enc_T"].clone()
    return torch.no_grad()(lambda x: linear(x, weight)), none


def torch_product(w: Weights) -> tuple[Step, Terms]:
    weight = w["W_enc_T"].clone()
    return torch.no_grad()(lambda x: torch.nn.functional.linear(x, weight)), none


def torch_product_bf16(w: Weights) -> tuple[Step, Terms]:
    weight = w["W_enc_T"].bfloat16()
    return torch.no_grad()(lambda x: torch.nn.functional.linear(x.bfloat16(), weight)), none


# ---------------------------------------------------------------------- SAELens


def saelens(architecture: str, w: Weights, *, bf16: bool = False, **settings: Any) -> tuple[Step, Terms]:
    """`SAETrainer.step`, which its `fit` calls, with the bookkeeping of which latents fired."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.training.sae_trainer import SAETrainer

    sae_class, config_class = get_sae_training_class(architecture)
    sae: Any = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **settings))
    biases = {"gated": ("b_gate", "b_mag", "r_mag"), "topk": ("b_enc",)}[architecture]
    filled(sae, {"W_enc": w["W_enc_T"].T, **{name: w[name] for name in ("W_dec", "b_dec", *biases)}})
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=TOKENS,
        lr=RATE,
        lr_end=RATE,
        device="cpu",
        autocast=bf16,
    )
    trainer: Any = SAETrainer(config, sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    @torch.no_grad()
    def terms(x: Tensor) -> dict[str, float]:
        given = TrainStepInput(
            sae_in=x,
            dead_neuron_mask=trainer.dead_neurons,
            coefficients=trainer.get_coefficients(),
            n_training_steps=0,
            is_logging_step=False,
        )
        losses = sae.training_forward_pass(given).losses
        names = {"mse_loss": "reconstruction", "l1_loss": "sparsity", "auxiliary_reconstruction_loss": "auxiliary"}
        return plain_numbers({names[name]: value for name, value in losses.items()})

    return step, terms


def saelens_gated(w: Weights) -> tuple[Step, Terms]:
    return saelens("gated", w, l1_coefficient=COEFFICIENT)


def saelens_gated_bf16(w: Weights) -> tuple[Step, Terms]:
    return saelens("gated", w, bf16=True, l1_coefficient=COEFFICIENT)


def saelens_topk(w: Weights) -> tuple[Step, Terms]:
    return saelens("topk", w, k=K)


# ---------------------------------------------------------------------- dictionary_learning


def dictionary_learning(trainer: Any, w: Weights, names: Mapping[str, str]) -> tuple[Step, Terms]:
    """A trainer's `update`, which its `trainSAE` calls; it never autocasts on a CPU."""
    filled(trainer.ae, {"encoder.weight": w["W_enc_T"], "decoder.weight": w["W_dec"].T})
    filled(trainer.ae, {theirs: w[own] for theirs, own in names.items()})
    steps = iter(range(2000, 10**9))  # after the first steps, which initialise

    @torch.no_grad()
    def terms(x: Tensor) -> dict[str, float]:
        losses = trainer.loss(x, step=2000, logging=True).losses
        return {"reconstruction": losses.get("mse_loss", losses.get("l2_loss")), **renamed(losses)}

    def renamed(losses: Mapping[str, float]) -> dict[str, float]:
        own = {"sparsity_loss": "sparsity", "aux_loss": "auxiliary"}
        return {own[name]: value for name, value in losses.items() if name in own}

    return lambda x: trainer.update(next(steps), x), terms


def dictionary_learning_gated(w: Weights) -> tuple[Step, Terms]:
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    trainer = GatedSAETrainer(
        steps=10**9,
        activation_dim=D_IN,
        dict_size=D_SAE,
        layer=0,
        lm_name="",
        lr=RATE,
        l1_penalty=COEFFICIENT,
        warmup_steps=0,
        sparsity_warmup_steps=None,
        device="cpu",
    )
    names = {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"}
    return dictionary_learning(trainer, w, names)


def dictionary_learning_topk(w: Weights) -> tuple[Step, Terms]:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**9,
        activation_dim=D_IN,
        dict_size=D_SAE,
        k=K,
        layer=0,
        lm_name="",
        lr=RATE,
        warmup_steps=0,
        device="cpu",
    )
    return dictionary_learning(trainer, w, {"encoder.bias": "b_enc", "b_dec": "b_dec"})


# ---------------------------------------------------------------------- sparsify


def sparsify(w: Weights, optimiser_of: Callable[[Any], Any]) -> tuple[Step, Terms]:
    """What the hook and the loop of its `Trainer` do, which run inside a model's forward pass."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.set_float32_matmul_precision("high")  # as its `fit` does
    coder: Any = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K), dtype=torch.float32)
    names = {"encoder.weight": "W_enc_T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    filled(coder, {theirs: w[own] for theirs, own in names.items()})
    optimiser = optimiser_of(coder.parameters())
    fired = torch.zeros(D_SAE, dtype=torch.bool)

    def forward(x: Tensor) -> Any:
        return coder(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = forward(x)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    @torch.no_grad()
    def terms(x: Tensor) -> dict[str, float]:
        return {"reconstruction": float(forward(x).fvu * (x - x.mean(0)).pow(2).sum() / len(x))}

    return step, terms


def sparsify_topk(w: Weights) -> tuple[Step, Terms]:
    """With the optimiser of its default configuration: schedule-free sign descent with momentum."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    def signum(parameters: Any) -> Any:
        optimiser = ScheduleFreeWrapper(SignSGD(parameters, lr=RATE), momentum=0.95)
        optimiser.train()
        return optimiser

    return sparsify(w, signum)


def sparsify_topk_adam(w: Weights) -> tuple[Step, Terms]:
    return sparsify(w, lambda parameters: torch.optim.Adam(parameters, lr=RATE))


WAYS = {
    way.__name__: way
    for way in (
        *(ours_gated, ours_gated_bf16, ours_standard, ours_jumprelu, ours_topk, ours_topk_bf16, ours_batch_topk),
        *(ours_product, torch_product, torch_product_bf16, saelens_gated, saelens_gated_bf16, saelens_topk),
        *(dictionary_learning_gated, dictionary_learning_topk, sparsify_topk, sparsify_topk_adam),
    )
}


def status(field: str) -> int:
    """Return a size from this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def answer(command: str, step: Step, terms: Terms, x: Tensor, imported: int) -> dict[str, Any]:
    what, _, count = command.partition(" ")
    some = x[: int(count)]
    if what == "check":
        return terms(some)
    if what == "memory":
        step(some), step(some)  # the second step has the moments that the first allocated
        return {"bytes": status("VmHWM") - imported}
    start = time.perf_counter()
    step(some)
    return {"seconds": time.perf_counter() - start}


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(next(LIBRARIES[name] for name in LIBRARIES if what.startswith(name)))
        imported = status("VmRSS")
        tensors = load_file(folder / "weights.safetensors")
        x = tensors.pop("x").clone()
        step, terms = WAYS[what](tensors)
    del tensors
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, without the file
    for line in sys.stdin:
        sys.stdout.write("RESULT " + json.dumps(answer(line.strip(), step, terms, x, imported)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
