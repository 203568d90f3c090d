"""Where activations come from: tensors captured before, or a causal LM that reads text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError, ShapeError
from ..hooks.harvest import TokenSource, harvest
from .shuffle import ShuffleBuffer


class ActivationStream(ABC):
    """Activations of one site, without end: what is exhausted starts again."""

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield shuffled batches for ever, the same ones at every call.

        Args:
            batch_size: activations per batch.

        Yields:
            ``[batch_size, d_in]``.
        """

    @abstractmethod
    def sample(self, count: int) -> Iterator[Tensor]:
        """Yield about `count` activations in pieces, at most all there are, for statistics.

        Yields:
            ``[n, d_in]``.
        """


class TensorActivations(ActivationStream):
    """Activations that are in memory; every epoch is a new permutation of all of them.

    Args:
        activations: ``[n, d_in]``, of any floating dtype; half precision halves the memory and is converted per batch.
        seed: of the permutations.
    """

    def __init__(self, activations: Tensor, *, seed: int = 0) -> None:
        if activations.ndim != 2 or not activations.is_floating_point():
            raise ShapeError(
                f"Given activations {list(activations.shape)} of {activations.dtype}; expected floats [n, d_in]."
            )
        self.activations = activations
        self.seed = seed

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield random batches ``[batch_size, d_in]`` for ever; what is left of an epoch is dropped."""
        if len(self.activations) < batch_size:
            raise InputError(
                f"There are {len(self.activations)} activations, less than one batch of {batch_size}: give more."
            )
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for rows in torch.randperm(len(self.activations), generator=generator).split(batch_size):
                if len(rows) == batch_size:
                    yield self.activations[rows]

    def sample(self, count: int) -> Iterator[Tensor]:
        """Yield `count` activations drawn at random, ``[n, d_in]``."""
        rows = torch.randperm(len(self.activations), generator=torch.Generator().manual_seed(self.seed))[:count]
        for some in rows.split(4096):
            yield self.activations[some]


class ModelActivations(ActivationStream):
    """Activations of one site while a causal LM reads text; special tokens and padding are left out.

    Args:
        model: the causal LM, on any device.
        site: where to read.
        tokens: batches of tokens that can be read again, such as a list or a data loader; or a function that gives
            them.
        buffer_size: activations held for shuffling, at least two batches; the paper uses a million.
        seed: of the shuffling.
        special_tokens: keep the activations of special tokens too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        site: str,
        tokens: TokenSource,
        *,
        buffer_size: int = 1_000_000,
        seed: int = 0,
        special_tokens: bool = False,
    ) -> None:
        self.model = model
        self.site = site
        self.tokens = tokens
        self.buffer_size = buffer_size
        self.seed = seed
        self.special_tokens = special_tokens

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield shuffled batches ``[batch_size, d_in]`` for ever.

        Raises:
            InputError: if the buffer is smaller than two batches, or the tokens run dry.
        """
        if self.buffer_size < 2 * batch_size:
            raise InputError(
                f"buffer_size is {self.buffer_size}; expected at least two batches, {2 * batch_size}, to shuffle."
            )
        buffer = ShuffleBuffer(self.buffer_size, torch.Generator().manual_seed(self.seed))
        epoch = 0
        while True:
            seen = 0
            for chunk in self._epoch():
                seen += len(chunk)
                rest = buffer.add(chunk)
                while buffer.is_full:
                    yield from buffer.serve(batch_size, keep=self.buffer_size // 2)
                    rest = buffer.add(rest)
            if not seen:
                raise InputError(
                    f"The tokens gave no activations at {self.site} in epoch {epoch}. A generator can be read once: "
                    "pass a list, a data loader, or a function that returns a fresh iterator."
                )
            yield from buffer.serve(batch_size)
            epoch += 1

    def sample(self, count: int) -> Iterator[Tensor]:
        """Yield the first `count` activations, ``[n, d_in]``."""
        missing = count
        for chunk in self._epoch():
            yield chunk[:missing]
            missing -= len(chunk)
            if missing <= 0:
                return

    def _epoch(self) -> Iterator[Tensor]:
        for chunk in harvest(self.model, [self.site], self.tokens, special_tokens=self.special_tokens):
            yield chunk[self.site]


def collect(
    model: PreTrainedModel,
    sites: Sequence[str],
    tokens: TokenSource,
    *,
    dtype: torch.dtype | None = None,
    special_tokens: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Read several sites into memory, to train several SAEs from one pass over the text.

    Args:
        model: the causal LM.
        sites: where to read.
        tokens: batches of tokens.
        dtype: of the result; the model's own by default.
        special_tokens: keep the activations of special tokens too.
        progress: called after each batch with the number of activations per site so far.

    Returns:
        Activations ``[n, d]`` on the CPU, by site.

    Raises:
        InputError: if there were no tokens.
    """
    pieces: dict[str, list[Tensor]] = {site: [] for site in sites}
    count = 0
    for chunk in harvest(model, sites, tokens, special_tokens=special_tokens):
        for site in sites:
            pieces[site].append(chunk[site].to(device="cpu", dtype=dtype))
        count += len(chunk)
        if progress is not None:
            progress(count)
    if not count:
        raise InputError(f"The tokens gave no activations at {', '.join(sites)}; expected at least one batch of text.")
    collected = {}
    for site in sites:
        collected[site] = torch.cat(pieces.pop(site))  # popped, so that at most one site is in memory twice
    return collected
