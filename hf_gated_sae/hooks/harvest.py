"""`harvest`: activations and latents of a text, batch by batch, each row with the token that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnknownNameError, did_you_mean, unknown_name
from ..functional.short_repr import short_repr
from ..functional.sparse_latents import SparseLatents
from ..interventions import special_ids_for
from ..modeling import SAEModel
from .apply import exact_dtype
from .attach import require_model
from .capture import Wanted, capture, require_fitting, sae_input, sites_needed
from .dispatch import prove
from .observation import CountedTokens
from .token_batches import TokenBatch, TokenBatches, model_inputs, sequences_in_rows

TokenSource = TokenBatches | Callable[[], TokenBatches]
"""Batches of tokens, or a function that returns them."""


@dataclass(frozen=True, eq=False)
class Harvest:
    """Activations and latents of some tokens; the rows of all tensors are the same tokens.

    Attributes:
        values: activations ``[n, d]`` by site and active latents of `n` tokens by SAE.
        token_ids: the tokens ``[n]`` int64.
        documents: number of each token's sequence, from 0 on over all batches, ``[n]`` int64.
        positions: position of each token among the real tokens of its sequence, from 0 on, ``[n]`` int64.
    """

    values: Mapping[Any, Tensor | SparseLatents]
    token_ids: Tensor
    documents: Tensor
    positions: Tensor

    __repr__ = short_repr

    def __getitem__(self, key: Any) -> Any:
        """Return the activations of a site, or the active latents of an SAE.

        Raises:
            UnknownNameError: if it was not harvested.
        """
        if key not in self.values:
            names = [str(known) if isinstance(known, str) else type(known).__name__ for known in self.values]
            raise UnknownNameError(
                f"{key!r} was not harvested.{did_you_mean(key, names)} Harvested: {', '.join(names)}."
            )
        return self.values[key]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


def harvest(
    model: Any,
    what: Sequence[Wanted] | Wanted,
    batches: TokenSource,
    *,
    special_tokens: bool = False,
    special_ids: Sequence[int] | None = None,
    norm_limit: float | Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Harvest]:
    """Read sites and latents while a model runs through text, with one forward per batch that stops at the last site.

    The model runs in evaluation mode, and is back in its previous mode whenever a harvest is yielded. Only one batch
    is in memory, and only its active latents.

    Args:
        model: any Hugging Face causal LM.
        what: sites and SAEs, or a single one.
        batches: token ids ``[B, S]``, or mappings with ``input_ids`` and ``attention_mask``; or a function that
            returns an iterable of them.
        special_tokens: keep special tokens, unless they are padding, which is always left out.
        special_ids: which tokens are special. By default those that the SAEs have recorded, and for sites and SAEs
            without a record those of the model, see `special_token_ids`. Since all results have the same rows, a token
            is left out if it is special for any of them.
        norm_limit: also leave out tokens whose activation has a larger norm at a site: one number for all sites, or
            one by site, such as ``{sae.config.site: sae.config.norm_limit}``. None sets no limit.
        dtype: dtype of activations and values of latents; by default that of the model and of the SAE.

    Yields:
        The counted tokens of each batch.

    Raises:
        InputError: if there are no sites or SAEs, a limit is not a positive number, or `dtype` is not floating; and,
            while running, for a batch without token ids.
        SiteError: if a site does not exist in this model or could not be proven.
        UnknownNameError: if there is a limit for a site that is not read.
        ShapeError: if an SAE is not as wide as its site; and, while running, for a batch of another shape, or if the
            tensor at a site does not have a vector for each token.
    """
    require_model("harvest()", model)
    sites = sites_needed("harvest()", what)
    slots = prove(model, [site for several in sites.values() for site in several])
    require_fitting(sites, slots)
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"harvest() was given dtype={dtype}; expected a floating dtype such as torch.float16.")
    limits = _limits(norm_limit, sites)
    return _harvests(model, sites, batches, special_tokens, special_ids, limits, dtype)


def _limits(given: float | Mapping[str, float] | None, sites: Mapping[Any, list[str]]) -> dict[str, float]:
    """Return the largest norm of the activations that are kept, by site."""
    names = list(dict.fromkeys(name for several in sites.values() for name in several))
    limits = dict(given) if isinstance(given, Mapping) else {} if given is None else dict.fromkeys(names, given)
    for name, limit in limits.items():
        if name not in names:
            raise unknown_name("site in norm_limit", name, names)
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise InputError(f"harvest() was given norm_limit={limit!r} for {name}; expected a positive number.")
    return limits


def _harvests(
    model: Any,
    sites: Mapping[Any, list[str]],
    batches: TokenSource,
    special_tokens: bool,
    special_ids: Sequence[int] | None,
    limits: Mapping[str, float],
    dtype: torch.dtype | None,
) -> Iterator[Harvest]:
    documents = 0
    # SAEs that need whole sequences are encoded by `capture`, the others only at the tokens that count.
    wanted = [each for key, names in sites.items() for each in ([key] if _needs_sequences(key) else names)]
    wanted = list(dict.fromkeys([*wanted, *limits]))
    for batch in _iterated(batches):
        inputs = model_inputs(model, batch)
        special = special_ids_for(model, sites) if special_ids is None else special_ids
        counted = CountedTokens.of(model, inputs, special_tokens=special_tokens, special_ids=special)
        with evaluating(model, *(key for key in sites if isinstance(key, SAEModel))):
            found = capture(model, wanted, **inputs)
            for site, limit in limits.items():
                counted = counted.within(limit, found[site], site)
            with torch.inference_mode(False), torch.no_grad():
                values = {key: _value(key, names, found, counted) for key, names in sites.items()}
        sequences, positions = sequences_in_rows(inputs)
        yield Harvest(
            values={key: value if dtype is None else value.to(dtype) for key, value in values.items()},
            token_ids=inputs["input_ids"][counted.mask].long(),
            documents=sequences[counted.mask] + documents,
            positions=positions[counted.mask],
        )
        documents += int(sequences.max()) + 1


def _iterated(batches: TokenSource) -> Iterator[TokenBatch]:
    given = batches() if callable(batches) else batches
    if isinstance(given, (Mapping, str)):
        raise InputError(
            f"harvest() was given one {type(given).__name__}; expected batches, such as a list of token ids [B, S]."
        )
    yield from given


def _needs_sequences(key: Any) -> bool:
    """Whether a key is an SAE whose latents depend on other tokens."""
    return isinstance(key, SAEModel) and not key.per_token


def _value(
    key: Any, sites: Sequence[str], found: Mapping[Any, Tensor], counted: CountedTokens
) -> Tensor | SparseLatents:
    """Return the activations of the counted tokens, or an SAE's active latents of them."""
    if _needs_sequences(key):
        return SparseLatents.from_dense(counted.chosen(found[key], sites[0]))
    chosen = [counted.chosen(found[site], site) for site in sites]
    return active_latents(key, chosen) if isinstance(key, SAEModel) else chosen[0]


def active_latents(sae: SAEModel, activations: Sequence[Tensor]) -> SparseLatents:
    """Return the active latents, numbered as in the whole SAE even if only a part of it was loaded.

    Args:
        sae: the SAE.
        activations: those of each site that it reads, ``[n, d_in]``.
    """
    x = sae_input(sae, activations)
    with exact_dtype(x.device):
        live = sae.encode_sparse(x)
    kept = sae.config.kept_latents
    if kept is None:
        return live
    numbers = torch.tensor(kept, dtype=torch.int64, device=live.indices.device)
    return SparseLatents(live.offsets, numbers[live.indices], live.values, (*live.shape[:-1], sae.config.d_sae))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and each of their parts back into its previous mode afterwards."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def rows_of_active(live: SparseLatents, rows: Tensor) -> SparseLatents:
    """Return the active latents of some tokens, in the order given.

    Args:
        live: active latents of ``[tokens]``.
        rows: numbers of tokens ``[n]``.
    """
    counts, ends = live.offsets.diff()[rows], live.offsets.new_zeros(len(rows) + 1)
    torch.cumsum(counts, 0, out=ends[1:])
    within = torch.arange(int(ends[-1]), device=ends.device) - ends[:-1].repeat_interleave(counts)
    places = live.offsets[rows].repeat_interleave(counts) + within
    return SparseLatents(ends, live.indices[places], live.values[places], (len(rows), live.d_sae))
