"""Train an SAE, evaluate it on held-out text, and publish it with its card in one commit.

python hub_scripts/train_and_publish.py openai-community/gpt2 train.txt held_out.txt me/gpt2-sae \
    --sae.site resid_post.6 --sae.d_sae 12288 --training.max_steps 50000

Every setting of `hf-gated-sae train` is also a flag here. With --resume, an interrupted run is continued. Transcoders
cannot be evaluated here: train them with that command, and publish them with `push_to_hub`.
"""

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_gated_sae import SAEModel, evaluate
from hf_gated_sae.errors import SAEError
from hf_gated_sae.evaluation import FidelityReport
from hf_gated_sae.evaluation.fidelity import require_reconstructing
from hf_gated_sae.publishing import CardFacts
from hf_gated_sae.publishing.push import create_repository
from hf_gated_sae.publishing.trained import save_trained, training_facts
from hf_gated_sae.training.run import Run, assemble, read_flags

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Causal LM: Hub id or folder.")],
    text: Annotated[str, typer.Argument(help="Training text: a file, a folder, or a data set's Hub id.")],
    held_out: Annotated[str, typer.Argument(help="Held-out text to evaluate on: the same.")],
    repository: Annotated[str, typer.Argument(help="Where to publish it, such as me/my-sae.")],
    subfolder: Annotated[str, typer.Option(help="Folder inside the repository.")] = "",
    preset: Annotated[str, typer.Option(help="Preset; see hf-gated-sae train --presets.")] = "gated-modern",
    tokens: Annotated[
        int, typer.Option(min=2, help="Approximate number of held-out tokens to evaluate on.")
    ] = 1_000_000,
    held_out_split: Annotated[str, typer.Option(help="Split of a held-out data set.")] = "test",
    license: Annotated[str | None, typer.Option(help="Licence of the SAE, such as apache-2.0.")] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of a licence 'other'.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Of a licence 'other': LICENSE or an address.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Publish to a private repository.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the latest checkpoint.")] = False,
) -> None:
    """Train an SAE, evaluate it, publish it, and load the published SAE."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    # Checked before the training, whose result could not be published otherwise.
    terms: dict[str, Any] = {"license": license, "license_name": license_name, "license_link": license_link}
    CardFacts(**terms).licensed()
    source = {"files": text} if Path(text).exists() else {"dataset": text}
    given: dict[str, Any] = {
        "output_dir": repository.split("/")[-1],
        "preset": preset,
        "model": {"name": model},
        "data": source,
    }
    run = Run.prepare(assemble(given, read_flags(context.args)), resume=resume)
    for name, value in run.facts().items():
        console.print(f"{name}: {value}")
    # Checked before the training, whose result could not be published otherwise.
    for sae in run.saes.values():
        require_reconstructing(sae)
    batches = run.held_out(held_out, held_out_split)
    if run.parts.arguments.should_save:
        create_repository(repository, private=private or None)
    run.train()
    if not run.parts.arguments.should_save:
        return  # only the first of several processes continues
    save_trained(run)
    for name in run.saes:
        sae = run.trained(name)
        some = islice(batches, max(1, tokens // (batches.context_length * batches.sequences_per_batch)))
        report = evaluate(run.parts.model, sae, some)
        console.print(f"{name or 'SAE'}: {_summary(report)}")
        folder = "/".join(part for part in (subfolder, name) if part)
        known = training_facts(run, name)
        facts = CardFacts.of_report(
            report,
            evaluation={
                "dataset": Path(held_out).name if Path(held_out).exists() else held_out,
                "split": "held-out text" if Path(held_out).exists() else held_out_split,
                "context length": batches.context_length,
            },
            training=known.training,
            datasets=known.datasets,
            provenance={**known.provenance, "made by": "hub_scripts/train_and_publish.py"},
            **terms,
        )
        commit = sae.push_to_hub(repository, subfolder=folder, private=private or None, facts=facts)
        published = SAEModel.from_pretrained(repository, folder, revision=commit.oid)
        console.print(f"published as {published.checkpoint}")


def _summary(report: FidelityReport) -> str:
    """Return the headline metrics in one line."""
    metrics = report.metrics
    return (
        f"L0 {metrics.l0:.1f}, loss recovered {report.loss_recovered:.3f}, FVU {metrics.fvu:.3f}, gamma "
        f"{metrics.relative_reconstruction_bias:.3f}, dead {metrics.dead_fraction:.1%}"
    )


if __name__ == "__main__":
    try:
        app()
    except SAEError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        sys.exit(1)
