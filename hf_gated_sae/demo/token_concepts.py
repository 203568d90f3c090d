"""Ground truth of the demo: the concepts of each character and token of a Python text."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import InputError, unknown_name
from .concept_table import CONCEPTS, Concept, Span, concept
from .lexer import lex

__all__ = ["CONCEPTS", "Concept", "Concepts", "Span", "concept", "concept_share", "token_labels"]


class Concepts:
    """The concept labels of one text.

    Args:
        text: Python source, possibly truncated or invalid.
        names: the requested concepts, in this order; None for all of `CONCEPTS`.

    Raises:
        UnknownNameError: a name is not among `CONCEPTS`.
    """

    def __init__(self, text: str, names: Sequence[str] | None = None) -> None:
        self.text = text
        self.names = tuple(CONCEPTS if names is None else names)
        for name in self.names:
            if name not in CONCEPTS:
                raise unknown_name("concept", name, CONCEPTS)
        source = lex(text)
        self.characters: Tensor = torch.zeros(len(self.names), len(text), dtype=torch.bool)
        """Which character has which concept: bool [n_concepts, n_characters]."""
        for row, name in zip(self.characters, self.names, strict=True):
            _mark(row, CONCEPTS[name].find(source))
        self._visible = torch.tensor([not character.isspace() for character in text], dtype=torch.bool)

    def token_labels(self, offsets: Sequence[Span] | Tensor) -> Tensor:
        """Return which token has which concept.

        A token has a concept if more than half of its characters have it. Blanks count only in tokens that consist of
        blanks, and for the concepts of indentation. A token without characters has no concept.

        Args:
            offsets: of the first character and after the last one of every token, [n_tokens, 2], as returned by a fast
                tokenizer with `return_offsets_mapping=True`.

        Returns:
            bool [n_tokens, n_concepts], columns in the order of `names`.

        Raises:
            InputError: the offsets are not pairs, or point outside the text.
        """
        start, end = self._checked(offsets).unbind(dim=1)
        visible = _count(self._visible, start, end)
        columns = []
        for row, name in zip(self.characters, self.names, strict=True):
            count_all = torch.full_like(visible, CONCEPTS[name].counts_whitespace, dtype=torch.bool) | (visible == 0)
            hits = torch.where(count_all, _count(row, start, end), _count(row & self._visible, start, end))
            columns.append(2 * hits > torch.where(count_all, end - start, visible))
        return torch.stack(columns, dim=1) if columns else torch.zeros(len(start), 0, dtype=torch.bool)

    def share(self, name: str, start_char: int = 0) -> float:
        """Return the share of the text after some character that has a concept.

        Args:
            name: one of `names`.
            start_char: number of characters to leave out at the beginning, such as a prompt.

        Returns:
            Fraction of the characters (without blanks except for the concepts of indentation); 0 if there are none.

        Raises:
            UnknownNameError: `name` is not among `names`.
            InputError: `start_char` is outside the text.
        """
        if name not in self.names:
            raise unknown_name("concept", name, self.names)
        if not 0 <= start_char <= len(self.text):
            raise InputError(f"start_char is {start_char}; expected 0 to {len(self.text)}, the length of the text.")
        labels, counted = self.characters[self.names.index(name), start_char:], self._visible[start_char:]
        if not CONCEPTS[name].counts_whitespace:
            labels = labels[counted]
        return labels.float().mean().item() if len(labels) else 0.0

    def _checked(self, offsets: Sequence[Span] | Tensor) -> Tensor:
        """Return offsets as a tensor [n_tokens, 2], or raise if they do not belong to the text."""
        pairs = torch.as_tensor(offsets, dtype=torch.int64, device="cpu")
        if pairs.numel() == 0:
            return pairs.reshape(0, 2)
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise InputError(f"The offsets have shape {list(pairs.shape)}; expected [n_tokens, 2], for one text.")
        if pairs.min() < 0 or pairs.max() > len(self.text) or (pairs[:, 0] > pairs[:, 1]).any():
            raise InputError(
                f"The offsets span {pairs.min()} to {pairs.max()}, but the text has {len(self.text)} characters. Give "
                "the offsets of this text, each pair as (first, after the last)."
            )
        return pairs


def token_labels(text: str, offsets: Sequence[Span] | Tensor, names: Sequence[str] | None = None) -> Tensor:
    """Label the tokens of a text: `Concepts(text, names).token_labels(offsets)`.

    Args:
        text: the tokenized text.
        offsets: [n_tokens, 2], see `Concepts.token_labels`.
        names: the requested concepts; None for all of `CONCEPTS`.

    Returns:
        bool [n_tokens, n_concepts].

    Raises:
        UnknownNameError: a name is not among `CONCEPTS`.
        InputError: the offsets do not belong to the text.
    """
    return Concepts(text, names).token_labels(offsets)


def concept_share(text: str, start_char: int, name: str) -> float:
    """Return the share of a text after a prompt with a concept: `Concepts(text, [name]).share(name, start_char)`.

    Args:
        text: prompt and continuation.
        start_char: length of the prompt in characters.
        name: one of `CONCEPTS`.

    Returns:
        Fraction of the characters after `start_char`.

    Raises:
        UnknownNameError: the name is not among `CONCEPTS`.
        InputError: `start_char` is outside the text.
    """
    return Concepts(text, [name]).share(name, start_char)


def _mark(row: Tensor, spans: Iterable[Span]) -> None:
    """Set the spans in one row of labels [n_characters]."""
    # Setting hundreds of thousands of short slices is several times faster in a bytearray than in a tensor.
    marks = bytearray(len(row))
    for start, end in spans:
        marks[start:end] = b"\x01" * (end - start)
    if marks:
        row.copy_(torch.frombuffer(marks, dtype=torch.bool))


def _count(labels: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Count the true labels [n_characters] between offsets [n_tokens] and [n_tokens]."""
    total = torch.cat([torch.zeros(1, dtype=torch.int64), labels.cumsum(0)])
    return total[end] - total[start]
