"""Computing in the widest dtype involved, so that neither activations nor weights are rounded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.sparse_latents import SparseLatents

EQUATIONS = frozenset(
    {"encode", "decode", "forward", "encode_sparse", "reconstruct", "encode_source", "decode_at"}
    | {"training_loss", "constant", "margins", "codes"}
)
"""Methods that compute with activations, in this package and in architectures of other packages."""


def compute_in_widest_dtype(cls: type) -> None:
    """Let the equations that a class itself defines compute in the widest dtype of the SAE and of their arguments.

    Float32 activations given to a bfloat16 SAE are computed with float32 copies of its weights, which are exact, and
    gradients reach the weights through them. The copies are made for each call: load the SAE in the wider dtype to
    avoid them. Where autocast is on, it decides instead.

    Args:
        cls: `SAEModel` or an architecture; the methods in `EQUATIONS` that its own body defines are wrapped.
    """
    for name in EQUATIONS & set(vars(cls)):
        setattr(cls, name, _in_widest(vars(cls)[name]))


def _in_widest(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method so that it computes in the widest dtype."""

    @functools.wraps(method)
    def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.b_dec.dtype
        if all(dtype == own for dtype in _dtypes((*args, *kwargs.values()))):
            return method(self, *args, **kwargs)
        if torch.is_autocast_enabled(self.b_dec.device.type):
            return method(self, *args, **kwargs)
        wide = functools.reduce(torch.promote_types, _dtypes((*args, *kwargs.values())), own)
        given = [_converted(value, wide) for value in args]
        named = {name: _converted(value, wide) for name, value in kwargs.items()}
        if wide == own:
            return method(self, *given, **named)
        twin = _twin(self, wide)
        result = method(twin, *given, **named)
        _take_over(self, twin)
        return result

    return computed


def _dtypes(values: Iterable[Any]) -> Iterator[torch.dtype]:
    """Yield the dtypes of all activations and latents; indices of latents are skipped."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield value.dtype
        elif isinstance(value, SparseLatents):
            yield value.values.dtype
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            yield from _dtypes(value)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Return activations or latents in a dtype, and everything else unchanged."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [_converted(each, dtype) for each in value]
    floating = isinstance(value, SparseLatents) or (isinstance(value, Tensor) and value.is_floating_point())
    return value.to(dtype) if floating else value


def _twin(module: Any, dtype: torch.dtype) -> Any:
    """Return a module that shares everything with another one but its parameters and buffers, which are cast.

    Gradients reach the originals. Tensors in a wider dtype keep it.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        held: dict[str, Tensor | None] = module.__dict__[kind]
        twin.__dict__[kind] = {
            name: each.to(torch.promote_types(each.dtype, dtype))
            if each is not None and each.is_floating_point()
            else each
            for name, each in held.items()
        }
    inner: dict[str, nn.Module | None] = module._modules
    twin.__dict__["_modules"] = {name: None if each is None else _twin(each, dtype) for name, each in inner.items()}
    return twin


@torch.no_grad()
def _take_over(module: nn.Module, twin: nn.Module) -> None:
    """Copy back what was written into the buffers of a twin, such as a running threshold."""
    for name, written in twin._buffers.items():
        own = module._buffers[name]
        if own is None or written is None or written is own or written.is_inference():
            continue
        if written._version:  # 0 for a tensor that was only cast
            own.copy_(written)
