"""Opening the text of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import MissingFileError
from .. import proportions
from ..arguments import SAETrainingArguments
from ..streams import HeldBack, Text, TextTokens, TokenStream
from ..streams.dataset import open_files, open_text
from ..streams.held_back import can_hold_back
from .commits import commit_on_hub
from .run_config import DataSettings

LONGEST_CONTEXT = 1024
"""Default number of tokens per sequence, unless the model reads fewer."""


def pinned_data(data: DataSettings) -> DataSettings:
    """Return the settings with the commit of the data set's revision; errors as for `commit_on_hub`."""
    if data.dataset is None:
        return data
    commit = commit_on_hub(data.dataset, data.revision, "dataset", "data.dataset")
    return dataclasses.replace(data, revision=commit)


def open_tokens(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, text: Text | None = None
) -> TextTokens:
    """Return the text as batches of tokens; errors as for `open_text` and `TextTokens`.

    Args:
        data: the settings of the text and of its sequences.
        tokenizer: the model's.
        model: limits the length of a sequence if the run does not state it.
        text: another text, to be made into sequences in the same way.
    """
    return TextTokens(
        open_documents(data) if text is None else text,
        tokenizer,
        context_length=context_length(data, model),
        sequences_per_batch=data.sequences_per_batch or 32,
        packing=data.packing,
        bos=data.bos,
        eos=data.eos,
    )


def context_length(data: DataSettings, model: PreTrainedModel) -> int:
    """Return the number of tokens per sequence."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_CONTEXT
    return min(longest, LONGEST_CONTEXT) if data.context_length is None else data.context_length


def sized(data: DataSettings, args: SAETrainingArguments, model: PreTrainedModel) -> DataSettings:
    """Return the settings with every size that has no value chosen in proportion to the run."""
    activations = args.max_steps * args.activation_batch_size * args.gradient_accumulation_steps
    length = context_length(data, model)
    chosen: dict[str, Any] = {
        "sequences_per_batch": proportions.sequences_per_batch(activations, length),
        "buffer_size": proportions.buffer_size(activations, args.activation_batch_size),
        "held_out_tokens": -(-proportions.HELD_OUT.of(activations) // length) * length,
    }
    return dataclasses.replace(data, **{name: value for name, value in chosen.items() if getattr(data, name) is None})


def with_held_out(
    data: DataSettings,
    tokens: TextTokens,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    processes: int = 1,
) -> TokenStream:
    """Return the tokens of a run together with its held-out tokens.

    Each process holds back the first sequences of its part, if the text has at least ten times as many sequences as
    all processes hold back.

    Args:
        data: with sizes, see `sized`.
        tokens: of the run's text.
        tokenizer: the model's.
        model: limits the length of a sequence.
        processes: number of processes, each of which reads a part.

    Raises:
        InputError: if the text named by `held_out` cannot be opened, or is empty.
    """
    sequences = -(-(data.held_out_tokens or 0) // tokens.context_length)
    if data.held_out is not None:
        other = open_tokens(data, tokenizer, model, open_other(data, data.held_out, "test"))
        next(iter(other))  # raises now if the text is empty
        return HeldBack(tokens, sequences, other)
    enough = sequences and can_hold_back(tokens, sequences * processes)
    return HeldBack(tokens, sequences) if enough else tokens


def open_documents(data: DataSettings) -> Text:
    """Return the documents of a run's text; errors as for `open_text`."""
    if data.dataset is not None:
        return open_text(
            data.dataset,
            config=data.config,
            split=data.split,
            revision=data.revision,
            column=data.text_column,
            streaming=data.streaming,
        )
    if isinstance(data.files, str):
        if "*" in data.files and not Path(data.files).exists():
            raise MissingFileError(f"There is no {data.files}; expected a pattern in a list, [{data.files}].")
        return open_text(Path(data.files), column=data.text_column, streaming=data.streaming, documents=data.documents)
    files = _matching(data.files or [])
    return open_files(files, column=data.text_column, streaming=data.streaming, documents=data.documents)


def open_other(data: DataSettings, text: str, split: str) -> Text:
    """Return the documents of another text, read with the run's settings; errors as for `open_text`.

    Args:
        data: the settings of the run's own text.
        text: file, folder or Hub id of a data set.
        split: of a data set.
    """
    own = {"config": data.config, "revision": data.revision} if text == data.dataset else {}
    return open_text(
        text, split=split, column=data.text_column, streaming=data.streaming, documents=data.documents, **own
    )


def _matching(patterns: list[str]) -> list[str]:
    """Return the files that match paths and patterns.

    Raises:
        MissingFileError: for a pattern without a match.
    """
    found: list[str] = []
    for pattern in map(Path, patterns):
        root = Path(pattern.anchor)
        here = [pattern] if pattern.exists() else sorted(root.glob(str(pattern.relative_to(root))))
        if not here:
            raise MissingFileError(f"data.files: there is no {pattern}; expected a path, or a pattern such as *.txt.")
        found += map(str, here)
    return found
