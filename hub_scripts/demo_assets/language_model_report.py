"""Measuring the demo's language model: its loss on held-out files, and how much of its generated text is Python."""

import ast
import codeop
import platform
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gated_sae.demo import corpus
from hf_gated_sae.demo.lexer import LogicalLine, lex

from .language_model import END_OF_TEXT, LanguageModelRecipe, pack, token_stream


@dataclass(frozen=True)
class HeldOutLoss:
    """Next-token loss on held-out text, compared with a unigram model.

    Args:
        tokens: predicted tokens.
        bytes: their utf-8 bytes.
        nats_per_token: mean loss of the model.
        nats_per_byte: summed loss of the model over `bytes`.
        unigram_nats_per_token: the same for a unigram counted on the training text, over the same tokens.
        unigram_nats_per_byte: the same per byte.
    """

    tokens: int
    bytes: int
    nats_per_token: float
    nats_per_byte: float
    unigram_nats_per_token: float
    unigram_nats_per_byte: float

    @property
    def share_of_unigram(self) -> float:
        """The model's loss as a fraction of the unigram's; lower is better."""
        return self.nats_per_byte / self.unigram_nats_per_byte


@dataclass(frozen=True)
class LineCount:
    """The number of lines of generated text that are Python.

    Only complete physical lines that are not blank are counted. A line is *Python-looking* if its logical line parses
    as a statement (a block header with `pass` as its body; `else`, `except` and the like below a suitable block) or is
    a comment. The complete lines of a last logical line that the end of the text truncates are Python-looking if they
    can still become a statement. *Code lines* are those of complete logical lines with other tokens than comments and
    strings; they have to parse.

    Args:
        lines: complete lines that are not blank.
        python_lines: lines that are Python-looking.
        code_lines: code lines.
        parsed_code_lines: code lines that parse.
    """

    lines: int = 0
    python_lines: int = 0
    code_lines: int = 0
    parsed_code_lines: int = 0

    def __add__(self, other: "LineCount") -> "LineCount":
        """Add two counts."""
        return LineCount(
            self.lines + other.lines,
            self.python_lines + other.python_lines,
            self.code_lines + other.code_lines,
            self.parsed_code_lines + other.parsed_code_lines,
        )


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out_texts: Iterable[str],
    training_stream: Tensor,
    batch_size: int = 16,
) -> HeldOutLoss:
    """Measure the loss on text that the model was not trained on, in sequences as long as its context.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        held_out_texts: documents.
        training_stream: token ids [n_tokens] for the counts of the unigram (one is added to every count).
        batch_size: sequences per forward pass.

    Returns:
        The losses; the first token of each sequence is not predicted.
    """
    counts = torch.bincount(training_stream, minlength=len(tokenizer)).double() + 1
    unigram = -(counts / counts.sum()).log()
    lengths = token_lengths(tokenizer)
    loss = unigram_loss = 0.0
    tokens = n_bytes = 0
    sequences = pack(token_stream(tokenizer, held_out_texts), model.config.max_position_embeddings)
    for batch in sequences.split(batch_size):
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1]
        targets = batch[:, 1:].flatten()
        loss += F.cross_entropy(logits.flatten(0, 1).double(), targets.to(model.device), reduction="sum").item()
        unigram_loss += unigram[targets].sum().item()
        tokens += len(targets)
        n_bytes += int(lengths[targets].sum())
    return HeldOutLoss(tokens, n_bytes, loss / tokens, loss / n_bytes, unigram_loss / tokens, unigram_loss / n_bytes)


def token_lengths(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the number of bytes of each token.

    Args:
        tokenizer: byte-level, so that every character of a vocabulary entry is one byte.

    Returns:
        int64 [vocab_size]; 0 for `<|endoftext|>`.
    """
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if token == END_OF_TEXT else len(token) for token in vocabulary])


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    tokens: int = 128,
    temperature: float = 0.8,
    seed: int = 0,
    prompt: str = "",
) -> list[str]:
    """Sample texts from the model's full distribution; the global random state does not change.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        count: number of texts.
        tokens: length of each text in tokens; shorter if an end of text is sampled.
        temperature: of the softmax.
        seed: of the samples.
        prompt: beginning of every text, which the result does not include. End it before a line break: the tokenizer
            joins a break with the following indentation, so a break alone means that the next line is not indented.

    Returns:
        `count` texts.
    """
    start = token_stream(tokenizer, [prompt]).to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        # transformers types the method's `self` as a protocol that its own models do not satisfy.
        written: Tensor = cast(Any, model).generate(
            input_ids=start.expand(count, -1),
            attention_mask=torch.ones(count, len(start), dtype=torch.int64, device=model.device),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
        )
    return tokenizer.batch_decode(
        written[:, len(start) :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def count_python_lines(text: str) -> LineCount:
    """Count how many lines of a text are Python; a last line without a line break is left out.

    Args:
        text: generated text that starts at the beginning of a line.

    Returns:
        The counts, defined in `LineCount`.
    """
    source = lex(text[: text.rfind("\n") + 1])
    total = LineCount()
    for line in source.lines:
        size = sum(1 for physical in source.text[line.start : line.end].splitlines() if physical.strip())
        if not line.complete and line is source.lines[-1]:
            total += LineCount(size, size * _can_be_completed(line, source.text))
        elif all(token.kind == "string" for token in line.tokens):
            total += LineCount(size, size * _parses(line, source.text))
        else:
            good = size * _parses(line, source.text)
            total += LineCount(size, good, size, good)
    return total


# Code before and after a line that makes it a complete statement, by its first word.
_SURROUNDINGS = {
    **dict.fromkeys(("elif", "else"), ("if x:\n pass\n", "")),
    **dict.fromkeys(("except", "finally"), ("try:\n pass\n", "")),
    "try": ("", "\nfinally:\n pass"),
    "@": ("", "\ndef f():\n pass"),
    "case": ("match x:\n ", ""),
}


def _parses(line: LogicalLine, text: str) -> bool:
    """Whether a logical line is a statement, in any block."""
    if not line.complete or not line.tokens:
        return line.complete
    before, after = _SURROUNDINGS.get(line.tokens[0].text, ("", ""))
    body = " pass" if line.tokens[-1].text == ":" else ""
    with warnings.catch_warnings():
        # Invalid escapes and comparisons of literals are valid Python that only causes warnings.
        warnings.simplefilter("ignore")
        try:
            ast.parse(before + text[line.tokens[0].start : line.tokens[-1].end] + body + after)
        except (SyntaxError, ValueError):
            return False
    return True


def _can_be_completed(line: LogicalLine, text: str) -> bool:
    """Whether an incomplete logical line could become a statement."""
    before, _ = _SURROUNDINGS.get(line.tokens[0].text, ("", ""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return codeop.compile_command(before + text[line.tokens[0].start :], symbol="exec") is None
        except (SyntaxError, ValueError, OverflowError):
            return False


SAMPLES: dict[str, Any] = {"count": 100, "tokens": 128, "temperature": 0.8, "seed": 0}
"""Settings of the samples, from `<|endoftext|>` alone, in which lines of Python are counted."""


def training_facts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: LanguageModelRecipe
) -> dict[str, Any]:
    """Measure the facts of the model's card and of `training.json`.

    Args:
        model: loaded from its stored weights.
        tokenizer: its tokenizer.
        recipe: with which it was trained, on the training files of this Python.

    Returns:
        Facts as plain JSON; losses in nats.
    """
    training_texts = list(corpus.texts("training"))
    stream = token_stream(tokenizer, training_texts)
    loss = held_out_loss(model, tokenizer, corpus.texts("held_out"), stream)
    lines = LineCount()
    for text in sample(model, tokenizer, **SAMPLES):
        lines += count_python_lines(text)
    tokens_seen = recipe.steps * recipe.batch_size * recipe.context
    return {
        "corpus": {
            "name": "Python standard library",
            "python": platform.python_version(),
            "training_files": len(corpus.training_files()),
            "training_bytes": sum(len(text.encode()) for text in training_texts),
            "training_tokens": len(stream),
            "training_sha256": corpus.corpus_digest("training"),
            "held_out_files": len(corpus.held_out_files()),
            "held_out_sha256": corpus.corpus_digest("held_out"),
        },
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_seen": tokens_seen,
        "epochs": round(tokens_seen / len(stream), 3),
        "held_out": {**asdict(loss), "share_of_unigram": loss.share_of_unigram},
        "samples": {
            **SAMPLES,
            **asdict(lines),
            "python_line_share": lines.python_lines / max(1, lines.lines),
            "parsed_code_line_share": lines.parsed_code_lines / max(1, lines.code_lines),
        },
        "torch": torch.__version__.partition("+")[0],
    }
