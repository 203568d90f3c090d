"""Rebuild the assets of the bundled demo from nothing: python hub_scripts/make_demo_assets.py lm.

Stages, each a command that reads what the one before it wrote:

    lm      the language model, trained on this Python's standard library (a quarter of an hour on two idle CPU cores)
"""

import json
import logging
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_gated_sae.demo import corpus, language_model
from hf_gated_sae.demo.language_model_report import training_facts

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
logger = logging.getLogger("make_demo_assets")


@app.callback()
def configure(
    threads: Annotated[int, typer.Option(help="CPU threads; another number changes the last digits.")] = 2,
) -> None:
    """Set up logging and the number of threads for every stage."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(threads)


@app.command()
def lm(
    folder: Annotated[Path, typer.Option(help="Where the model goes.")] = language_model.ASSETS,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = language_model.LanguageModelRecipe.steps,
    seed: Annotated[int, typer.Option(help="Initial weights and order of batches.")] = 0,
) -> None:
    """Train the language model and its tokenizer, store them, and measure what was stored."""
    recipe = language_model.LanguageModelRecipe(steps=steps, seed=seed)
    texts = list(corpus.texts("training"))
    logger.info("Tokenizer: %d files, %d bytes", len(texts), sum(len(text.encode()) for text in texts))
    tokenizer = language_model.train_tokenizer(texts, recipe.vocab_size)
    stream = language_model.token_stream(tokenizer, texts)
    model = language_model.build_model(tokenizer, recipe)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns) as bar:
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
    """Load what was stored and write the measured facts beside it."""
    facts = training_facts(*language_model.load_language_model(folder), recipe)
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    logger.info("Held-out loss: %.1f %% of a unigram's", 100 * facts["held_out"]["share_of_unigram"])
    logger.info("Python-looking lines: %.1f %%", 100 * facts["samples"]["python_line_share"])


# The stage `saes` (the demo's SAEs, trained on this language model) goes here: one command like `lm`.


if __name__ == "__main__":
    app()
