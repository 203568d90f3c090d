"""Convert all SAEs of a repository and publish them, one commit each: python hub_scripts/mirror_set.py SOURCE TARGET.

It can be interrupted at any time: SAEs that the target has from the same commit of the source are not converted again.

    python hub_scripts/mirror_set.py google/gemma-scope-2b-pt-res me/mirror --addresses "layer_*/width_16k/*" --dry-run
"""

import sys
from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_gated_sae import SAESet
from hf_gated_sae.errors import CheckpointError, InputError, SAEError
from hf_gated_sae.publishing import Mirror

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def main(
    source: Annotated[str, typer.Argument(help="Repository of the originals.")],
    target: Annotated[str, typer.Argument(help="Repository to publish to, created if needed.")],
    subfolder: Annotated[str, typer.Option(help="Mirror only the SAEs in this folder of the source.")] = "",
    addresses: Annotated[list[str] | None, typer.Option(help="Only these; * matches any text.")] = None,
    sites: Annotated[list[str] | None, typer.Option(help="Only these, such as resid_post.*")] = None,
    folder: Annotated[str, typer.Option(help="Folder inside the target.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the source.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16. Default: that of the source.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence, for a source that states none.")] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of a licence 'other'.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Of a licence 'other': LICENSE or an address.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Publish to a private repository.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Convert at most this many.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be done.")] = False,
) -> None:
    """Mirror a repository; one SAE that cannot be converted does not stop the others."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    found = SAESet.from_pretrained(source, subfolder, addresses=addresses, sites=sites, revision=revision)
    terms: dict[str, Any] = {"license": license, "license_name": license_name, "license_link": license_link}
    mirror = Mirror(found, target, folder=folder, dtype=dtype, private=private or None, **terms)
    steps = mirror.plan()
    count = Counter(step.state for step in steps)
    console.print(f"{found.location}: " + ", ".join(f"{number} {state}" for state, number in sorted(count.items())))
    to_do = [step for step in steps if step.state != "done"][:limit]
    if dry_run:
        for step in to_do:
            console.print(f"{step.state:8} {step.address or '.'} -> {target}/{step.folder}")
        return
    failed = 0
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("mirror", total=len(to_do))
        for step in to_do:
            bar.update(task, description=step.address)
            try:
                commit = mirror.publish(step)
            except (CheckpointError, InputError) as error:
                failed += 1
                console.print(f"failed   {step.address}: {error}")
            else:
                console.print(f"mirrored {step.address} {commit.oid[:12]}")
            bar.advance(task)
    if failed:
        console.print(f"{failed} of {len(to_do)} could not be converted; run this again to retry them.")
        sys.exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except SAEError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        sys.exit(1)
