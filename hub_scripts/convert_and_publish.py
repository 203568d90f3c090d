"""Convert one SAE of any layout and publish it: python hub_scripts/convert_and_publish.py SOURCE ADDRESS REPOSITORY.

python hub_scripts/convert_and_publish.py google/gemma-scope-2b-pt-res layer_12/width_16k/average_l0_82 me/my-sae
"""

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import SAEError
from hf_gated_sae.publishing import convert


def main(
    source: Annotated[str, typer.Argument(help="Repository of the original.")],
    address: Annotated[str, typer.Argument(help="Folder or file of the SAE in it; '' for its root.")],
    repository: Annotated[str, typer.Argument(help="Where to publish it, such as me/my-sae.")],
    subfolder: Annotated[str, typer.Option(help="Folder inside the repository.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the source.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16. Default: that of the source.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence, for a source that states none.")] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of a licence 'other'.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Of a licence 'other': LICENSE or an address.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Publish to a private repository.")] = False,
) -> None:
    """Convert an SAE, publish it in one commit, and load the published SAE."""
    console = Console(soft_wrap=True)
    terms: dict[str, Any] = {"license": license, "license_name": license_name, "license_link": license_link}
    conversion = convert(source, address, revision=revision, dtype=dtype, **terms)
    commit = conversion.push(repository, subfolder=subfolder, private=private or None)
    sae = SAEModel.from_pretrained(repository, subfolder, revision=commit.oid)
    console.print(f"{conversion.origin} published as {sae.checkpoint}", highlight=False, markup=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except SAEError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        sys.exit(1)
