"""A tokenizer of one token per word for the tiny models: `w3` is token 3; 0, 1 and 2 are padding, BOS and EOS."""

from __future__ import annotations

import random
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2


def word_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Build the tokenizer; `special` replaces its special tokens, and None removes one."""
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, **{f"w{n}": n for n in range(3, 97)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, **{name: token for name, token in tokens.items() if token is not None}
    )


def documents(count: int, longest: int = 20, seed: int = 0) -> list[str]:
    """Return random documents; some are empty."""
    dice = random.Random(seed)
    return [" ".join(f"w{dice.randrange(3, 97)}" for _ in range(dice.randrange(longest))) for _ in range(count)]
