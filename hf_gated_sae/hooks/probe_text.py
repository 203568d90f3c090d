"""A short text of several kinds, on which an SAE is tried when it is attached."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions.special_tokens import own_tokenizer
from ..sites.probe import embedding_of

TEXT = '''The ferry from the northern harbour left at 9:40 with 212 passengers, eleven cars and a very nervous horse.
Nobody aboard knew yet that the pier on the far side had been closed since Tuesday. "Then we turn round," said the
captain, "and somebody will have to explain it to the horse."

def mean(values: list[float]) -> float:
    """Return the arithmetic mean."""
    if not values:
        raise ValueError("mean() needs at least one value")
    return sum(values) / len(values)

The liver keeps glucose as glycogen and gives it back between meals, so that the brain never has to wait for lunch. The
price of copper fell by 18 % in 1987, rose again, and ended the year where it had begun. Who would have thought so?
Question: which of these numbers is prime: 21, 27, 29 or 33? Answer: 29, since none of 2, 3 and 5 divides it.
'''
TOKENS = 128

_TOKENS: weakref.WeakKeyDictionary[nn.Module, Tensor | str] = weakref.WeakKeyDictionary()


def probe_tokens(root: nn.Module) -> Tensor | str:
    """Return the text tokenised by the model's own tokenizer, if it is on this machine; cached per model.

    The text begins with the beginning-of-sequence token, if there is one, since models treat the first token
    differently from all others.

    Args:
        root: the model without wrappers.

    Returns:
        Ids ``[1, S]`` with S up to 128, on the device of the embedding; or the reason why there are none.
    """
    if root not in _TOKENS:
        _TOKENS[root] = _tokenised(root)
    return _TOKENS[root]


def _tokenised(root: nn.Module) -> Tensor | str:
    config: Any = getattr(root, "config", None)
    name = getattr(config, "name_or_path", "")
    tokenizer = own_tokenizer(root)
    if isinstance(tokenizer, str):
        return tokenizer
    try:
        ids = list(tokenizer(TEXT, verbose=False)["input_ids"])
    except Exception as error:  # of any kind, as when loading it
        return f"the tokenizer of {name!r} on this machine does not work ({type(error).__name__})"
    if len(set(ids)) < TOKENS // 8:  # some tokenizers load without a vocabulary if their files are missing
        return f"the tokenizer of {name!r} splits the text into only {len(set(ids))} different tokens"
    first = tokenizer.bos_token_id
    if first is not None and first not in ids[:1]:
        ids = [first, *ids]
    longest = min(TOKENS, int(getattr(config, "max_position_embeddings", None) or TOKENS))
    if longest < TOKENS // 4:
        return f"{name!r} takes at most {longest} tokens, which are too few"
    weight = getattr(embedding_of(root), "weight", None)
    found = torch.tensor([ids[:longest]])
    if not isinstance(weight, Tensor) or int(found.max()) >= weight.shape[0]:
        return f"the tokenizer of {name!r} has token ids that the model does not have"
    return found.to("cpu" if weight.device.type == "meta" else weight.device)
