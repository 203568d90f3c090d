"""What attached interventions did."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import AttachError
from ..functional.short_repr import few_lines, short_repr
from ..functional.tensor_checks import untransformed
from ..interventions import Conditional, Intervention, TokenContext
from ..interventions.positions import unreached
from ..modeling import SAEModel
from ..sites import Site
from ..sites.transforms import Transform
from ..upstream.torch_private import is_functorch_wrapped

# What is remembered token by token; beyond it the oldest calls are counted, not listed, so that memory stays bounded.
CALLS_REMEMBERED = 4096
TOKENS_REMEMBERED = 1 << 20
ROWS_SHOWN = 8


@dataclass(frozen=True)
class InterventionReport:
    """What one intervention did.

    Attributes:
        verb: the intervention's class name.
        site: where.
        calls: how many times the site was reached.
        edited: number of tokens that were edited; without a KV cache a token counts each time it is computed.
        positions: per row of the calls, the edited positions in increasing order, -1 for padding; of the last
            4,096 calls or 2^20 tokens. With beams or several return sequences, each of them is a row.
    """

    verb: str
    site: str
    calls: int
    edited: int
    positions: Mapping[int, list[int]]

    __repr__ = short_repr


@dataclass(frozen=True)
class AttachReport:
    """What everything attached did, intervention by intervention."""

    interventions: list[InterventionReport]

    def __repr__(self) -> str:
        """Return one line per intervention, of at most 10; rows and positions are in `interventions`."""
        return few_lines(map(_line, self.interventions)) or "AttachReport: no interventions"


def _line(entry: InterventionReport) -> str:
    rows = [str(row) for row in sorted(entry.positions)]
    shown = rows if len(rows) <= ROWS_SHOWN else [*rows[:ROWS_SHOWN], f"... {len(rows)} in all"]
    return (
        f"{entry.verb} at {entry.site}: {entry.edited} tokens edited in {entry.calls} calls, rows [{', '.join(shown)}]"
    )


@dataclass
class Record:
    """Collects what one intervention does; nothing is read from the device before the report is asked for."""

    intervention: Intervention
    output: int = 0
    """Which of the intervention's sites this is about."""
    transforms: tuple[Transform, ...] = ()
    """What is done to the activation there before the intervention sees it."""
    calls: int = 0
    forgotten: Tensor | int = 0
    masks: deque[tuple[Tensor, Tensor | bool]] = field(default_factory=deque)
    remembered: int = 0
    before: int | None = None
    """How many columns the model had been through, in the cache, when it first saw any."""
    tokens: int = 0
    """How many tokens it saw, edited or not."""
    columns: int = 0
    """How many columns the model has been through."""
    lengths: Tensor | None = None
    """How many tokens the longest row and the longest prompt had, ``[2]``; only where positions are numbers."""
    taint: Tensor | None = None
    """Zero, or NaN once something was put in that is not finite; not on a CPU, where that is told at once."""
    beyond: Tensor | None = None
    """Whether something was put in that is beyond the model's range; not on a CPU, either."""
    dtype: torch.dtype = torch.float32
    """The model's type of numbers there, where its range was watched."""
    replaces: bool = field(init=False)
    """Whether the intervention puts something in the activation's place."""
    sae: SAEModel | None = field(init=False)
    """The SAE that the intervention reads, None if it reads none."""

    def __post_init__(self) -> None:
        """Look up what does not change."""
        self.sae, self.replaces = self.intervention.sae_used, self.intervention.replaces

    @property
    def site(self) -> Site:
        """The site that this is about."""
        return self.intervention.sites[self.output]

    def add(self, tokens: TokenContext, mask: Tensor | bool) -> None:
        """Remember one call."""
        self.calls += 1
        first = max(tokens.end - tokens.virtual - tokens.index.shape[1], 0)
        self.before = first if self.before is None else min(self.before, first)
        self.tokens += tokens.index.numel()
        self.columns = max(self.columns, tokens.end - tokens.virtual)
        if isinstance(self.intervention.positions, (int, tuple, slice)):
            now = torch.stack([tokens.index.max() + 1, tokens.prompt_length.max()])
            self.lengths = now if self.lengths is None else torch.maximum(self.lengths, now)
        if mask is not False:
            self.masks.append((tokens.index, mask))
            self.remembered += tokens.index.numel()
        while len(self.masks) > CALLS_REMEMBERED or (self.remembered > TOKENS_REMEMBERED and len(self.masks) > 1):
            index, old = self.masks.popleft()
            self.remembered -= index.numel()
            self.forgotten = self.forgotten + (old.sum() if isinstance(old, Tensor) else index.numel())

    def watch(self, value: Tensor, mask: Tensor | bool) -> None:
        """Record what is put in at meant tokens: a sum, which NaN and infinite numbers spoil.

        Args:
            value: what is added or put in place, ``[B, S, d]`` or broadcastable to it.
            mask: at which tokens.

        Raises:
            AttachError: if it is not finite; on another device than the CPU only `require_sound` says so, since asking
                would hold up the model.
        """
        value = value.detach()
        wide = torch.promote_types(value.dtype, torch.float32)
        if isinstance(mask, Tensor):
            rows = value.sum(-1, dtype=wide)
            total = torch.where(mask.to(rows.device), rows, 0.0).sum()
        else:
            total = value.sum(dtype=wide)
        if is_functorch_wrapped(total):
            total = untransformed(total).sum()  # of all that vmap computes together
        if total.device.type == "cpu":
            self._require_finite(total)
        else:
            self.taint = total * 0.0 if self.taint is None else self.taint + total * 0.0

    def _require_finite(self, total: Tensor) -> None:
        """Raise if something was put in that is not finite."""
        if not math.isfinite(total):
            self.taint = None  # said once
            raise AttachError(
                f"{type(self.intervention).__name__} put NaN or infinite numbers in at {self.site}: the activations "
                "there, or the SAE's latents of them, are not finite."
            )

    def watch_range(self, beyond: Tensor, dtype: torch.dtype) -> None:
        """Record whether what the model continues with has become infinite in its type of numbers.

        Args:
            beyond: a single bool.
            dtype: that type.

        Raises:
            AttachError: if it has; as with `watch`, only `require_sound` says so on another device than the CPU.
        """
        self.dtype = dtype
        if is_functorch_wrapped(beyond):
            beyond = untransformed(beyond).any()
        if beyond.device.type == "cpu":
            self._require_within(beyond)
        else:
            self.beyond = beyond if self.beyond is None else self.beyond | beyond

    def _require_within(self, beyond: Tensor) -> None:
        """Raise if what was put in was beyond the model's range."""
        if beyond:
            self.beyond = None  # said once
            name = str(self.dtype).removeprefix("torch.")
            raise AttachError(
                f"What {type(self.intervention).__name__} put in at {self.site} is beyond the model's {name}, "
                f"which ends at {torch.finfo(self.dtype).max:g}, and became infinite: edit less strongly, or load the "
                "model in bfloat16 or float32."
            )

    def _require_finite_and_within(self) -> None:
        """Raise if something was put in that is not finite, or not in the model's type of numbers."""
        if self.taint is not None:
            self._require_finite(self.taint)
        if self.beyond is not None:
            self._require_within(self.beyond)

    def require_sound(self) -> None:
        """Raise unless everything put in was finite, and there was a token at every position that was named.

        Raises:
            AttachError: saying what was not.
        """
        self._require_finite_and_within()
        if self.calls and self.intervention.columns > self.columns:
            raise AttachError(
                f"{type(self.intervention).__name__} at {self.site} was given {self.intervention.columns} columns, "
                f"and the model went through {self.columns}: expected no more than the batch has."
            )
        if self.lengths is not None:
            tokens, prompt = map(int, self.lengths)
            if missed := unreached(self.intervention.positions, tokens, prompt):
                raise AttachError(
                    f"positions {missed} of {type(self.intervention).__name__} at {self.site} were never reached: the "
                    f"longest row had {tokens} tokens, the longest prompt {prompt}."
                )

        if self._names_tokens() and self.calls and not self._edited():
            named = f"{type(self.intervention).__name__} at {self.site} edited nothing: positions="
            if self.before:
                raise AttachError(
                    f"{named}{self.intervention.positions!r} are among the {self.before} tokens that were in the "
                    "cache already, computed before it was attached, or special tokens or padding, which are left "
                    "alone: begin with an empty cache, or pass special_tokens=True."
                )
            raise AttachError(
                f"{named}{self.intervention.positions!r} are special tokens or padding, which are left alone. Pass "
                "special_tokens=True to act on them, too."
            )

    def require_reach(self) -> None:
        """Raise, or warn, if whole generations were not edited as `positions` say; on a GPU this waits for it.

        Raises:
            AttachError: if all tokens were edited, the prompt's and those generated, where only some are meant.
        """
        meant = self.intervention
        if not self.calls or not meant.acts_at(self.output) or (isinstance(meant, Conditional) and meant.when):
            return
        edited, what = self._edited(), f"{type(meant).__name__} at {self.site} with positions={meant.positions!r}"
        if edited == self.tokens and isinstance(meant.positions, str) and meant.positions != "all":
            raise AttachError(
                f"{what} edited all {edited} tokens of a generation, the prompt's and those generated, so that where "
                "they stand was misread. Call generate() of the model that was given to attach(); if you did, please "
                "report this with the versions of transformers and hf-gated-sae."
            )
        if not edited and self.tokens:
            warnings.warn(
                f"{what} edited none of the {self.tokens} tokens that passed in a whole generation: no such token was "
                "among them, or those were special tokens or padding, which are left alone without "
                "special_tokens=True. See the attachment's report().",
                UserWarning,
                stacklevel=4,
            )

    def _names_tokens(self) -> bool:
        """Whether tokens were named one by one, and only being special could keep them from being edited."""
        meant, positions = self.intervention, self.intervention.positions
        conditional = isinstance(meant, Conditional) and bool(meant.when)
        named = isinstance(positions, int) or (isinstance(positions, tuple) and bool(positions))
        return named and not conditional and not meant.special_tokens and meant.acts_at(self.output)

    def _edited(self) -> int:
        """Return how many tokens were edited; on a GPU this waits for it."""
        listed = (mask.sum() if isinstance(mask, Tensor) else index.numel() for index, mask in self.masks)
        return int(self.forgotten) + int(sum(listed))

    def report(self) -> InterventionReport:
        """Return what was collected.

        Raises:
            AttachError: if something was put in that is not finite, or beyond the range of the model's numbers.
        """
        self._require_finite_and_within()
        positions: dict[int, set[int]] = {}
        edited = int(self.forgotten)
        for index, mask in self.masks:
            chosen = (mask if isinstance(mask, Tensor) else torch.ones_like(index, dtype=torch.bool)).nonzero().cpu()
            edited += len(chosen)
            for row, position in zip(chosen[:, 0].tolist(), index.cpu()[chosen.unbind(1)].tolist(), strict=True):
                positions.setdefault(row, set()).add(position)
        return InterventionReport(
            verb=type(self.intervention).__name__,
            site=str(self.site),
            calls=self.calls,
            edited=edited,
            positions={row: sorted(places) for row, places in sorted(positions.items())},
        )
