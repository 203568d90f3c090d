"""Observe activations at the sites of a model, and select the tokens that count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError, ShapeError
from ..functional.outliers import is_outlier
from ..sites import Slot
from ..sites.probe import Subject
from ..sites.slots import TensorPath
from .dispatch import enter, leave
from .peft_virtual_tokens import virtual_tokens
from .session import Session
from .token_batches import counted_positions


class _Reached(Exception):
    """Ends the forward once all sites were seen."""


class Observation(Session):
    """A session that keeps activations and changes no value.

    Args:
        places: the tensors to keep.
        grad: those of them with which the model continues, so that gradients with respect to them exist; a tensor that
            does not require gradients is kept as a leaf that does.
        stop: end the forward once all sites were seen.
    """

    def __init__(self, places: Iterable[TensorPath], *, grad: Collection[TensorPath] = (), stop: bool = False) -> None:
        super().__init__()
        self.tensor_paths = set(places)
        self.grad = grad
        self.stop = stop
        self.seen: dict[TensorPath, Tensor] = {}

    observes = True

    def observe(self, place: TensorPath, value: Tensor) -> Tensor | None:
        """Keep the activation."""
        if (
            place not in self.tensor_paths or place in self.seen
        ):  # seen before if gradient checkpointing runs the layer again
            return None
        if place in self.grad:
            self.seen[place] = self.kept(value)
            return self.going_on(place, self.seen[place])
        # A copy, since the model may write into the tensor; and an ordinary tensor, even in inference mode.
        with torch.inference_mode(False):
            self.seen[place] = value.detach().clone()
        if self.stop and len(self.seen) == len(self.tensor_paths):
            raise _Reached
        return None

    def kept(self, value: Tensor) -> Tensor:
        """Return the tensor to keep of an activation, as a part of the graph."""
        return value.clone() if value.requires_grad else value.detach().clone().requires_grad_()

    def going_on(self, place: TensorPath, kept: Tensor) -> Tensor:
        """Return what the model continues with: a copy of the same value, since the model may write into it."""
        return kept.clone()

    def run(self, model: nn.Module, slots: Mapping[str, Slot], inputs: Mapping[str, Any]) -> Any:
        """Call the model, and return its output; None if it was stopped.

        Raises:
            AttachError: if the forward did not reach a site.
        """
        held = list({slot.tensor_path.bare: slot.bare for slot in slots.values()}.values())
        output = None
        try:
            enter(model, self, held)
            output = model(**{"use_cache": False, **inputs})
        except _Reached:
            pass
        finally:
            if self.active:
                leave(model, self, held)
        missed = sorted(site for site, slot in slots.items() if slot.tensor_path.bare not in self.seen)
        if missed:
            raise AttachError(f"The forward ended without reaching {', '.join(missed)}; nothing was captured there.")
        return output

    def probe(self, subject: Subject, slots: Mapping[str, Slot]) -> None:
        """Call a model that is probed and keep what this thread sees; attached interventions must be paused."""
        mine = threading.get_ident()

        def observer(place: TensorPath) -> Callable[[Tensor], None]:
            def observe(x: Tensor) -> None:
                if threading.get_ident() == mine:
                    self.observe(place, x)

            return observe

        held = {slot.tensor_path.bare: slot.bare for slot in slots.values()}
        handles: list[Any] = []
        try:
            for place, slot in held.items():
                handles.append(slot.register(observer(place), subject.tokens))
            with suppress(_Reached):
                subject.call(**subject.inputs)
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class CountedTokens:
    """Which tokens of a batch count, and where they are in an activation.

    Attributes:
        mask: True at tokens that count, ``[B, S]``.
        virtual: number of columns that a wrapper of the model puts before them, as PEFT's prompt tuning does.
    """

    mask: Tensor
    virtual: int = 0

    @classmethod
    def of(
        cls,
        model: Any,
        inputs: Mapping[str, Any],
        *,
        special_tokens: bool = False,
        special_ids: Sequence[int] | None = None,
    ) -> CountedTokens:
        """Return which tokens of a call count.

        Args:
            model: the causal LM, as it is called.
            inputs: keyword arguments of its forward.
            special_tokens: count special tokens too; padding never counts.
            special_ids: which tokens are special; those of the model by default. ``special_token_ids(model, sae)`` are
                those of an SAE in it.
        """
        mask = counted_positions(model, inputs, special_tokens=special_tokens, special_ids=special_ids)
        return cls(mask, virtual_tokens(model))

    def within(self, limit: float | None, x: Tensor, site: str) -> CountedTokens:
        """Return the counted tokens whose activation has at most a given norm; see `functional.outliers`.

        Args:
            limit: the largest norm; None for no limit.
            x: the activation ``[B, S, d]``, or ``[B, virtual + S, d]``.
            site: its site.

        Raises:
            ShapeError: if it does not have one vector for each token.
        """
        return replace(self, mask=self.mask & ~is_outlier(self.columns(x, site), limit).to(self.mask.device))

    def columns(self, x: Tensor, site: str) -> Tensor:
        """Return the part ``[B, S, d]`` of an activation that belongs to the batch's tokens, counted or not.

        Args:
            x: the activation ``[B, S, d]``, or ``[B, virtual + S, d]``.
            site: its site.

        Raises:
            ShapeError: if it does not have one vector for each token.
        """
        rows, columns = self.mask.shape
        # The virtual tokens of prefix tuning are only in the cache.
        if x.ndim < 3 or x.shape[0] != rows or x.shape[1] not in (columns, self.virtual + columns):
            before = f", perhaps after {self.virtual} virtual tokens" if self.virtual else ""
            raise ShapeError(
                f"The activation at {site} is {list(x.shape)}, and the batch has {rows} rows of {columns} tokens; "
                f"expected a vector for each token, [{rows}, {columns}, d]{before}."
            )
        return x[:, x.shape[1] - columns :]

    def chosen(self, x: Tensor, site: str) -> Tensor:
        """Return the activations of the tokens that count, ``[n, d]``.

        Args:
            x: the activation ``[B, S, d]``, or ``[B, virtual + S, d]``.
            site: its site.

        Raises:
            ShapeError: if it does not have one vector for each token.
        """
        return self.columns(x, site)[self.mask.to(x.device)]


def real_tokens(x: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens of an activation ``[B, S, ...]`` are not padding, ``[B, S]``; None if there is no padding.

    Args:
        x: the activation.
        inputs: keyword arguments of the forward.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    missing = x.shape[1] - mask.shape[1]  # virtual tokens, or, if negative, those of the cache
    real = nn.functional.pad(mask != 0, (missing, 0), value=True).to(x.device)
    return None if bool(real.all()) else real
