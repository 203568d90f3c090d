"""Repositories of base models by the short names that other libraries write."""

from __future__ import annotations

import re

REPOSITORIES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "tiny-stories-1L-21M": "roneneldan/TinyStories-1Layer-21M",
    "tiny-stories-1M": "roneneldan/TinyStories-1M",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
}
OWNERS = {
    "gemma-2-": "google/gemma-2-",
    "gemma-3-": "google/gemma-3-",
    "pythia-": "EleutherAI/pythia-",
    "qwen3-": "Qwen/Qwen3-",
    "qwen2.5-": "Qwen/Qwen2.5-",
    "qwen2-": "Qwen/Qwen2-",
    "llama-3.": "meta-llama/Llama-3.",
    "deepseek-r1-": "deepseek-ai/DeepSeek-R1-",
    "gpt-oss-": "openai/gpt-oss-",
}
"""Prefixes of families whose short names differ from the repository id only at the beginning."""

_SIZE = re.compile(r"a?[\d.]+b", re.IGNORECASE)


def repository_of(name: str | None) -> str | None:
    """Return the repository id of a base model.

    Args:
        name: a short name such as ``"gemma-2-2b"``, or a repository id, which is returned unchanged.

    >>> repository_of("pythia-70m-deduped")
    'EleutherAI/pythia-70m-deduped'
    >>> repository_of("qwen3-1.7b")
    'Qwen/Qwen3-1.7B'
    >>> repository_of("qwen2.5-7b-instruct")
    'Qwen/Qwen2.5-7B-Instruct'
    """
    if not name or "/" in name:
        return name or None
    if name in REPOSITORIES:
        return REPOSITORIES[name]
    for prefix, repository in OWNERS.items():
        if name.lower().startswith(prefix):
            rest = name[len(prefix) :]
            return repository + (_sized(rest) if repository.startswith("Qwen/") else rest)
    return name


def _sized(rest: str) -> str:
    """Capitalise sizes, and the words after them, as Qwen does."""
    return "-".join(part.upper() if _SIZE.fullmatch(part) else part[:1].upper() + part[1:] for part in rest.split("-"))
