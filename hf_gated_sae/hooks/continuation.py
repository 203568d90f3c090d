"""Prove, once per model, that where tokens stand can be told when the model continues from a cache.

How a model takes and returns its cache differs between families, and between versions of transformers. A cache that is
not recognised would make every token of a generation look like the first one. So the probe's tokens are run in two
calls, the second of which continues from the cache of the first, and what is read off these calls is compared with
what is known: which tokens they are, and what the model computes for them without a cache.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn

from ..errors import AttachError, SiteError
from ..sites.probe import Subject, make_subject, quiet, unwrap
from .arguments import cache_in, is_cache, tensors_within
from .tokens import TokenTracker

NEW = 3
"""Tokens of the probe that are computed from the cache."""
TOLERANCE = 1e-2
"""Largest difference, relative to the largest logit, between float32 logits with and without a cache."""
_NO_CACHES = ("logits", "loss", "hidden_states", "attentions")


@dataclass(frozen=True)
class Continuation:
    """How a model continues from a cache.

    Attributes:
        caches: names under which it takes and returns a cache that is no transformers `Cache`, such as RWKV's state.
        wrong: what contradicts how its calls are read; None if nothing does, or it has no cache.
        differs: how far its logits with a cache are from those without, relative to the largest; None if they agree.
    """

    caches: tuple[str, ...] = ()
    wrong: str | None = None
    differs: float | None = None


_PROVEN: WeakKeyDictionary[nn.Module, Continuation] = WeakKeyDictionary()


def caches_of(root: nn.Module) -> tuple[str, ...]:
    """Return names under which a model, without wrappers, takes a cache that is no transformers `Cache`."""
    return _PROVEN[root].caches if root in _PROVEN else ()


def prove_continuation(model: nn.Module) -> None:
    """Prove that cached decoding is understood; once per model.

    Args:
        model: the causal LM as the user calls it.

    Raises:
        AttachError: if tokens that continue from a cache are taken for others.
    """
    root, _ = unwrap(model)
    if root not in _PROVEN:
        _PROVEN[root] = found = _continue(model)
        if found.differs is not None:
            warnings.warn(
                f"With its cache, {type(root).__name__} computes other logits than without one (they differ by "
                f"{found.differs:.1g} of the largest) in transformers {transformers.__version__}, with nothing "
                "attached. Edits reach the tokens that are meant, but what it generates with a cache is not what it "
                "computes without: compare with use_cache=False.",
                UserWarning,
                stacklevel=4,
            )
    if _PROVEN[root].wrong is not None:
        raise AttachError(
            f"Where tokens stand could not be told in cached decoding: {type(root).__name__} was given some tokens "
            f"and then {NEW} more with the cache of the first call, and {_PROVEN[root].wrong}. transformers "
            f"{transformers.__version__} does this in a way that this version of hf-gated-sae does not know: update "
            "hf-gated-sae, or install an older transformers."
        )


def _continue(model: nn.Module) -> Continuation:
    """Run the probe's tokens in two calls, and compare."""
    try:
        subject = make_subject(model, None)
    except SiteError:  # nothing can be run on it; its sites were proven on tokens that the user gave
        return Continuation()
    if subject.ids.shape[1] <= NEW:
        return Continuation()
    with quiet(subject.root):
        try:
            first, second, tracked = _two_calls(subject, subject.ids.shape[1] - NEW)
        except AttachError as error:
            return Continuation(wrong=f"the call is not understood: {error}")
        except Exception:  # a model that cannot be run so has no cached decoding that could be misread
            return Continuation()
        if second is None:
            return Continuation()
        caches = tuple(name for name, value in _caches_returned(subject.root, first).items() if not is_cache(value))
        return Continuation(caches, tracked or _not_taken(subject, second, caches), _difference(subject, second))


def _two_calls(subject: Subject, count: int) -> tuple[Any, Any, str | None]:
    """Return the outputs of two calls, the second None if the first gives no cache, and what was misread."""
    root, ids = subject.root, subject.ids
    inputs: dict[str, Any] = {"input_ids": ids[:, :count], "use_cache": True}
    first = subject.call(**inputs)
    caches = _caches_returned(root, first)
    if not caches:
        return first, None, None
    tracker = TokenTracker(root, tuple, [name for name, value in caches.items() if not is_cache(value)])
    tracker.keep(tracker.describe(root, (), inputs), first)
    inputs = {"input_ids": ids[:, count:], "use_cache": True, **caches}
    tokens = tracker.describe(root, (), inputs).tokens
    expected = torch.arange(count, ids.shape[1], device=ids.device).expand_as(inputs["input_ids"])
    misread = None
    if tokens.unplaced is not None:
        misread = tokens.unplaced
    elif not torch.equal(tokens.index, expected) or tokens.phase != "generated":
        misread = (
            f"these were taken for positions {tokens.index[0].tolist()} of the {tokens.phase}, and are "
            f"{expected[0].tolist()}"
        )
    return first, subject.call(**inputs), misread


def _caches_returned(root: nn.Module, output: Any) -> dict[str, Any]:
    """Return the caches among a model's outputs: by their type, or containers that it takes under the same name."""
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
    """Return what shows that the second call did not use the cache that it was given; None if nothing does."""
    cache = cache_in(output, caches)
    try:
        length = int(cache.get_seq_length())
    except (ValueError, IndexError, TypeError, AttributeError):
        return None  # those of recurrent models do not count
    expected = int(subject.ids.shape[1])
    return None if length == expected else f"the cache holds {length} tokens afterwards, not {expected}"


@torch.no_grad()
def _difference(subject: Subject, second: Any) -> float | None:
    """Return how far logits with a cache are from those without, relative to the largest; None if they agree.

    Of 16-bit numbers nothing is said: rounding alone may send a token to other experts. Recurrent models that
    can only continue token by token are tried so.
    """
    whole = _logits(subject.call(input_ids=subject.ids, use_cache=False))
    given = _logits(second)
    if whole is None or given is None or whole.dtype != torch.float32:
        return None
    if subject.root.dtype in (torch.bfloat16, torch.float16):
        return None
    if _apart(given, whole[:, -NEW:]) <= TOLERANCE:
        return None
    last = subject.ids.shape[1] - 1
    _, single, _ = _two_calls(subject, last)
    alone = _logits(single)
    apart = torch.inf if alone is None else _apart(alone, whole[:, -1:])
    return None if apart <= TOLERANCE else float(apart)


def _logits(output: Any) -> Tensor | None:
    found = output.get("logits") if isinstance(output, Mapping) else None
    return found if isinstance(found, Tensor) else None


def _apart(given: Tensor, expected: Tensor) -> float:
    if given.shape != expected.shape:
        return torch.inf
    return float((given - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
