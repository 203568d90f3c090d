"""Repositories with checkpoints of other libraries, on the loopback Hub."""

from __future__ import annotations

from pathlib import Path

from hf_gated_sae.formats import formats

from .mini_hub import MiniHub

CARD = "---\nlicense: cc-by-4.0\n---\n\n# Theirs\n"


def example_files(layout: str, root: Path) -> dict[str, dict[str, bytes]]:
    """Write a layout's examples below a folder and return their files by repository."""
    repos = {example.repo for example in formats[layout].examples(root)}
    return {
        repo: {
            path.relative_to(root / repo).as_posix(): path.read_bytes()
            for path in (root / repo).rglob("*")
            if path.is_file()
        }
        for repo in repos
    }


def seed_gemma_scope(hub: MiniHub, repo_id: str, root: Path, *, card: str | None = CARD, layers: int = 1) -> str:
    """Make a repository of Gemma Scope SAEs under any name: two per layer of the stream, and one at the embedding.

    Returns:
        The commit.
    """
    theirs = example_files("gemma_scope", root)["google/gemma-scope-2b-pt-res"]
    one = theirs["layer_1/width_16k/average_l0_71/params.npz"]
    files: dict[str, bytes | str] = {
        f"layer_{layer}/width_16k/average_l0_{l0}/params.npz": one for layer in range(layers) for l0 in (12, 71)
    }
    files["embedding/width_4k/average_l0_6/params.npz"] = theirs["embedding/width_4k/average_l0_6/params.npz"]
    if card is not None:
        files["README.md"] = card
    return hub.seed(repo_id, files)
