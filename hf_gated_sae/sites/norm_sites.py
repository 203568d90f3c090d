"""The norm that reads a site, proven to be an RMS norm or a layer norm, so that it can be had without its gain.

TransformerLens's ``ln2.hook_normalized`` is the output of a norm before its gain, which no module emits. It is the
site's own value after ``rms_norm`` or ``standardize`` with the right epsilon. Which of the two it is, and the epsilon,
is not looked up: one forward writes tokens of very different size and mean into every candidate, and

    normalised(x) * gain + bias

with one gain and bias per channel must reproduce what it gives for all of them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SiteError
from ..functional.normalization import NORMALIZATIONS
from .probe import BATCH, SEQUENCE, Seen, Subject, Trace, quiet
from .roles import forward_blocks, slot_at
from .slots import Edit, Key, Slot, TensorPath
from .transforms import NORM_NO_GAIN, Transform

KINDS = ("rms_norm", "standardize")
_SPREADS = (-3.0, 1.0)  # powers of ten between which the tokens' sizes lie: the epsilon shows in the small ones
_LARGEST_EPS = 1e-2
_OFF = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative error of a reproduction; 16-bit types round by more
_OFF_ROUNDED = 1e-2


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A module that reads one activation alone and has no matrix: what it takes, and what it gives."""

    taken: Seen
    given: Seen


class Norms:
    """The norms of one model, proven by one forward when first asked for.

    Args:
        subject: the model and the probe's inputs; only weak references to the model are kept, and a few tokens.
        seen: the recorded forward.
    """

    def __init__(self, subject: Subject, seen: Trace) -> None:
        self._root, self._call = weakref.ref(subject.root), weakref.ref(subject.call)
        self._inputs = _few_tokens(subject)
        self._candidates = _candidates(subject.root, seen)
        self._values: dict[tuple[str, str, tuple[Key, ...]], str] = {
            (item.place.path, item.place.port, item.place.keys): item.value
            for items in seen.seen.values()
            for item in items
            if item.value in self._candidates
        }
        self._found: dict[str, Transform | str] | None = None
        self._lock = threading.Lock()

    def reading(self, name: object, place: TensorPath) -> Transform:
        """Return the plain transform that the norm that reads a place applies before its gain.

        Args:
            name: the site, for messages.
            place: its place.

        Raises:
            SiteError: if no module that reads it is proven to be a norm, or several differ.
        """
        value = self._values.get((place.path, place.port, place.keys))
        readers = self._candidates.get(value, []) if value is not None and place.scale == 1.0 else []
        why = "no module that could be one reads exactly that tensor"
        if readers:
            found = self._prove()
            proven = {found[reader.taken.place.path] for reader in readers}
            transforms = [item for item in proven if isinstance(item, Transform)]
            if len(transforms) == 1:
                return transforms[0]
            shown = (f"{reader.taken.place.path}: {found[reader.taken.place.path]}" for reader in readers)
            why = f"of the modules that read it {'several differ' if transforms else 'none is'} ({'; '.join(shown)})"
        raise SiteError(
            f"'{name}|{NORM_NO_GAIN}' is not offered, because no norm without its gain could be proven there: {why}. "
            "A plain '|rms_norm=EPS', '|standardize=EPS' or '|layer_norm' needs no proof."
        )

    def _prove(self) -> dict[str, Transform | str]:
        """Write tokens of very different sizes into every candidate, and compare what each makes of them."""
        with self._lock:
            if self._found is None:
                root, call = self._root(), self._call()
                if root is None:
                    raise SiteError("The model whose sites these are no longer exists.")
                with quiet(root):
                    self._found = _prove(Subject(root, root if call is None else call, self._inputs), self._candidates)
            return self._found


def _few_tokens(subject: Subject) -> dict[str, Any]:
    """Return the probe's inputs cut to a few tokens, or whole if any is not one value or vector per token."""
    shape = subject.tokens()
    tensors = {name: value for name, value in subject.inputs.items() if isinstance(value, Tensor)}
    if any(tuple(value.shape[:2]) != shape or value.ndim > 3 for value in tensors.values()):
        return dict(subject.inputs)
    return subject.inputs | {name: value[:BATCH, :SEQUENCE].clone() for name, value in tensors.items()}


def _candidates(root: nn.Module, seen: Trace) -> dict[str, list[_Candidate]]:
    """Return, for each value that one is given, the modules that may be norms."""
    found: dict[str, list[_Candidate]] = {}
    for path, count in seen.calls.items():
        taken, given = seen.one(path, "input"), seen.one(path, "output")
        if count != 1 or len(taken) != 1 or len(given) != 1:
            continue
        [into], [out] = taken, given
        alike = into.is_tokens and out.is_tokens and into.place.width == out.place.width > 1
        if alike and all(p.ndim < 2 for p in root.get_submodule(path).parameters()):
            found.setdefault(into.value, []).append(_Candidate(into, out))
    return found


def _prove(subject: Subject, candidates: Mapping[str, list[_Candidate]]) -> dict[str, Transform | str]:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    edits: dict[Slot, Edit] = {}

    def write(path: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            inputs[path] = _tokens(value)
            return inputs[path].to(value, copy=True)  # some models add into what they are given

        return edit

    def note(path: str) -> Edit:
        def edit(value: Tensor) -> None:
            outputs[path] = value.detach().to("cpu", copy=True)

        return edit

    for readers in candidates.values():
        for reader in readers:
            path = reader.taken.place.path
            edits[slot_at(reader.taken, subject)] = write(path)
            edits[slot_at(reader.given, subject)] = note(path)
    forward_blocks(subject, edits)
    return {
        reader.taken.place.path: _fit(subject.root.get_submodule(path), inputs[path], outputs[path])
        if (path := reader.taken.place.path) in inputs and path in outputs
        else "it did not run again"
        for readers in candidates.values()
        for reader in readers
    }


def _tokens(like: Tensor) -> Tensor:
    """Return tokens ``[B, S, width]`` whose sizes span four powers of ten, each with a mean of its own."""
    batch, sequence, width = like.shape
    drawn = torch.Generator().manual_seed(0)
    spread = torch.logspace(*_SPREADS, batch * sequence).view(batch, sequence, 1)
    mean = torch.randn((batch, sequence, 1), generator=drawn)
    return ((torch.randn((batch, sequence, width), generator=drawn) + mean) * spread).to(like.dtype)


def _fit(module: nn.Module, x: Tensor, given: Tensor) -> Transform | str:
    """Return the transform that reproduces a module's output up to a gain and a bias per channel, or why none does."""
    tried = {
        value
        for inner in module.modules()
        for value in vars(inner).values()
        if isinstance(value, float) and 0 < value <= _LARGEST_EPS
    }
    errors = {
        Transform(kind, eps): _error(NORMALIZATIONS[kind](x.double(), eps).apply(x.double()), given.double())
        for kind in KINDS
        for eps in sorted({*tried, torch.finfo(x.dtype).eps})
    }
    best = min(errors, key=lambda transform: errors[transform])
    if errors[best] <= _OFF.get(x.dtype, _OFF_ROUNDED):
        return best
    return f"not an RMS norm or layer norm with a gain (off by {errors[best]:.0e})"


def _error(normalised: Tensor, given: Tensor) -> float:
    """Return the relative error of ``given = normalised * gain + bias``, with the best gain and bias per channel."""
    n, y = normalised.flatten(0, -2), given.flatten(0, -2)
    centred = n - n.mean(0)
    gain = (centred * y).sum(0) / centred.square().sum(0)
    off = y - y.mean(0) - centred * gain
    return float(off.norm() / y.norm().clamp_min(torch.finfo(y.dtype).tiny))
