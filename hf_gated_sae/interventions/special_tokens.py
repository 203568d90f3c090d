"""Which tokens are special: the one rule by which training, measuring, harvesting and editing leave tokens out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import SAEModel
from ..sites.probe import embedding_of, unwrap

_TOKENIZERS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_OF_TOKENIZER: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()


def own_tokenizer(root: nn.Module) -> Any:
    """Return the tokenizer of a model, which is looked for on this machine only, once per model.

    Args:
        root: the model without wrappers.

    Returns:
        The tokenizer; or the reason why there is none, as a text.
    """
    if root not in _TOKENIZERS:
        _TOKENIZERS[root] = _found_tokenizer(root)
    return _TOKENIZERS[root]


def _found_tokenizer(root: nn.Module) -> Any:
    config: Any = getattr(root, "config", None)
    name = getattr(config, "name_or_path", "")
    if not name:
        return "the model does not say where it was loaded from"
    from transformers import AutoTokenizer  # here, since most models that SAEs are attached to in tests have none

    commit = getattr(config, "_commit_hash", None)
    pinned = {"revision": commit} if commit else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False, **pinned)
        known = len(tokenizer)
    except Exception as error:  # each kind of tokenizer fails in its own way where files or packages are missing
        return f"{name!r} has no tokenizer on this machine ({type(error).__name__})"
    weight = getattr(embedding_of(root), "weight", None)
    if isinstance(weight, Tensor) and 2 * known < weight.shape[0]:  # transformers makes some up without a vocabulary
        return f"{name!r} has no tokenizer on this machine (one of {known} tokens, for {weight.shape[0]} of the model)"
    return tokenizer


def special_ids_of(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer calls special, in ascending order.

    The one for unknown text is none of them, as it stands for words, unless it is BOS, EOS or padding as well.
    """
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return sorted(marks | (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}))


def special_token_ids(model: Any, sae: SAEModel | None = None) -> list[int]:
    """Return the ids of the tokens that are left out of training, statistics and edits by default.

    These are the tokens that the SAE's configuration records. Where it records none, they are the BOS, EOS and padding
    tokens that the model's configurations name, and the special tokens of the model's own tokenizer, if that is on
    this machine.

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
    text = own.get_text_config() if own is not None else None  # of a model that also sees or hears
    for config in (own, text, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [int(value)])
    if isinstance(model, nn.Module):
        found.update(_ids_of_tokenizer(model if model in _OF_TOKENIZER else unwrap(model)[0]))
    return sorted(found)


def _ids_of_tokenizer(root: nn.Module) -> list[int]:
    """Return what the model's own tokenizer calls special; nothing if it has none on this machine."""
    if root not in _OF_TOKENIZER:
        tokenizer = own_tokenizer(root)
        _OF_TOKENIZER[root] = [] if isinstance(tokenizer, str) else special_ids_of(tokenizer)
    return _OF_TOKENIZER[root]


def special_ids_for(model: Any, keys: Iterable[Any]) -> list[int]:
    """Return the ids of the tokens that are left out where several things are read in one pass.

    Args:
        model: the causal LM.
        keys: SAEs, and whatever else is read.

    Returns:
        The tokens that are special for any of them: for an SAE as `special_token_ids` says, for everything else those
        of the model.
    """
    each = [special_token_ids(model, key if isinstance(key, SAEModel) else None) for key in keys]
    return sorted({number for ids in each or [special_token_ids(model)] for number in ids})


def special_token_mask(
    model: Any, input_ids: Tensor | None, attention_mask: Tensor | None = None, *, ids: Tensor | None = None
) -> Tensor | None:
    """Return which tokens are padding or special, and so are left out of edits and statistics by default.

    Args:
        model: the causal LM, asked for its special token ids.
        input_ids: ``[B, S]``; None where the model is fed embeddings.
        attention_mask: ``[B, T]`` with ``T >= S``, 0 at padding; its last `S` columns belong to `input_ids`.
        ids: the special token ids ``[n]``, where they are known already.

    Returns:
        Mask ``[B, S]``, True at tokens to leave out; None if nothing is known to be special.
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
