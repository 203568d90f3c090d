"""The demo's SAEs: their recipes and their training.

Everything here is deterministic for given activations, PyTorch and number of threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback

from hf_gated_sae.architectures import architectures
from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.modeling import SAEModel
from hf_gated_sae.training import SAETrainer, SAETrainingArguments, collect

from .language_model import pack, token_stream

ASSETS = bundled.SAES
BASE_MODEL = "hf-gated-sae/python-stdlib-llama-demo"

Progress = Callable[[int, dict[str, float]], None]
"""Called with the number of steps done and the logged metrics, which are empty for most steps."""


@dataclass(frozen=True)
class DictionaryRecipe:
    """The settings that determine the trained weights, apart from the activations.

    Args:
        site: of the activations.
        architecture: name in the registry.
        d_sae: number of latents.
        sparsity_coefficient: lambda, for activations scaled to a mean square norm of `d_in`.
        steps: optimiser steps.
        batch_size: activations per step.
        learning_rate: Adam's learning rate after the warm-up; over the last quarter it falls to 0 along a cosine.
        seed: for the initial weights and the order of the activations.
    """

    site: str
    architecture: str
    d_sae: int
    sparsity_coefficient: float
    steps: int = 4000
    batch_size: int = 2048
    learning_rate: float = 3e-3
    seed: int = 0

    @property
    def name(self) -> str:
        """Folder of the SAE inside the assets."""
        return f"{self.site}/{self.architecture}"

    def arguments(self, output_dir: str) -> SAETrainingArguments:
        """Return the trainer's arguments.

        Args:
            output_dir: a folder for the trainer's own files; it stays empty.
        """
        return SAETrainingArguments(
            output_dir=output_dir,
            use_cpu=True,
            seed=self.seed,
            max_steps=self.steps,
            activation_batch_size=self.batch_size,
            sparsity_coefficient=self.sparsity_coefficient,
            sparsity_warmup_steps=self.steps // 8,
            learning_rate=self.learning_rate,
            warmup_steps=self.steps // 20,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": self.steps // 4, "decay_type": "cosine"},
            # The paper's intervals, scaled down to a run of a few million activations.
            dead_after_activations=300_000,
            resample_steps=[self.steps * 3 // 10, self.steps // 2],
            lr_dip_steps=self.steps // 20,
            logging_steps=max(1, self.steps // 40),
            disable_tqdm=True,
        )


# Sites, by measurement on held-out files: the residual stream in the middle of the model (after layer 2 of 4), and the
# one of the two middle MLPs whose zero-ablation increases the loss more (0.4 nats per token, the other 0.2). The
# baseline has 1.5 times the latents, because a Gated step costs 1.5 times a baseline step: equal training compute. Its
# lambda is chosen for about the same L0.
RECIPES: tuple[DictionaryRecipe, ...] = (
    DictionaryRecipe("resid_post.1", "gated", 1024, sparsity_coefficient=3.0),
    DictionaryRecipe("resid_post.1", "standard", 1536, sparsity_coefficient=2.4),
    DictionaryRecipe("mlp_out.2", "gated", 1024, sparsity_coefficient=2.8),
    DictionaryRecipe("mlp_out.2", "standard", 1536, sparsity_coefficient=2.7),
)


def training_tokens(tokenizer: Any, context: int) -> Tensor:
    """Return the training files, packed as for the language model, ``[n_sequences, context]``."""
    return pack(token_stream(tokenizer, corpus.texts("training")), context)


def training_activations(
    model: PreTrainedModel,
    tokenizer: Any,
    sites: Iterable[str],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Read the activations of all sites in one pass over the training files.

    Args:
        model: the demo's language model.
        tokenizer: its tokenizer.
        sites: to read.
        progress: called with the number of activations per site so far, and the approximate total.

    Returns:
        Activations ``[n, d_in]`` float16 by site, those of `<|endoftext|>` left out.
    """
    tokens = training_tokens(tokenizer, model.config.max_position_embeddings)

    # float16 halves the memory; its rounding error is a thousandth of the SAEs' reconstruction error.
    def report_tokens(done: int) -> None:
        if progress is not None:
            progress(done, tokens.numel())

    return collect(model, list(sites), tokens.split(32), dtype=torch.float16, progress=report_tokens)


def count_activations(tokenizer: Any, context: int) -> int:
    """Return the number of activations per site that `training_activations` returns."""
    return int((training_tokens(tokenizer, context) != tokenizer.bos_token_id).sum())


def train_dictionary(recipe: DictionaryRecipe, activations: Tensor, progress: Progress | None = None) -> SAEModel:
    """Train one SAE.

    Args:
        recipe: of the SAE.
        activations: ``[n, d_in]`` of the recipe's site.
        progress: called at every step.

    Returns:
        The SAE, in the model's activation unit.
    """
    sae_class = architectures[recipe.architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        config = sae_class.config_class(
            d_in=activations.shape[-1], d_sae=recipe.d_sae, site=recipe.site, base_model=BASE_MODEL
        )
        sae = sae_class(config)
        with tempfile.TemporaryDirectory() as scratch:
            callbacks: list[TrainerCallback] = [] if progress is None else [_Report(progress)]
            trainer = SAETrainer(sae, recipe.arguments(scratch), activations, callbacks=callbacks)
            for loud in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(loud)
            trainer.train()
    return sae


class _Report(TrainerCallback):
    """Forwards the trainer's progress to a function."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, {})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, dict(kwargs["logs"]))


def folders(root: Path = ASSETS) -> Iterator[Path]:
    """Yield the folders of the SAEs stored below a folder, in the order of the recipes."""
    for recipe in RECIPES:
        if (root / recipe.name / "config.json").is_file():
            yield root / recipe.name
