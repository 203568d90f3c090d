"""What interventions get to see of one call of the model, and of one site in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import AttachError
from ..modeling import SAEModel
from ..sites import Site
from .positions import TokenContext

_T = TypeVar("_T")


class ModelCall:
    """One forward of the model: its tokens, and what passed its sites so far.

    Args:
        tokens: what is known of the tokens.
        past: histories of the calls that filled the cache, by owner: ``[B, columns]``.
    """

    def __init__(self, tokens: TokenContext, past: Mapping[Any, Tensor] | None = None) -> None:
        self.tokens = tokens
        self.histories: MutableMapping[Any, Tensor] = WeakKeyDictionary()
        self.past: Mapping[Any, Tensor] = {} if past is None else past
        self._seen: dict[Site, Tensor] = {}
        self._computed: dict[Hashable, Any] = {}

    def see(self, site: Site, x: Tensor) -> None:
        """Keep the clean activation ``[B, S, d]`` of a site for interventions that write elsewhere."""
        self._seen[site] = x.clone()  # the model may write into its own tensor afterwards

    def seen(self, site: Site) -> Tensor:
        """Return the clean activation of a site that this call has passed.

        Raises:
            AttachError: if it was not passed.
        """
        if site not in self._seen:
            raise AttachError(
                f"What is to be written needs the activation at {site}, which this forward has not passed: it runs in "
                "another order than when the site was proven, or only a part of it again, for gradient checkpointing."
            )
        return self._seen[site]

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """Return what `compute` gives, computed at most once per call."""
        if key not in self._computed:
            self._computed[key] = compute()
        return cast(_T, self._computed[key])

    def is_computed(self, key: Hashable) -> bool:
        """Whether `once` was asked for this before."""
        return key in self._computed

    def remember(self, owner: object, now: Tensor) -> Tensor:
        """Keep something about every token, and return it together with that of the tokens in the cache.

        Args:
            owner: whose it is.
            now: of this call's tokens, ``[B, S]``.

        Returns:
            ``[B, past + S]``.

        Raises:
            AttachError: if the cache holds tokens that were computed while the owner was not attached, or its rows are
                reordered between the calls.
        """
        start, past = self.tokens.end - now.shape[1], self.past.get(owner)
        if start and self.tokens.beams:
            raise AttachError(
                f"{type(owner).__name__} depends on the {start} tokens before, which are in the cache, and beam "
                "search reorders its rows: use num_beams=1, or use_cache=False."
            )
        if start and (past is None or past.shape[1] < start or past.shape[0] != now.shape[0]):
            raise AttachError(
                f"{type(owner).__name__} depends on the {start} tokens before, which are in a cache that it did not "
                "see being filled (they were computed before it was attached, or the cache is a copy): begin with "
                "an empty cache."
            )
        whole = now if past is None or not start else torch.cat([past[:, :start].to(now.device), now], 1)
        self.histories[owner] = whole.detach()
        return whole

    def forget(self) -> None:
        """Let go of what was computed."""
        self._computed.clear()

    def finish(self) -> None:
        """Let go of all tensors but the histories."""
        self._computed.clear()
        self._seen.clear()


class SiteCall:
    """One activation passing one site that an intervention writes.

    Args:
        x: the clean activation ``[B, S, d]``.
        tokens: what is known of its tokens.
        placed: gives an SAE on a device; by default it is where it must be.
        call: the forward that this is part of.
        output: which of the intervention's sites this is.
    """

    def __init__(
        self,
        x: Tensor,
        tokens: TokenContext,
        placed: Callable[[SAEModel, torch.device], SAEModel] | None = None,
        *,
        call: ModelCall | None = None,
        output: int = 0,
    ) -> None:
        self.x = x
        self.tokens = tokens
        self.call = call or ModelCall(tokens)
        self.output = output
        self._placed = placed

    def sae(self, sae: SAEModel, device: torch.device | None = None) -> SAEModel:
        """Return the SAE on the activation's device, or on another one."""
        device = device or self.x.device
        return sae if self._placed is None or sae.b_dec.device == device else self._placed(sae, device)

    def source(self, sae: SAEModel, source: int = 0) -> Tensor:
        """Return the clean activation that one source of an SAE reads, ``[B, S, d_in]``, in the SAE's dtype."""
        writes_elsewhere = not (sae.one_site and sae.config.site_out is None) and sae.config.is_transcoder
        if source == self.output and not writes_elsewhere:
            return self.x.to(sae.b_dec.dtype)
        return self.call.seen(Site.parse(sae.config.sites_read[source])).to(sae.dtype)

    def latents(self, sae: SAEModel, latents: Sequence[int]) -> Tensor:
        """Return some latents, ``[B, S, n]``, from their encoder rows alone if possible.

        Latents of sources that come after this site are not known yet, and given as 0: they do not write here.
        """
        rows = rows_of(sae, latents)
        sources = [0] if sae.one_site else sae.sources_of(rows)
        if sources[0] <= self.output and len(set(sources)) == 1:
            return self._of_source(sae, sources[0], rows, tuple(latents))
        values = self.x.new_zeros(*self.x.shape[:-1], len(rows), dtype=sae.dtype)
        for source in sorted({source for source in sources if source <= self.output}):
            at = [place for place, other in enumerate(sources) if other == source]
            values[..., at] = self._of_source(sae, source, rows[at], tuple(latents[place] for place in at))
        return values

    def _of_source(self, sae: SAEModel, source: int, rows: Tensor, latents: tuple[int, ...]) -> Tensor:
        """Return the latents of some rows, all of one source."""
        if not sae.elementwise or self.call.is_computed((sae, source)):
            every = self.all_latents(sae, source)
            return every[..., sae.rows_in_source(rows, source).to(every.device)]

        def encode() -> Tensor:
            x = self.source(sae, source)
            placed = self.sae(sae, x.device)
            return placed.encode_source(x, source, rows_of(placed, latents))

        return self.call.once((sae, source, latents), encode).to(self.x.device)

    def all_latents(self, sae: SAEModel, source: int = 0) -> Tensor:
        """Return all latents of one source, ``[B, S, n]``; encoded once however many ask."""

        def encode() -> Tensor:
            x = self.source(sae, source)
            return self.sae(sae, x.device).encode_source(x, source)

        return self.call.once((sae, source), encode).to(self.x.device)

    def written(self, sae: SAEModel, latents: Sequence[int], amounts: Tensor) -> Tensor:
        """Return what amounts of latents write here, in the units of the activation.

        Args:
            sae: the SAE.
            latents: which latents.
            amounts: ``[B, S, n]``, or ``[n]`` for the same amounts at every token.

        Returns:
            ``[B, S, d]``, or ``[d]``.
        """
        placed = self.sae(sae)
        rows = placed.rows_at(rows_of(placed, latents), self.output)
        amounts = amounts.to(rows.dtype)
        written = (amounts.unsqueeze(-1) * rows).sum(0) if amounts.ndim == 1 else amounts @ rows
        scale = placed.written_scale(self.x.to(placed.dtype))
        return written if scale is None else written * scale

    def reconstruction(self, sae: SAEModel) -> Tensor:
        """Return what an SAE puts here, ``[B, S, d]``."""
        own = min(self.output, len(sae.config.sites_read) - 1)
        x = self.source(sae, own).to(self.x.device)
        if sae.one_site and not self.call.is_computed((sae, own)):  # then not all latents need to be in memory
            return self.sae(sae).reconstruct(x)
        latents = [self.all_latents(sae, source) for source in range(own + 1)]
        return self.sae(sae).decode_at(latents, self.output, x)


_MOST_KNOWN = 256  # a sweep over single latents must not fill the memory
_ROWS: WeakKeyDictionary[SAEModel, dict[tuple[Any, ...], Tensor]] = WeakKeyDictionary()


def rows_of(sae: SAEModel, latents: Sequence[int]) -> Tensor:
    """Return the rows of latents on the SAE's device, checked once per SAE: a decoding step has no time for it."""
    known = _ROWS.setdefault(sae, {})
    key = (sae.b_dec.device, *latents)
    if key not in known:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        with torch.inference_mode(False):  # they serve later calls, which may need gradients
            known[key] = sae.latent_indices(latents)
    return known[key]
