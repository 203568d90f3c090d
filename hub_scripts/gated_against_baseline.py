"""Compare Gated SAEs with the paper's baseline: python hub_scripts/gated_against_baseline.py --out DIR.

On the activations of the bundled language model, at every site, for several sparsities and seeds: a Gated SAE; a
baseline with 1.5 times its latents, which has the same training cost; and "rescale & shift", the same baseline with
its magnitudes refitted and everything else frozen. All are evaluated on files that neither they nor the language model
were trained on.

Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), sections 4.1 and 5.2.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from transformers import PrinterCallback, ProgressCallback

from hf_gated_sae import GatedSAE, SAEModel
from hf_gated_sae.architectures import architectures
from hf_gated_sae.demo import bundled
from hf_gated_sae.evaluation import evaluate
from hf_gated_sae.training import SAETrainer, SAETrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python hub_scripts/gated_against_baseline.py`
from hub_scripts.demo_assets import dictionaries
from hub_scripts.demo_assets.dictionary_report import ROWS, held_out_material
from hub_scripts.demo_assets.language_model import load_language_model

SITES = ("resid_post.1", "mlp_out.2")
SPARSITIES = {"gated": (0.5, 1.0, 2.0, 4.0), "standard": (0.5, 1.0, 1.5, 2.0, 3.0)}
"""Lambda, for activations scaled to a mean square norm of `d_in`; the penalties of the two are not comparable."""

RESCALED = "rescale & shift"
logger = logging.getLogger("gated_against_baseline")


@dataclass(frozen=True)
class Outcome:
    """The metrics of one SAE."""

    site: str
    method: str
    sparsity: float
    seed: int
    l0: float
    loss_recovered: float
    fvu: float
    gamma: float
    dead: float


@dataclass(frozen=True)
class Comparison:
    """The settings that all SAEs share.

    Attributes:
        width: latents of a Gated SAE; a baseline has 1.5 times this number.
        steps: optimiser steps; magnitudes are refitted in a third of them.
        batch_size: activations per step.
        windows: number of held-out windows to evaluate on.
    """

    width: int = 512
    steps: int = 2500
    batch_size: int = 1024
    windows: int = 128

    def arguments(self, folder: str, seed: int, **changes: Any) -> SAETrainingArguments:
        """Return the trainer's arguments."""
        steps = changes.pop("max_steps", self.steps)
        return SAETrainingArguments(
            output_dir=folder,
            use_cpu=True,
            seed=seed,
            max_steps=steps,
            activation_batch_size=self.batch_size,
            learning_rate=3e-3,
            warmup_steps=steps // 20,
            sparsity_warmup_steps=steps // 8,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": steps // 4, "decay_type": "cosine"},
            dead_after_activations=self.batch_size * steps // 16,
            resample_steps=[steps * 3 // 10, steps // 2],
            lr_dip_steps=steps // 20,
            logging_steps=steps,
            recorded_activations=0,
            disable_tqdm=True,
            **changes,
        )


def train(sae: SAEModel, activations: torch.Tensor, comparison: Comparison, seed: int, **changes: Any) -> SAEModel:
    """Train one SAE, without progress output."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SAETrainer(sae, comparison.arguments(scratch, seed, **changes), activations)
        for loud in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(loud)
        trainer.train()
    return sae


def candidates(comparison: Comparison, site: str, seed: int, activations: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Train and yield an SAE of every method at every sparsity: the method's name, lambda, and the SAE."""
    for architecture, sparsities in SPARSITIES.items():
        for sparsity in sparsities:
            torch.manual_seed(seed)
            sae_class = architectures[architecture]
            width = comparison.width if architecture == "gated" else 3 * comparison.width // 2
            sae = sae_class(sae_class.config_class(d_in=activations.shape[-1], d_sae=width, site=site))
            yield architecture, sparsity, train(sae, activations, comparison, seed, sparsity_coefficient=sparsity)
            if architecture == "standard":
                refit: dict[str, Any] = {
                    "objective": {"rescale_and_shift": True},
                    "max_steps": comparison.steps // 3,
                    "unit_norm_decoder": False,  # the decoder is frozen, with its own norms
                    "dead_latent_remedy": None,
                }
                yield RESCALED, sparsity, train(GatedSAE.from_standard(sae), activations, comparison, seed, **refit)


def outcomes(comparison: Comparison, sites: Sequence[str], seeds: Sequence[int]) -> Iterator[Outcome]:
    """Train and evaluate all SAEs."""
    model, tokenizer = load_language_model(bundled.MODEL)
    activations = dictionaries.training_activations(model, tokenizer, sites)
    material = held_out_material(tokenizer, model.config.max_position_embeddings)
    # Windows from everywhere in the held-out files.
    ids = material.input_ids[:: max(1, len(material.input_ids) // comparison.windows)][: comparison.windows]
    for site in sites:
        for seed in seeds:
            for method, sparsity, sae in candidates(comparison, site, seed, activations[site]):
                report = evaluate(model, sae, list(ids.split(ROWS)))
                found = report.metrics
                yield Outcome(
                    site, method, sparsity, seed, found.l0, report.loss_recovered, found.fvu,
                    found.relative_reconstruction_bias, found.dead_fraction,
                )  # fmt: skip


def l0_ratio(gated: Sequence[Outcome], other: Sequence[Outcome]) -> list[float]:
    """Return another method's L0 at the loss recovered of each Gated SAE, as a multiple of that SAE's L0.

    The logarithm of L0 is interpolated between two SAEs of the other method; there is no ratio outside their range of
    loss recovered.
    """
    points = sorted((outcome.loss_recovered, math.log(outcome.l0)) for outcome in other)
    recovered, log_l0 = zip(*points, strict=True)
    return [
        math.exp(float(np.interp(outcome.loss_recovered, recovered, log_l0))) / outcome.l0
        for outcome in gated
        if recovered[0] <= outcome.loss_recovered <= recovered[-1]
    ]


def tables(found: Sequence[Outcome]) -> str:
    """Return the results as Markdown: every method at every sparsity, and the ratios of L0."""
    rows = defaultdict(list)
    for outcome in found:
        rows[outcome.site, outcome.method, outcome.sparsity].append(outcome)
    lines = [
        "| site | method | lambda | L0 | loss recovered | FVU | gamma | dead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (site, method, sparsity), several in sorted(rows.items()):
        cells = [_cell([getattr(each, name) for each in several]) for name in _COLUMNS]
        lines.append(f"| {site} | {method} | {sparsity:g} | {' | '.join(cells)} |")
    lines += ["", "L0 for the same loss recovered, as a multiple of Gated's, at each Gated SAE within range:", ""]
    lines += ["| site | seed | baseline | rescale & shift |", "|---|---|---|---|"]
    for site, seed in sorted({(each.site, each.seed) for each in found}):
        here = {
            method: [each for each in found if (each.site, each.seed, each.method) == (site, seed, method)]
            for method in ("gated", "standard", RESCALED)
        }
        ratios = [l0_ratio(here["gated"], here[other]) for other in ("standard", RESCALED)]
        lines.append(f"| {site} | {seed} | {' | '.join(map(_listed, ratios))} |")
    return "\n".join(lines) + "\n"


_COLUMNS = ("l0", "loss_recovered", "fvu", "gamma", "dead")


def _cell(values: Sequence[float]) -> str:
    """Return the mean of values and, if there are several, their standard deviation."""
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{spread}"


def _listed(ratios: Sequence[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios) or "none within range"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results, outcomes.json and tables.md.")],
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each SAE.")] = Comparison.steps,
    width: Annotated[int, typer.Option(help="Latents of a Gated SAE.")] = Comparison.width,
    site: Annotated[list[str] | None, typer.Option(help="Sites; both by default.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train, evaluate and compare; finished results are kept if the run is stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logger.setLevel(logging.INFO)
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for outcome in outcomes(Comparison(width=width, steps=steps), site or SITES, range(seeds)):
        found.append(outcome)
        logger.info(
            f"{outcome.site} {outcome.method} {outcome.sparsity:g} seed {outcome.seed}: L0 {outcome.l0:.1f}, "
            f"recovered {outcome.loss_recovered:.4f}, gamma {outcome.gamma:.3f}"
        )
        (out / "outcomes.json").write_text(json.dumps([asdict(each) for each in found], indent=1), encoding="utf-8")
    (out / "tables.md").write_text(tables(found), encoding="utf-8")
    Console().print(f"{len(found)} SAEs: {out / 'tables.md'}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
