"""Text in windows of tokens, with ground-truth labels of every token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .token_concepts import CONCEPTS, token_labels


@dataclass(frozen=True)
class LabelledText:
    """Windows of equal length, with labels.

    Attributes:
        input_ids: ``[N, S]``.
        labels: which token has which concept, ``[N, S, n_concepts]`` bool; None if the text is not Python.
        names: the concepts, in the order of `labels`.
        rows: windows per forward.
    """

    input_ids: Tensor
    labels: Tensor | None
    names: tuple[str, ...]
    rows: int = 8

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield the model's inputs, `rows` windows at a time."""
        for ids in self.input_ids.split(self.rows):
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def halves(self) -> tuple[LabelledText, LabelledText]:
        """Return every other window, and the rest: a latent is chosen on one half and shown on the other."""
        pick = [
            replace(
                self,
                input_ids=self.input_ids[start::2],
                labels=None if self.labels is None else self.labels[start::2],
            )
            for start in (0, 1)
        ]
        return pick[0], pick[1]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.input_ids.numel()


def cut(
    tokenizer: Any, texts: Iterable[str], *, window: int, windows: int, python: bool, rows: int = 8
) -> LabelledText:
    """Tokenise texts and split them into windows, each within one text.

    Args:
        tokenizer: a fast tokenizer of transformers.
        texts: documents.
        window: tokens per window, including the special tokens that the tokenizer adds before a text.
        windows: maximum number of windows.
        python: whether the texts are Python source and can be labelled.
        rows: windows per forward.

    Returns:
        The windows.

    Raises:
        InputError: if there is not enough text for one window.
    """
    prefix = list(tokenizer("")["input_ids"])
    body = window - len(prefix)
    ids: list[list[int]] = []
    labels: list[Tensor] = []
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=python, verbose=False)
        tokens = encoded["input_ids"]
        marks = token_labels(text, encoded["offset_mapping"]) if python else None
        for start in range(0, len(tokens) - body + 1, body):
            ids.append([*prefix, *tokens[start : start + body]])
            if marks is not None:
                before = torch.zeros(len(prefix), marks.shape[1], dtype=torch.bool)
                labels.append(torch.cat([before, marks[start : start + body]]))
        if len(ids) >= windows:
            break
    if not ids:
        raise InputError(f"The text is shorter than one window of {window} tokens; give a longer text.")
    return LabelledText(
        input_ids=torch.tensor(ids[:windows]),
        labels=torch.stack(labels[:windows]) if python else None,
        names=tuple(CONCEPTS) if python else (),
        rows=rows,
    )
