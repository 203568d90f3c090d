"""Activations of a causal LM while it reads text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...hooks.attach import require_model
from ...hooks.dispatch import prove
from ...hooks.harvest import Harvest, TokenSource, harvest
from ...hooks.observation import CountedTokens
from ...hooks.token_batches import TokenBatch, model_inputs
from ...interventions import special_token_ids
from ...sites import Site
from ...sites.probe import embedding_of, unwrap
from ..phases import Phase
from ..proportions import BUFFER, buffer_size
from ..shuffle import ShuffleBuffer
from .base import ActivationStream, Cursor, State
from .tokens import GivenTokens, TokenStream, is_by_row, rows_of


class ModelActivations(ActivationStream):
    """Activations of one or several sites while a causal LM reads text; special tokens and padding are left out.

    One forward per batch of tokens serves all sites, and ends after the last of them. The activations are mixed in one
    buffer, whose rows are the same tokens at every site. At the end of the text the buffer is emptied, and the text
    starts again. Several processes read different text, each with its own model and buffer.

    Args:
        model: the causal LM, on one or several devices, in any precision.
        sites: to read.
        tokens: `TextTokens`; or batches of tokens that can be read again, such as a list or a data loader; or a
            function that returns them.
        buffer_size: rows held for shuffling, at least two batches; by default a tenth of the activations that a run
            trains on, at most the million of the paper. `buffer_bytes` is their size.
        seed: of the shuffling.
        special_tokens: include the activations of special tokens: those of the model, see `special_token_ids`, and of
            the tokenizer of `TextTokens`.
        device: of the activations; by default that on which the model computes them.
        dtype: of the activations; the model's own by default.
        save_buffer: include the buffer's contents in `state_dict`. Without them checkpoints are small, but a resumed
            run continues in the text with an empty buffer: the activations held are lost, and the run is not the same
            bit for bit.

    Raises:
        InputError: if no site is named, or one twice.
    """

    def __init__(
        self,
        model: Any,
        sites: str | Site | Sequence[str | Site],
        tokens: TokenStream | TokenSource,
        *,
        buffer_size: int | None = None,
        seed: int = 0,
        special_tokens: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        save_buffer: bool = True,
    ) -> None:
        require_model("ModelActivations()", model)
        self.model = model
        self.sites = tuple(map(str, [sites] if isinstance(sites, (str, Site)) else sites))
        if not self.sites or len({str(Site.parse(site)) for site in self.sites}) < len(self.sites):
            raise InputError(f"Given the sites {list(self.sites)}; expected at least one, and each of them once.")
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype is {dtype}; expected a floating dtype such as torch.bfloat16.")
        self.tokens = tokens if isinstance(tokens, TokenStream) else GivenTokens(tokens)
        self.tokens.require_fitting(model)
        self._buffer_size = buffer_size or BUFFER.most
        self._size_not_given = buffer_size is None
        self.seed = seed
        self.special_tokens = special_tokens
        # The tokenizer may have special tokens that the model's configuration does not name.
        known = {*special_token_ids(model), *self.tokens.special_ids}
        self.special_ids = () if special_tokens else tuple(sorted(known))
        self.device = device
        self.dtype = dtype
        self.save_buffer = save_buffer

    @property
    def buffer_size(self) -> int:
        """Rows held for shuffling."""
        return self._buffer_size

    def size_for(self, activations: int, batch_size: int) -> None:
        """Choose the size of the buffer in proportion to a run, unless it was given."""
        if self._size_not_given:
            self._buffer_size = buffer_size(activations, batch_size)

    def size_as(self, state: Mapping[str, Any]) -> None:
        """Set the size of the buffer to that of a saved state, unless one was given."""
        if self._size_not_given:
            self._buffer_size = state.get("buffer_size", self._buffer_size)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the full buffer."""
        widths = sum(slot.width for slot in prove(self.model, self.sites).values())
        return self.buffer_size * widths * (self.dtype or self.model.dtype).itemsize

    def facts(self) -> dict[str, Any]:
        """Return buffer size, special tokens and the layout of sequences; the text's position identifies the text."""
        own = {"buffer_size": self.buffer_size, "special_tokens": self.special_tokens}
        return {**own, "tokens": type(self.tokens).__name__, **self.tokens.facts()}

    def open(self, batch_size: int, state: State | None) -> Cursor[dict[str, Tensor]]:
        """Return an endless iterator over shuffled batches.

        Raises:
            InputError: if the buffer is smaller than two batches; while iterating, if the tokens cannot be read again,
                or the model's activations are not finite.
        """
        if self.buffer_size < 2 * batch_size:
            raise InputError(
                f"buffer_size is {self.buffer_size}; expected at least two batches, {2 * batch_size}, to shuffle."
            )
        return _Mixed(self, batch_size, state)

    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield the first `count` activations of the text."""
        missing = count
        for chunk in self.read(self._first(self.tokens.open(), count)):
            yield {site: x[:missing] for site, x in chunk.items()}
            missing -= _length(chunk)
            if missing <= 0:
                return

    def _first(self, batches: Iterator[TokenBatch], count: int) -> Iterator[TokenBatch]:
        """Yield batches of tokens up to the sequence that contains activation number `count`."""
        for batch in batches:
            per_row = self.count(batch).cumsum(0)
            rows = int((per_row < count).sum()) + 1
            yield rows_of(batch, slice(rows)) if rows < len(per_row) and is_by_row(batch) else batch
            count -= int(per_row[-1])
            if count <= 0:
                return

    def count(self, batch: TokenBatch) -> Tensor:
        """Return the number of activations of each sequence of a batch of tokens, ``[B]`` int64, without a forward."""
        inputs = model_inputs(self.model, batch)
        return CountedTokens.of(self.model, inputs, special_ids=self.special_ids).mask.sum(1)

    def shard(self, rank: int, world_size: int) -> ModelActivations:
        """Return the stream that reads one process's part of the text."""
        part = copy.copy(self)
        part.tokens = self.tokens.shard(rank, world_size)
        part._resumed = part._cursor = None
        return part

    def read(self, batches: Iterator[TokenBatch]) -> Iterator[dict[str, Tensor]]:
        """Yield the activations of each batch of tokens, in the order of the text.

        Raises:
            InputError: if some are not finite.
        """
        harvests = harvest(self.model, self.sites, _checked(self.model, batches), special_ids=self.special_ids)
        for number, found in enumerate(harvests):
            chunk = {}
            for site in self.sites:
                x = found[site].to(device=self.device, dtype=self.dtype)
                if not torch.isfinite(x).all():
                    raise _not_finite(site, number, found, x)
                chunk[site] = x
            yield chunk


class _Mixed(Cursor[dict[str, Tensor]]):
    """Batches from a buffer that is refilled whenever it is half empty.

    Args:
        stream: to read from.
        batch_size: rows per batch.
        state: saved position to continue from.
    """

    def __init__(self, stream: ModelActivations, batch_size: int, state: State | None) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.buffer = ShuffleBuffer(stream.buffer_size, torch.Generator().manual_seed(stream.seed))
        self.epoch = self.seen = 0
        self.keep: int | None = None  # number of rows below which to refill; None while the buffer is filled
        self.rest: dict[str, Tensor] = {}  # rows of the latest chunk that did not fit
        tokens = None
        if state is not None:
            self.epoch, self.seen, self.keep = state["epoch"], state["seen"], state["keep"]
            self.rest, tokens = dict(state["rest"]), state["tokens"]
            self.buffer.generator.set_state(state["generator"])
            self.buffer.load_state_dict(state["held"])
        self._open_tokens(tokens)

    def _open_tokens(self, state: State | None) -> None:
        self.tokens = self.stream.tokens.open(state)
        self._chunks = self.stream.read(self.tokens)

    def __next__(self) -> dict[str, Tensor]:
        """Return the next batch.

        Raises:
            InputError: if an epoch had no activations.
        """
        while self.keep is None or self.buffer.count - self.batch_size < self.keep:
            self._fill()
        return self.buffer.take(self.batch_size)

    def _fill(self) -> None:
        """Add activations until the buffer is full or the text ends, and mix."""
        self.keep = None
        report = self.stream.report
        while not self.buffer.is_full:
            if self.rest:
                self.rest = _non_empty(self.buffer.add(self.rest))
                if report is not None:
                    report(Phase.FILL, self.buffer.count, self.buffer.size)
                continue
            chunk = next(self._chunks, None)
            if chunk is None:
                self._end_epoch()
                if report is not None:
                    report(Phase.FILL, self.buffer.size, self.buffer.size)
                return
            self.seen += _length(chunk)
            self.rest = _non_empty(chunk)
        self.buffer.mix()
        self.keep = self.stream.buffer_size // 2

    def _end_epoch(self) -> None:
        if not self.seen:
            raise InputError(
                f"The tokens gave no activations at {', '.join(self.stream.sites)} in epoch {self.epoch}. A generator "
                "can only be read once: pass a list, a data loader, or a function that returns a new iterator."
            )
        self.epoch, self.seen = self.epoch + 1, 0
        self._open_tokens(None)
        self.buffer.mix()
        self.keep = 0

    def state_dict(self) -> State:
        """Return the position in the text, the buffer's contents, and the state of the random generator."""
        state: State = {
            "epoch": self.epoch,
            "seen": self.seen,
            "keep": None,
            "rest": {},
            "held": {},
            "tokens": self.tokens.state_dict(),
            "generator": self.buffer.generator.get_state(),
        }
        if self.stream.save_buffer:
            rest = {site: x.to("cpu", copy=True) for site, x in self.rest.items()}
            state |= {"keep": self.keep, "rest": rest, "held": self.buffer.state_dict()}
        return state


def collect(
    model: Any,
    sites: Sequence[str],
    tokens: TokenSource | TokenStream,
    *,
    dtype: torch.dtype | None = None,
    special_tokens: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Read several sites into memory, to train several SAEs from one pass over the text.

    Args:
        model: the causal LM.
        sites: to read.
        tokens: batches of tokens, or `TextTokens`.
        dtype: of the result; the model's own by default.
        special_tokens: include the activations of special tokens.
        progress: called after each batch with the number of activations per site so far.

    Returns:
        Activations ``[n, d]`` on the CPU, by site.

    Raises:
        InputError: if there were no tokens, or some activations are not finite.
    """
    stream = ModelActivations(model, sites, tokens, device="cpu", dtype=dtype, special_tokens=special_tokens)
    pieces: dict[str, list[Tensor]] = {site: [] for site in stream.sites}
    count = 0
    for chunk in stream.read(stream.tokens.open()):
        for site, x in chunk.items():
            pieces[site].append(x)
        count += _length(chunk)
        if progress is not None:
            progress(count)
    if not count:
        raise InputError(f"The tokens gave no activations at {', '.join(sites)}; expected at least one batch of text.")
    collected = {}
    for site in stream.sites:
        collected[site] = torch.cat(pieces.pop(site))  # popped, so that at most one site is in memory twice
    return collected


def _checked(model: Any, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
    """Yield batches, checking that the token ids are in the model's vocabulary: other ids crash a GPU's context.

    Raises:
        InputError: for an id that is not.
    """
    weight = getattr(embedding_of(unwrap(model)[0]), "weight", None)
    for batch in batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if isinstance(ids, Tensor) and isinstance(weight, Tensor) and ids.numel():
            largest = int(ids.max())
            if largest >= len(weight):
                raise InputError(
                    f"The tokens have id {largest}, and the model's vocabulary has {len(weight)} tokens: use the "
                    "model's own tokenizer."
                )
        yield batch


def _length(chunk: dict[str, Tensor]) -> int:
    return len(next(iter(chunk.values())))


def _non_empty(chunk: dict[str, Tensor]) -> dict[str, Tensor]:
    return chunk if _length(chunk) else {}


def _not_finite(site: str, batch: int, found: Harvest, x: Tensor) -> InputError:
    """Return the error for activations ``x [n, d]`` of which some are NaN or infinite."""
    bad = ~torch.isfinite(x).all(-1)
    first = int(bad.nonzero()[0])
    made = found[site].to(x.device)[first]
    what = (
        f"They are the model's own output in {made.dtype}: run it in bfloat16 or float32 instead of float16, and "
        "check its weights."
        if not torch.isfinite(made).all()
        else f"The model's values in {made.dtype} overflow {x.dtype}: pass another dtype."
    )
    sequence, position = int(found.documents[first]), int(found.positions[first])
    return InputError(
        f"{int(bad.sum())} of {len(x)} activations at {site} are NaN or infinite, the first one at position "
        f"{position} of sequence {sequence}, in batch {batch} of the text, counted from 0 since the text was opened. "
        f"{what}"
    )
