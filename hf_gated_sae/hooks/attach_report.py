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

# How much is remembered token by token; older calls are counted, not listed, so that memory stays bounded.
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
    """What each attached intervention did."""

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
    """Collects what one intervention does at one site; nothing is read from the device until the report is made."""

    intervention: Intervention
    output: int = 0
    """Number of the site among the intervention's sites."""
    transforms: tuple[Transform, ...] = ()
    """Transforms through which the intervention sees the activation."""
    calls: int = 0
    forgotten: Tensor | int = 0
    masks: deque[tuple[Tensor, Tensor | bool]] = field(default_factory=deque)
    remembered: int = 0
    before: int | None = None
    """Smallest number of columns that were in the cache before a call."""
    tokens: int = 0
    """Number of tokens that passed the site, edited or not."""
    columns: int = 0
    """Number of columns that the model has been through."""
    lengths: Tensor | None = None
    """Numbers of tokens of the longest row and of the longest prompt, ``[2]``; only if positions are numbers."""
    taint: Tensor | None = None
    """Zero, or NaN once a number that was put in was not finite; not used on a CPU, where that raises at once."""
    beyond: Tensor | None = None
    """Whether a number that was put in was beyond the range of the model's dtype; not used on a CPU."""
    dtype: torch.dtype = torch.float32
    """The model's dtype at the site, if its range was watched."""
    replaces: bool = field(init=False)
    """Whether the intervention replaces the activation."""
    sae: SAEModel | None = field(init=False)
    """The SAE that the intervention uses; None if it uses none."""

    def __post_init__(self) -> None:
        """Set `sae` and `replaces`."""
        self.sae, self.replaces = self.intervention.sae_used, self.intervention.replaces

    @property
    def site(self) -> Site:
        """The site of this record."""
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
        """Check by its sum that what is put in at masked tokens is finite.

        Args:
            value: what is added or put in place, ``[B, S, d]`` or broadcastable to it.
            mask: at which tokens.

        Raises:
            AttachError: if it is not finite; on other devices than a CPU only `require_sound` raises, since reading
                the sum would make the model wait.
        """
        value = value.detach()
        wide = torch.promote_types(value.dtype, torch.float32)
        if isinstance(mask, Tensor):
            rows = value.sum(-1, dtype=wide)
            total = torch.where(mask.to(rows.device), rows, 0.0).sum()
        else:
            total = value.sum(dtype=wide)
        if is_functorch_wrapped(total):
            total = untransformed(total).sum()  # also over the dimension of vmap
        if total.device.type == "cpu":
            self._require_finite(total)
        else:
            self.taint = total * 0.0 if self.taint is None else self.taint + total * 0.0

    def _require_finite(self, total: Tensor) -> None:
        """Raise if a sum of what was put in is not finite."""
        if not math.isfinite(total):
            self.taint = None  # raise only once
            raise AttachError(
                f"{type(self.intervention).__name__} put NaN or infinite numbers in at {self.site}: the activations "
                "there, or the SAE's latents, are not finite."
            )

    def watch_range(self, beyond: Tensor, dtype: torch.dtype) -> None:
        """Check that the activation with which the model continues did not overflow its dtype.

        Args:
            beyond: whether it did, a single bool.
            dtype: that dtype.

        Raises:
            AttachError: if it did; as for `watch`, on other devices than a CPU only `require_sound` raises.
        """
        self.dtype = dtype
        if is_functorch_wrapped(beyond):
            beyond = untransformed(beyond).any()
        if beyond.device.type == "cpu":
            self._require_within(beyond)
        else:
            self.beyond = beyond if self.beyond is None else self.beyond | beyond

    def _require_within(self, beyond: Tensor) -> None:
        """Raise if what was put in was beyond the range of the model's dtype."""
        if beyond:
            self.beyond = None  # raise only once
            name = str(self.dtype).removeprefix("torch.")
            raise AttachError(
                f"What {type(self.intervention).__name__} put in at {self.site} overflowed the model's {name}, whose "
                f"largest number is {torch.finfo(self.dtype).max:g}: edit less strongly, or load the model in "
                "bfloat16 or float32."
            )

    def _require_finite_and_within(self) -> None:
        """Raise if what was put in was not finite, or beyond the range of the model's dtype."""
        if self.taint is not None:
            self._require_finite(self.taint)
        if self.beyond is not None:
            self._require_within(self.beyond)

    def require_sound(self) -> None:
        """Raise unless everything put in was finite and there was a token at every given position.

        Raises:
            AttachError: naming the position or the number at fault.
        """
        self._require_finite_and_within()
        if self.calls and self.intervention.columns > self.columns:
            raise AttachError(
                f"{type(self.intervention).__name__} at {self.site} was given {self.intervention.columns} columns, "
                f"and the model went through {self.columns}; expected at most as many as the batch has."
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
                    "cache before it was attached, or are special tokens or padding, which are not edited: begin with "
                    "an empty cache, or pass special_tokens=True."
                )
            raise AttachError(
                f"{named}{self.intervention.positions!r} are special tokens or padding, which are not edited. Pass "
                "special_tokens=True to edit special tokens."
            )

    def require_reach(self) -> None:
        """Raise or warn if generations were not edited as `positions` says; this waits for a GPU.

        Raises:
            AttachError: if all tokens of prompt and continuation were edited, but `positions` selects only some.
        """
        meant = self.intervention
        if not self.calls or not meant.acts_at(self.output) or (isinstance(meant, Conditional) and meant.when):
            return
        edited, what = self._edited(), f"{type(meant).__name__} at {self.site} with positions={meant.positions!r}"
        if edited == self.tokens and isinstance(meant.positions, str) and meant.positions != "all":
            raise AttachError(
                f"{what} edited all {edited} tokens of a generation, those of the prompt and the generated ones, so "
                "their positions were misread. Call generate() of the model that was given to attach(); if you did, "
                "please report this with the versions of transformers and hf-gated-sae."
            )
        if not edited and self.tokens:
            warnings.warn(
                f"{what} edited none of the {self.tokens} tokens of a whole generation: positions selected no token, "
                "or only padding, or special tokens, which need special_tokens=True. See the attachment's report().",
                UserWarning,
                stacklevel=4,
            )

    def _names_tokens(self) -> bool:
        """Whether positions are given as numbers, so that only special tokens and padding are not edited."""
        meant, positions = self.intervention, self.intervention.positions
        conditional = isinstance(meant, Conditional) and bool(meant.when)
        named = isinstance(positions, int) or (isinstance(positions, tuple) and bool(positions))
        return named and not conditional and not meant.special_tokens and meant.acts_at(self.output)

    def _edited(self) -> int:
        """Return the number of edited tokens; this waits for a GPU."""
        listed = (mask.sum() if isinstance(mask, Tensor) else index.numel() for index, mask in self.masks)
        return int(self.forgotten) + int(sum(listed))

    def report(self) -> InterventionReport:
        """Return what was collected.

        Raises:
            AttachError: if what was put in was not finite, or beyond the range of the model's dtype.
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
