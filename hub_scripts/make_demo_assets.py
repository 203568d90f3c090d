"""Rebuild the assets of the bundled demo: python hub_scripts/make_demo_assets.py lm.

Each stage is a command that reads the output of the previous one:

    lm      the language model, trained on this Python's standard library (a quarter of an hour on two idle CPU cores)
    saes    the SAEs, trained on the language model's activations
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hf_gated_sae import SAEModel
from hf_gated_sae.demo import corpus
from hf_gated_sae.errors import unknown_name
from hf_gated_sae.publishing.facts import write_facts

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python hub_scripts/make_demo_assets.py`
from hub_scripts.demo_assets import dictionaries, language_model
from hub_scripts.demo_assets import dictionary_report as report
from hub_scripts.demo_assets.dictionaries import DictionaryRecipe
from hub_scripts.demo_assets.language_model_report import training_facts

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
logger = logging.getLogger("make_demo_assets")


@app.callback()
def configure(
    threads: Annotated[int, typer.Option(help="CPU threads; results depend on it in their last digits.")] = 2,
) -> None:
    """Set up logging and the number of threads for every stage."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(threads)


@app.command()
def lm(
    folder: Annotated[Path, typer.Option(help="Folder of the model.")] = language_model.ASSETS,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = language_model.LanguageModelRecipe.steps,
    seed: Annotated[int, typer.Option(help="Initial weights and order of batches.")] = 0,
) -> None:
    """Train the language model and its tokenizer, store them, and evaluate the stored model."""
    recipe = language_model.LanguageModelRecipe(steps=steps, seed=seed)
    texts = list(corpus.texts("training"))
    logger.info("Tokenizer: %d files, %d bytes", len(texts), sum(len(text.encode()) for text in texts))
    tokenizer = language_model.train_tokenizer(texts, recipe.vocab_size)
    stream = language_model.token_stream(tokenizer, texts)
    model = language_model.build_model(tokenizer, recipe)
    with Progress(*COLUMNS) as bar:
        task = bar.add_task("training", total=recipe.steps)
        language_model.train(
            model,
            stream,
            recipe,
            lambda step, loss: bar.update(task, completed=step, description=f"training, {loss:.3f} nats per token"),
        )
    language_model.save_language_model(model, tokenizer, folder)
    measure(folder, recipe)


def measure(folder: Path, recipe: language_model.LanguageModelRecipe) -> None:
    """Load from disk, and write the measured facts into the same folder."""
    facts = training_facts(*language_model.load_language_model(folder), recipe)
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    logger.info("Held-out loss: %.1f %% of a unigram's", 100 * facts["held_out"]["share_of_unigram"])
    logger.info("Python-looking lines: %.1f %%", 100 * facts["samples"]["python_line_share"])


@app.command()
def saes(
    folder: Annotated[Path, typer.Option(help="Folder of the SAEs, each in its own subfolder.")] = dictionaries.ASSETS,
    only: Annotated[list[str] | None, typer.Option(help="Train only these, such as resid_post.1/gated.")] = None,
    measure_only: Annotated[bool, typer.Option(help="Train nothing; evaluate the stored SAEs.")] = False,
) -> None:
    """Train the SAEs on the language model's activations, store them, and evaluate the stored SAEs."""
    names = [recipe.name for recipe in dictionaries.RECIPES]
    for name in only or []:
        if name not in names:
            raise typer.BadParameter(str(unknown_name("SAE", name, names)))
    wanted = [recipe for recipe in dictionaries.RECIPES if not only or recipe.name in only]
    model, tokenizer = language_model.load_language_model()
    with Progress(*COLUMNS) as bar:
        if not measure_only:
            train_saes(bar, model, tokenizer, wanted, folder)
        measure_saes(bar, model, tokenizer, wanted, folder)
    compare_saes(folder)


def train_saes(bar: Progress, model: Any, tokenizer: Any, recipes: list[DictionaryRecipe], folder: Path) -> None:
    """Read the activations of all sites at once, then train one SAE after the other."""
    task = bar.add_task("activations")
    sites = sorted({recipe.site for recipe in recipes})
    activations = dictionaries.training_activations(
        model, tokenizer, sites, lambda done, total: bar.update(task, completed=done, total=total)
    )
    for recipe in recipes:
        task = bar.add_task(recipe.name, total=recipe.steps)

        def show(step: int, logs: dict[str, float], task: TaskID = task, name: str = recipe.name) -> None:
            text = f"{name}, L0 {logs['l0']:.1f}, FVU {logs['fvu']:.3f}" if "l0" in logs else None
            bar.update(task, completed=step, description=text)

        sae = dictionaries.train_dictionary(recipe, activations[recipe.site], show)
        sae.save_pretrained(folder / recipe.name)


def measure_saes(bar: Progress, model: Any, tokenizer: Any, recipes: list[DictionaryRecipe], folder: Path) -> None:
    """Load from disk, and write the measured facts into the same folder."""
    context = model.config.max_position_embeddings
    material = report.held_out_material(tokenizer, context)
    activations = dictionaries.count_activations(tokenizer, context)
    for recipe in recipes:
        task = bar.add_task(f"measuring {recipe.name}", total=material.tokens)
        sae = SAEModel.from_pretrained(folder / recipe.name)

        def show(done: int, task: TaskID = task) -> None:
            bar.update(task, completed=done)

        facts = report.dictionary_facts(model, sae, material, recipe, activations=activations, progress=show)
        report.facts_file(folder / recipe.name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def compare_saes(folder: Path) -> None:
    """Write the card facts of all stored SAEs, with those of the same site as comparisons, and log a summary."""
    found = {
        path.relative_to(folder).as_posix(): json.loads(report.facts_file(path).read_text(encoding="utf-8"))
        for path in dictionaries.folders(folder)
    }
    for name, facts in found.items():
        site, architecture = name.split("/")
        others = {other: values for other, values in found.items() if other != name and other.startswith(f"{site}/")}
        write_facts(report.card_facts(facts, others), folder / name)
        logger.info("%s", report.summary(name, facts))
        for complaint in report.is_good_enough(facts) if architecture == "gated" else []:
            logger.warning("Quality criterion not met: %s", complaint)


if __name__ == "__main__":
    app()
