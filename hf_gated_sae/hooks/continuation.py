"""Prove, once per model, that its calls are read correctly: positions after a cache, and the effect of padding.

How a model takes and returns its cache differs between families, and between versions of transformers. A cache that is
not recognised would make every token of a generation look like the first one. So the probe's tokens are run in two
calls, the second with the cache of the first. The positions read from these calls are compared with the true ones, and
the logits with those without a cache.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn

from ..errors import AttachError, SiteError
from ..sites.probe import Subject, make_subject, quiet, unwrap
from .running_call import MASK, PLACES, CallFacts, cache_in, is_cache, tensors_within
from .token_tracker import TokenTracker

NEW = 3
"""Tokens of the probe that are computed from the cache."""
TOLERANCE, COARSE_TOLERANCE = 1e-2, 5e-2
"""Difference, relative to the largest logit, up to which logits count as equal: in float32, and in 16 bits."""
_NO_CACHES = ("logits", "loss", "hidden_states", "attentions")

_PROVEN: WeakKeyDictionary[nn.Module, CallFacts] = WeakKeyDictionary()


def facts_of(root: nn.Module) -> CallFacts:
    """Return the proven facts about the calls of a model without wrappers; empty before `prove_calls`."""
    return _PROVEN.get(root, CallFacts())


def prove_calls(model: nn.Module) -> None:
    """Prove that a model's calls are read correctly; once per model.

    Args:
        model: the causal LM as the user calls it.

    Raises:
        AttachError: if the positions of tokens after a cache are misread.
    """
    root, _ = unwrap(model)
    if root not in _PROVEN:
        _PROVEN[root] = found = _probe(model)
        if found.differs is not None:
            warnings.warn(
                f"{type(root).__name__} computes other logits with its cache than without one (they differ by "
                f"{found.differs:.1g} of the largest) in transformers {transformers.__version__}, with nothing "
                "attached. Edits reach the intended tokens, but what it generates with a cache is not what it "
                "computes without: compare with use_cache=False.",
                UserWarning,
                stacklevel=4,
            )
    if _PROVEN[root].wrong is not None:
        raise AttachError(
            f"The positions of tokens could not be determined in cached decoding: {type(root).__name__} was given "
            f"some tokens and then {NEW} more with the cache of the first call, and {_PROVEN[root].wrong}. This "
            f"version of hf-gated-sae does not know how transformers {transformers.__version__} passes the cache: "
            "update hf-gated-sae, or install an older transformers."
        )


def _probe(model: nn.Module) -> CallFacts:
    """Run the probe's tokens in two calls and in one, and compare."""
    try:
        subject = make_subject(model, None)
    except SiteError:  # nothing can be run on it; its sites were proven on tokens that the user gave
        return CallFacts()
    if subject.ids.shape[1] <= NEW:
        return CallFacts()
    subject = replace(subject, inputs={**subject.inputs, "input_ids": subject.ids[:1]})  # one row is enough
    with quiet(subject.root):
        try:
            first, second, misread = _two_calls(subject, subject.ids.shape[1] - NEW)
        except AttachError as error:
            return CallFacts(wrong=f"the call could not be read ({error})")
        except Exception:  # a model that cannot be run in this way has no cached decoding to misread
            return CallFacts()
        returned = _caches_returned(subject.root, first)
        caches = tuple(name for name, value in returned.items() if not is_cache(value))
        padding, differs = _compare(subject, first, second)
        wrong = misread if second is None else misread or _not_taken(subject, second, caches)
        return CallFacts(caches, padding, wrong, differs if wrong is None else None)


def _two_calls(subject: Subject, count: int) -> tuple[Any, Any, str | None]:
    """Return the outputs of two calls, the second None if the first returns no cache, and what was misread."""
    root, ids = subject.root, subject.ids
    inputs: dict[str, Any] = {"input_ids": ids[:, :count], "use_cache": True}
    first = subject.call(**inputs)
    caches = _caches_returned(root, first)
    if not caches:
        return first, None, None
    tracker = TokenTracker(
        root, tuple, CallFacts(tuple(name for name, value in caches.items() if not is_cache(value)))
    )
    tracker.keep(tracker.describe(root, (), inputs), first)
    inputs = {"input_ids": ids[:, count:], "use_cache": True, **caches}
    tokens = tracker.describe(root, (), inputs).tokens
    expected = torch.arange(count, ids.shape[1], device=ids.device).expand_as(inputs["input_ids"])
    misread = None
    if tokens.unknown_positions is not None:
        misread = tokens.unknown_positions
    elif not torch.equal(tokens.index, expected) or tokens.phase != "generated":
        misread = (
            f"these were read as positions {tokens.index[0].tolist()} of the phase '{tokens.phase}', but are "
            f"{expected[0].tolist()}"
        )
    return first, subject.call(**inputs), misread


def _caches_returned(root: nn.Module, output: Any) -> dict[str, Any]:
    """Return the caches among a model's outputs: by type, or containers that its forward takes by the same name."""
    if not isinstance(output, Mapping):
        return {}
    taken = inspect.signature(type(root).forward).parameters
    return {
        name: value
        for name, value in output.items()
        if is_cache(value)
        or (
            name in taken
            and name not in _NO_CACHES
            and not isinstance(value, Tensor)
            and next(tensors_within(value), None) is not None
        )
    }


def _not_taken(subject: Subject, output: Any, caches: tuple[str, ...]) -> str | None:
    """Return evidence that the second call did not use the given cache; None if there is none."""
    cache = cache_in(output, caches)
    try:
        length = int(cache.get_seq_length())
    except (ValueError, IndexError, TypeError, AttributeError):
        return None  # caches of recurrent models do not count tokens
    expected = int(subject.ids.shape[1])
    return None if length == expected else f"the cache holds {length} tokens afterwards, not {expected}"


def _compare(subject: Subject, first: Any, second: Any) -> tuple[str | None, float | None]:
    """Return what left padding requires, see `CallFacts.padding`, and how much cached and uncached logits differ.

    Args:
        subject: the model and its tokens.
        first: the output of the first call.
        second: the output of the second call, which continued from the cache; None if there was none.

    Returns:
        What left padding requires; and the largest difference relative to the largest logit, None if they agree, and
        always in 16 bits, where rounding alone may send a token to other experts.
    """
    exact = subject.root.dtype not in (torch.bfloat16, torch.float16)
    most = TOLERANCE if exact else COARSE_TOLERANCE
    parts = [] if second is None else [_logits(first), _logits(second)]
    stepwise = torch.cat([part for part in parts if part is not None], 1) if _all_there(parts) else None
    padded = _padded(subject)
    if stepwise is not None and padded is not None:
        if _apart(padded, stepwise) <= most:
            return None, None
        placed = _padded(subject, places=True)
        if placed is not None and _apart(placed, stepwise) <= most:
            return PLACES, None
    plain = _logits(subject.call(input_ids=subject.ids, use_cache=False))
    if plain is None:
        return None, None
    padding = None
    if padded is not None and _apart(padded, plain) > most:
        few = subject.ids.shape[1] - NEW
        placed = _padded(subject, columns=few, places=True)
        padding = PLACES if placed is not None and _apart(placed, plain[:, :few]) <= most else "right"
    if stepwise is None or not exact or _apart(stepwise, plain) <= TOLERANCE:
        return padding, None
    # Some recurrent models can only continue token by token.
    _, single, _ = _two_calls(subject, subject.ids.shape[1] - 1)
    alone = _logits(single)
    apart = torch.inf if alone is None else _apart(alone, plain[:, -1:])
    return padding, None if apart <= TOLERANCE else float(apart)


def _all_there(parts: list[Tensor | None]) -> bool:
    """Whether there are tensors, and none is missing."""
    return bool(parts) and all(part is not None for part in parts)


def _padded(subject: Subject, *, columns: int | None = None, places: bool = False) -> Tensor | None:
    """Return the logits of tokens with one token of padding before them, without a cache; None if that fails.

    Args:
        subject: the model and its tokens.
        columns: how many of the tokens; all by default.
        places: also pass their position ids.
    """
    ids, root = subject.ids[:, :columns], subject.root
    rows, columns = ids.shape
    most = getattr(root.config, "max_position_embeddings", None)
    if isinstance(most, int) and columns >= most:
        return None
    mask = torch.ones(rows, columns + 1, dtype=ids.dtype, device=ids.device)
    mask[:, 0] = 0
    pad = getattr(root.config, "pad_token_id", None)
    padding = ids[:, :1] if not isinstance(pad, int) or pad < 0 else torch.full_like(ids[:, :1], pad)
    inputs = {"input_ids": torch.cat([padding, ids], 1), MASK: mask, "use_cache": False}
    if places:
        if PLACES not in inspect.signature(type(root).forward).parameters:
            return None
        inputs[PLACES] = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        found = _logits(subject.call(**inputs))
    except Exception:  # a model that takes no mask cannot be given padding
        return None
    return None if found is None else found[:, 1:]


def _logits(output: Any) -> Tensor | None:
    found = output.get("logits") if isinstance(output, Mapping) else None
    return found if isinstance(found, Tensor) else None


def _apart(given: Tensor, expected: Tensor) -> float:
    if given.shape != expected.shape:
        return torch.inf
    return float((given - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
