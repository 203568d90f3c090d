"""Special tokens: the one rule by which training, evaluation, harvesting and editing exclude tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import SAEModel
from ..sites.probe import embedding_of, unwrap

_TOKENIZERS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_SPECIAL_IDS: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()


def own_tokenizer(root: nn.Module) -> Any:
    """Return the tokenizer of a model, from local files only; it is loaded once per model.

    Args:
        root: the model without wrappers.

    Returns:
        The tokenizer, or a text with the reason why there is none.
    """
    if root not in _TOKENIZERS:
        _TOKENIZERS[root] = _load_tokenizer(root)
    return _TOKENIZERS[root]


def _load_tokenizer(root: nn.Module) -> Any:
    config: Any = getattr(root, "config", None)
    name = getattr(config, "name_or_path", "")
    if not name:
        return "the model does not state where it was loaded from"
    from transformers import AutoTokenizer  # here, since most models that SAEs are attached to in tests have none

    commit = getattr(config, "_commit_hash", None)
    pinned = {"revision": commit} if commit else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False, **pinned)
        known = len(tokenizer)
    except Exception as error:  # tokenizers raise various errors for missing files or packages
        return f"{name!r} has no tokenizer on this machine ({type(error).__name__})"
    weight = getattr(embedding_of(root), "weight", None)
    if (
        isinstance(weight, Tensor) and 2 * known < weight.shape[0]
    ):  # without a vocabulary, transformers builds an almost empty one
        return f"{name!r} has no tokenizer on this machine (one of {known} tokens, for {weight.shape[0]} of the model)"
    return tokenizer


def special_ids_of(tokenizer: Any) -> list[int]:
    """Return a tokenizer's special tokens, in ascending order.

    The token for unknown text is excluded, as it stands for words, unless it is also BOS, EOS or padding.
    """
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return sorted(marks | (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}))


def special_token_ids(model: Any, sae: SAEModel | None = None) -> list[int]:
    """Return the ids of the tokens that are excluded from training, statistics and edits by default.

    These are the tokens that the SAE's configuration records. If it records none, they are the BOS, EOS and padding
    tokens in the model's configurations, and the special tokens of the model's tokenizer, if that is available
    locally.

    Args:
        model: the causal LM.
        sae: the SAE that is trained, measured or used; None for none.

    Returns:
        Ids in ascending order.
    """
    if sae is not None and sae.config.special_token_ids is not None:
        return sorted(sae.config.special_token_ids)
    found: set[int] = set()
    own = getattr(model, "config", None)
    text = own.get_text_config() if own is not None else None  # the text part of a multimodal model
    for config in (own, text, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [int(value)])
    if isinstance(model, nn.Module):
        found.update(_tokenizer_special_ids(model if model in _SPECIAL_IDS else unwrap(model)[0]))
    return sorted(found)


def _tokenizer_special_ids(root: nn.Module) -> list[int]:
    """Return the special tokens of the model's tokenizer; none if it is not available locally."""
    if root not in _SPECIAL_IDS:
        tokenizer = own_tokenizer(root)
        _SPECIAL_IDS[root] = [] if isinstance(tokenizer, str) else special_ids_of(tokenizer)
    return _SPECIAL_IDS[root]


def special_ids_for(model: Any, keys: Iterable[Any]) -> list[int]:
    """Return the ids of the tokens that are excluded if several SAEs or sites are read in one pass.

    Args:
        model: the causal LM.
        keys: the SAEs and sites that are read.

    Returns:
        The tokens that are special for any of them: for an SAE those of `special_token_ids`, for a site those of the
        model.
    """
    each = [special_token_ids(model, key if isinstance(key, SAEModel) else None) for key in keys]
    return sorted({number for ids in each or [special_token_ids(model)] for number in ids})


def special_token_mask(
    model: Any, input_ids: Tensor | None, attention_mask: Tensor | None = None, *, ids: Tensor | None = None
) -> Tensor | None:
    """Return which tokens are padding or special, and so are excluded from edits and statistics by default.

    Args:
        model: the causal LM, for its special token ids.
        input_ids: ``[B, S]``; None if the model is called with embeddings.
        attention_mask: ``[B, T]`` with ``T >= S``, 0 at padding; its last `S` columns belong to `input_ids`.
        ids: the special token ids ``[n]``, if they are known already.

    Returns:
        Mask ``[B, S]``, True at tokens to exclude; None if none is known to be special.
    """
    masks = []
    if attention_mask is not None and attention_mask.ndim == 2:
        masks.append(attention_mask == 0)
    if input_ids is not None:
        ids = torch.tensor(special_token_ids(model), dtype=input_ids.dtype) if ids is None else ids
        if len(ids):
            masks.append(torch.isin(input_ids, ids.to(input_ids.device)))
    if len(masks) == 2:
        return masks[0][:, -masks[1].shape[1] :].to(masks[1].device) | masks[1]
    return masks[0] if masks else None
