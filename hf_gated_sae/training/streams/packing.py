"""Tokenising documents into sequences of tokens, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import InputError, unknown_name
from ...hooks.token_batches import TokenBatch
from ...interventions.special_tokens import special_ids_of
from ...sites.probe import unwrap
from .base import Cursor, State
from .dataset import open_text
from .text import Text
from .tokens import TokenStream

BOS_POLICIES = ("document", "sequence", "none")
DOCUMENTS_AT_ONCE = 64
"""Number of documents tokenised in one call, which fast tokenizers distribute over several cores."""


@dataclass(frozen=True)
class Layout:
    """The layout of sequences: their length and the tokens that are added to the documents.

    Attributes:
        length: tokens per sequence; the maximum if documents are not packed.
        packed: whether documents follow each other within a sequence.
        bos: added before each document.
        eos: added after each document.
        first: added before each sequence.
        pad: fills up sequences of documents that are not packed.
    """

    length: int
    packed: bool
    bos: tuple[int, ...]
    eos: tuple[int, ...]
    first: tuple[int, ...]
    pad: int


class TextTokens(TokenStream):
    """Tokens of a text, in batches of sequences.

    With packing, documents are concatenated and split into sequences of equal length, so the model reads the end of
    one document before the beginning of the next; an incomplete last sequence is dropped. Without packing, each
    document is a sequence of its own, truncated to `context_length` and padded at its end.

    Special tokens are all that the tokenizer marks as special, such as turn markers of a chat, at any position; except
    the unknown token, unless it is also BOS, EOS or padding.

    Args:
        text: anything that `open_text` opens with its defaults, or a `Text`.
        tokenizer: the model's.
        context_length: tokens per sequence, BOS and EOS included.
        sequences_per_batch: sequences per forward of the model.
        packing: whether to pack.
        bos: the tokenizer's BOS before each ``"document"``, before each ``"sequence"``, or ``"none"``; by default
            before each sequence, as models expect it, if the tokenizer has one.
        eos: whether the tokenizer's EOS follows each document; by default it does between packed documents that no
            BOS separates, if the tokenizer has one.

    Raises:
        InputError: if the tokenizer lacks a requested token, or a sequence has no room for text; while reading, if the
            text is empty, or too short for a single sequence.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from hf_gated_sae.demo import bundled
        >>> tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
        >>> tokens = TextTokens(["import os", "import sys, os"], tokenizer, context_length=4)
        >>> for batch in tokens:
        ...     print(tokenizer.batch_decode(batch["input_ids"]))
        ['<|endoftext|>import os<|endoftext|>', '<|endoftext|>import sys,']
    """

    def __init__(
        self,
        text: Any,
        tokenizer: Any,
        *,
        context_length: int = 1024,
        sequences_per_batch: int = 32,
        packing: bool = True,
        bos: Literal["document", "sequence", "none"] | None = None,
        eos: bool | None = None,
    ) -> None:
        self.text: Text = open_text(text)
        self.tokenizer = tokenizer
        self.sequences_per_batch = sequences_per_batch
        self.layout = _layout(tokenizer, context_length, packing, bos, eos)
        if sequences_per_batch < 1:
            raise InputError(f"sequences_per_batch is {sequences_per_batch}; expected at least 1.")
        self.special_ids = tuple(special_ids_of(tokenizer))

    @property
    def context_length(self) -> int:
        """Tokens per sequence."""
        return self.layout.length

    def facts(self) -> dict[str, Any]:
        """Return the layout of sequences; the number per batch does not change their content."""
        layout = self.layout
        bos = "document" if layout.bos else "sequence" if layout.first else "none"
        return {"context_length": layout.length, "packing": layout.packed, "bos": bos, "eos": bool(layout.eos)}

    def require_fitting(self, model: Any) -> None:
        """Raise if the sequences are longer than the model can read.

        Raises:
            InputError: with both lengths.
        """
        config: Any = unwrap(model)[0].config
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and self.layout.length > longest:
            raise InputError(
                f"context_length is {self.layout.length}, and the model reads at most {longest} tokens at a time: "
                f"pass context_length={longest} or less."
            )

    def open(self, state: State | None = None) -> Cursor[TokenBatch]:
        """Return an iterator over the batches of one epoch."""
        return _Sequences(self, state)

    def shard(self, rank: int, world_size: int) -> TextTokens:
        """Return the tokens of one process's part of the text."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, text=self.text.shard(rank, world_size))
        return part


class _Sequences(Cursor[TokenBatch]):
    """Reads, tokenises and packs a text once.

    Args:
        tokens: to read.
        state: saved position to continue from.
    """

    def __init__(self, tokens: TextTokens, state: State | None) -> None:
        self.tokens = tokens
        self.read = self.given = 0  # tokens read from the text, and sequences returned
        self.packer = _Packer(tokens.layout) if tokens.layout.packed else _Padder(tokens.layout)
        if state is not None:
            self.read, self.given = state["tokens"], state["sequences"]
            self.packer.load_state_dict(state["packer"])
        self.reader = tokens.text.open(None if state is None else state["text"])
        self._ended = False

    def __next__(self) -> TokenBatch:
        """Return the next batch of sequences; the last one may have fewer.

        Raises:
            InputError: if the text ends before its first sequence.
        """
        while not self._ended and self.packer.ready < self.tokens.sequences_per_batch:
            documents = self.reader.take(DOCUMENTS_AT_ONCE)
            self._ended = not documents
            if documents:
                self._add(documents)
        count = min(self.packer.ready, self.tokens.sequences_per_batch)
        if not count:
            if not self.given:
                raise self._too_short()
            raise StopIteration
        self.given += count
        return self.packer.take(count)

    def _add(self, documents: list[str]) -> None:
        found = self.tokens.tokenizer(
            documents,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about documents longer than the model's context
        )["input_ids"]
        self.read += sum(map(len, found))
        self.packer.add([ids for ids in found if ids])

    def _too_short(self) -> InputError:
        text, layout = self.tokens.text, self.tokens.layout
        part = f", the part of process {text.rank} of {text.world_size}" if text.world_size > 1 else ""
        where = f"The text ({text.name}{part})"
        if not self.reader.count and text.rank:
            return InputError(
                f"{where} is empty: every process needs at least one document. Give more documents, or divide them "
                "(documents: paragraph, or line)."
            )
        if not self.reader.count:
            return InputError(
                f"{where} is empty: it has no documents. A generator can only be read once: pass a list."
            )
        found = f"{self.reader.count} documents with {self.read} tokens"
        if not self.read:
            return InputError(f"{where} is empty: it has {found}.")
        return InputError(
            f"{where} is too short: it has {found}, less than one sequence of context_length {layout.length}, special "
            "tokens included. Give more text, or a smaller context_length."
        )

    def state_dict(self) -> State:
        """Return the position in the text, and the tokens that were read and not yet returned."""
        return {
            "tokens": self.read,
            "sequences": self.given,
            "text": self.reader.state_dict(),
            "packer": self.packer.state_dict(),
        }


class _Packer:
    """Concatenates all documents and splits them into sequences of equal length."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.body = layout.length - len(layout.first)
        self._flow = torch.empty(0, dtype=torch.int64)  # the tokens that are not in a sequence yet

    @property
    def ready(self) -> int:
        """Number of complete sequences."""
        return len(self._flow) // self.body

    def add(self, documents: Sequence[list[int]]) -> None:
        """Append documents."""
        bos, eos = list(self.layout.bos), list(self.layout.eos)
        pieces = [torch.tensor([*bos, *ids, *eos], dtype=torch.int64) for ids in documents]
        self._flow = torch.cat([self._flow, *pieces])

    def take(self, count: int) -> dict[str, Tensor]:
        """Return the next sequences, ``input_ids [count, length]``."""
        bodies, self._flow = self._flow[: count * self.body], self._flow[count * self.body :]
        first = torch.tensor(self.layout.first, dtype=torch.int64).expand(count, -1)
        return {"input_ids": torch.cat([first, bodies.view(count, self.body)], -1)}

    def state_dict(self) -> State:
        """Return the tokens that are not in a sequence yet."""
        return {"flow": self._flow.clone()}

    def load_state_dict(self, state: State) -> None:
        """Restore a saved state."""
        self._flow = state["flow"].clone()


class _Padder:
    """Makes one sequence of each document."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._waiting: list[Tensor] = []

    @property
    def ready(self) -> int:
        """Number of complete sequences."""
        return len(self._waiting)

    def add(self, documents: Sequence[list[int]]) -> None:
        """Append documents, truncated to the length of a sequence."""
        layout = self.layout
        bos = [*layout.first, *layout.bos]
        room = layout.length - len(bos) - len(layout.eos)
        self._waiting += [torch.tensor([*bos, *ids[:room], *layout.eos]) for ids in documents]

    def take(self, count: int) -> dict[str, Tensor]:
        """Return the next sequences, ``input_ids`` and ``attention_mask``, both ``[count, longest]``."""
        sequences, self._waiting = self._waiting[:count], self._waiting[count:]
        ids = pad_sequence(sequences, batch_first=True, padding_value=self.layout.pad)
        lengths = torch.tensor([len(each) for each in sequences])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def state_dict(self) -> State:
        """Return the sequences that were not taken yet, concatenated, and their lengths."""
        flow = torch.cat([torch.empty(0, dtype=torch.int64), *self._waiting])
        return {"flow": flow, "lengths": [len(each) for each in self._waiting]}

    def load_state_dict(self, state: State) -> None:
        """Restore a saved state."""
        self._waiting = [each.clone() for each in state["flow"].split(state["lengths"])] if state["lengths"] else []


def _layout(tokenizer: Any, length: int, packed: bool, bos: str | None, eos: bool | None) -> Layout:
    """Return the layout of sequences.

    Raises:
        InputError: if the tokenizer lacks a requested token, or a sequence has no room for text.
    """
    if bos is not None and bos not in BOS_POLICIES:
        raise unknown_name("BOS policy", bos, BOS_POLICIES)
    bos_id, eos_id, pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    policy = bos or ("none" if bos_id is None else "sequence")
    ends = (packed and policy != "document" and eos_id is not None) if eos is None else eos
    for name, token, wanted in (("BOS", bos_id, policy != "none"), ("EOS", eos_id, ends)):
        if wanted and token is None:
            off = "bos='none'" if name == "BOS" else "eos=False"
            raise InputError(
                f"The tokenizer {tokenizer.name_or_path!r} has no {name} token, which bos={bos!r}, eos={eos!r} "
                f"require: pass {off}, or set tokenizer.{name.lower()}_token."
            )
    before = () if policy == "none" else (bos_id,)
    layout = Layout(
        length=length,
        packed=packed,
        bos=before if policy == "document" else (),
        eos=(eos_id,) if ends else (),
        first=before if policy == "sequence" else (),
        pad=next((token for token in (pad_id, eos_id) if token is not None), 0),
    )
    added = len(layout.first) + (0 if packed else len(layout.bos) + len(layout.eos))
    if length <= added:
        raise InputError(f"context_length is {length}; expected more than the {added} special tokens of a sequence.")
    return layout
