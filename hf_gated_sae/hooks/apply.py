"""Apply what is attached at one site; the back-ends differ only in how they get to the activation.

All interventions read the clean activation; what they add is summed, so that their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import AttachError, ShapeError
from ..interventions import ModelCall, SiteCall
from ..modeling import SAEModel
from ..sites.transforms import view
from .attach_report import Record

_RANGE = torch.finfo(torch.bfloat16).max  # the range of all dtypes of 16 bits or more, except float16

Placed = Callable[[SAEModel, torch.device], SAEModel]
"""Returns an SAE on a device."""


def apply_interventions(
    x: Tensor, call: ModelCall, records: Iterable[Record], placed: Placed, *, replaying: bool
) -> Tensor | None:
    """Apply interventions at one site of a running call.

    Args:
        x: the clean activation ``[B, S, d]``.
        call: the running forward.
        records: the interventions at this site.
        placed: returns an SAE on a device.
        replaying: whether the layer runs again for gradient checkpointing; then nothing is recorded.

    Returns:
        The new activation, or None if it stays the same.

    Raises:
        AttachError: if the positions of the call's tokens are unknown.
    """
    if call.tokens.unknown_positions is not None:
        raise AttachError(f"This call cannot be edited: {call.tokens.unknown_positions}.")
    base, deltas = x, []
    acted: list[Record] = []
    with exact_dtype(x.device):
        for record in records:
            seen = view(x, record.transforms) if record.transforms else None
            site_call = SiteCall(
                x if seen is None else seen.value, call.tokens, placed, call=call, output=record.output
            )
            mask, value = record.intervention.act(site_call)
            if not replaying:
                record.add(call.tokens, mask)
            if mask is False:
                continue
            acted.append(record)
            if value is None:
                continue
            record.watch(value, mask)
            if record.replaces:
                base = _where(mask, value if seen is None else seen.written(value), base)
            else:
                deltas.append((mask, value if seen is None else value * seen.factor))
        result = add(base, deltas, x)
        if result is not None and torch.finfo(x.dtype).max < _RANGE:
            beyond = _is_finite(x) & ~_is_finite(result)  # only if the model's own activation was finite
            for record in acted:
                record.watch_range(beyond, x.dtype)
        return result


def exact_dtype(device: torch.device) -> Any:
    """Return a context in which an SAE computes in its own dtype; autocast would use bfloat16 for a float32 SAE."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _is_finite(x: Tensor) -> Tensor:
    """Return whether all 16-bit numbers are finite, as one bool on their device; their float32 sum cannot overflow."""
    return x.detach().sum(dtype=torch.float32).isfinite()


def _where(mask: Tensor | bool, new: Tensor, old: Tensor) -> Tensor:
    """Return `new`, broadcast to the shape of `old`, at masked tokens, and `old` elsewhere."""
    new = new.to(old.dtype).expand_as(old)
    return new if mask is True else torch.where(torch.as_tensor(mask).to(old.device).unsqueeze(-1), new, old)


def add(base: Tensor, deltas: Sequence[tuple[Tensor | bool, Tensor]], x: Tensor) -> Tensor | None:
    """Add the masked deltas in the widest dtype involved and round once; return None if nothing changes."""
    if not deltas:
        return None if base is x else base
    total: Tensor | None = None
    for mask, delta in deltas:
        if delta.ndim and delta.shape[-1] != x.shape[-1]:
            raise ShapeError(
                f"An intervention adds a tensor {list(delta.shape)} to an activation {list(x.shape)}; expected the "
                "same width."
            )
        if mask is not True:
            nothing = delta.new_full((), -0.0)  # adding it keeps the sign of zeros
            delta = torch.where(torch.as_tensor(mask).to(delta.device).unsqueeze(-1), delta, nothing)
        total = delta if total is None else total + delta
    assert total is not None
    wide = torch.promote_types(base.dtype, total.dtype)
    return (base.to(wide) + total.to(wide)).to(x.dtype)
