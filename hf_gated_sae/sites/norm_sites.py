"""Prove that the module that reads a site is an RMS norm or a layer norm, to offer its output without the gain.

TransformerLens's ``ln2.hook_normalized`` is the output of a norm before its gain, which no module returns. It is the
site's value after ``rms_norm`` or ``standardize`` with the norm's epsilon. Kind and epsilon are not looked up but
proven: one forward writes tokens of very different size and mean into every candidate, and

    normalised(x) * gain + bias

with one gain and bias per channel must reproduce the candidate's output for all of them.
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
_SPREADS = (-3.0, 1.0)  # the tokens' sizes lie between these powers of ten: only small ones depend on the epsilon
_LARGEST_EPS = 1e-2
_OFF = {torch.float32: 1e-4, torch.float64: 1e-4}  # largest relative error of a reproduction
_OFF_ROUNDED = 1e-2  # the same in 16-bit types


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Input and output of a module that reads one activation, returns one of the same width, and has no matrix."""

    input: Seen
    output: Seen


class Norms:
    """The norms of one model, proven by one forward at the first request.

    Args:
        subject: the model and the probe's inputs; weak references to the model and a few tokens are stored.
        seen: the recorded forward.
    """

    def __init__(self, subject: Subject, seen: Trace) -> None:
        self._root, self._call = weakref.ref(subject.root), weakref.ref(subject.call)
        self._inputs = _few_tokens(subject)
        self._candidates = _candidates(subject.root, seen)
        self._values: dict[tuple[str, str, tuple[Key, ...]], str] = {
            (item.tensor_path.path, item.tensor_path.port, item.tensor_path.keys): item.value
            for items in seen.seen.values()
            for item in items
            if item.value in self._candidates
        }
        self._found: dict[str, Transform | str] | None = None
        self._lock = threading.Lock()

    def reading(self, name: object, tensor_path: TensorPath) -> Transform:
        """Return the transform that the norm that reads a tensor applies before its gain.

        Args:
            name: the site, for messages.
            tensor_path: the tensor.

        Raises:
            SiteError: if no module that reads it is proven to be a norm, or several differ.
        """
        value = self._values.get((tensor_path.path, tensor_path.port, tensor_path.keys))
        readers = self._candidates.get(value, []) if value is not None and tensor_path.scale == 1.0 else []
        why = "no module that could be one reads exactly that tensor"
        if readers:
            found = self._prove()
            proven = {found[reader.input.tensor_path.path] for reader in readers}
            transforms = [item for item in proven if isinstance(item, Transform)]
            if len(transforms) == 1:
                return transforms[0]
            shown = (f"{reader.input.tensor_path.path}: {found[reader.input.tensor_path.path]}" for reader in readers)
            problem = "several norms read it and differ" if transforms else "no module that reads it is a norm"
            why = f"{problem} ({'; '.join(shown)})"
        raise SiteError(
            f"'{name}|{NORM_NO_GAIN}' could not be proven, because {why}. "
            "'|rms_norm=EPS', '|standardize=EPS' and '|layer_norm' need no proof."
        )

    def _prove(self) -> dict[str, Transform | str]:
        """Write tokens of very different sizes into every candidate, and fit a norm to each one's outputs."""
        with self._lock:
            if self._found is None:
                root, call = self._root(), self._call()
                if root is None:
                    raise SiteError("The model of these sites no longer exists; call resolve(model) for a new one.")
                with quiet(root):
                    self._found = _prove(Subject(root, root if call is None else call, self._inputs), self._candidates)
            return self._found


def _few_tokens(subject: Subject) -> dict[str, Any]:
    """Return the probe's inputs cut to a few tokens, or whole if one of them is not a value or vector per token."""
    shape = subject.tokens()
    tensors = {name: value for name, value in subject.inputs.items() if isinstance(value, Tensor)}
    if any(tuple(value.shape[:2]) != shape or value.ndim > 3 for value in tensors.values()):
        return dict(subject.inputs)
    return subject.inputs | {name: value[:BATCH, :SEQUENCE].clone() for name, value in tensors.items()}


def _candidates(root: nn.Module, seen: Trace) -> dict[str, list[_Candidate]]:
    """Return the modules that may be norms, by the digest of their input."""
    found: dict[str, list[_Candidate]] = {}
    for path, count in seen.calls.items():
        inputs, outputs = seen.one(path, "input"), seen.one(path, "output")
        if count != 1 or len(inputs) != 1 or len(outputs) != 1:
            continue
        [read], [returned] = inputs, outputs
        same_width = read.is_tokens and returned.is_tokens and read.tensor_path.width == returned.tensor_path.width > 1
        if same_width and all(p.ndim < 2 for p in root.get_submodule(path).parameters()):
            found.setdefault(read.value, []).append(_Candidate(read, returned))
    return found


def _prove(subject: Subject, candidates: Mapping[str, list[_Candidate]]) -> dict[str, Transform | str]:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    edits: dict[Slot, Edit] = {}

    def write(path: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            inputs[path] = _tokens(value)
            return inputs[path].to(value, copy=True)  # some models add to their input in place

        return edit

    def record(path: str) -> Edit:
        def edit(value: Tensor) -> None:
            outputs[path] = value.detach().to("cpu", copy=True)

        return edit

    for readers in candidates.values():
        for reader in readers:
            path = reader.input.tensor_path.path
            edits[slot_at(reader.input, subject)] = write(path)
            edits[slot_at(reader.output, subject)] = record(path)
    forward_blocks(subject, edits)
    return {
        reader.input.tensor_path.path: _fit(subject.root.get_submodule(path), inputs[path], outputs[path])
        if (path := reader.input.tensor_path.path) in inputs and path in outputs
        else "it did not run in a second forward"
        for readers in candidates.values()
        for reader in readers
    }


def _tokens(like: Tensor) -> Tensor:
    """Return tokens ``[B, S, width]`` whose sizes span four powers of ten, each with its own mean."""
    batch, sequence, width = like.shape
    drawn = torch.Generator().manual_seed(0)
    spread = torch.logspace(*_SPREADS, batch * sequence).view(batch, sequence, 1)
    mean = torch.randn((batch, sequence, 1), generator=drawn)
    return ((torch.randn((batch, sequence, width), generator=drawn) + mean) * spread).to(like.dtype)


def _fit(module: nn.Module, x: Tensor, output: Tensor) -> Transform | str:
    """Return the transform that reproduces a module's output up to a gain and a bias per channel, or why none does."""
    candidates = {
        value
        for inner in module.modules()
        for value in vars(inner).values()
        if isinstance(value, float) and 0 < value <= _LARGEST_EPS
    }
    errors = {
        Transform(kind, eps): _error(NORMALIZATIONS[kind](x.double(), eps).apply(x.double()), output.double())
        for kind in KINDS
        for eps in sorted({*candidates, torch.finfo(x.dtype).eps})
    }
    best = min(errors, key=lambda transform: errors[transform])
    if errors[best] <= _OFF.get(x.dtype, _OFF_ROUNDED):
        return best
    return f"not an RMS norm or layer norm with a gain (relative error {errors[best]:.0e})"


def _error(normalised: Tensor, output: Tensor) -> float:
    """Return the relative error of ``output = normalised * gain + bias``, with the best gain and bias per channel."""
    n, y = normalised.flatten(0, -2), output.flatten(0, -2)
    centred = n - n.mean(0)
    gain = (centred * y).sum(0) / centred.square().sum(0)
    off = y - y.mean(0) - centred * gain
    return float(off.norm() / y.norm().clamp_min(torch.finfo(y.dtype).tiny))
