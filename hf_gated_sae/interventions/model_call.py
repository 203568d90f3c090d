"""The view that interventions have of one forward of the model, and of one site in it."""

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
    """One forward of the model: its tokens, and the activations of the sites that it has reached.

    Args:
        tokens: the tokens of the call.
        past: histories of the calls that filled the cache, by owner: ``[B, columns]``.
    """

    def __init__(self, tokens: TokenContext, past: Mapping[Any, Tensor] | None = None) -> None:
        self.tokens = tokens
        self.histories: MutableMapping[Any, Tensor] = WeakKeyDictionary()
        self.past: Mapping[Any, Tensor] = {} if past is None else past
        self._seen: dict[Site, Tensor] = {}
        self._computed: dict[Hashable, Any] = {}

    def see(self, site: Site, x: Tensor) -> None:
        """Store the clean activation ``[B, S, d]`` of a site for interventions that write another one."""
        self._seen[site] = x.clone()  # the model may write into its own tensor afterwards

    def seen(self, site: Site) -> Tensor:
        """Return the clean activation of a site that this call has reached.

        Raises:
            AttachError: if it has not been reached.
        """
        if site not in self._seen:
            raise AttachError(
                f"The intervention needs the activation at {site}, which this forward has not reached yet: it runs in "
                "another order than when the site was proven, or repeats only a part, as gradient checkpointing does."
            )
        return self._seen[site]

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """Return the result of `compute`, which is called at most once per call of the model."""
        if key not in self._computed:
            self._computed[key] = compute()
        return cast(_T, self._computed[key])

    def is_computed(self, key: Hashable) -> bool:
        """Whether `once` has computed this key."""
        return key in self._computed

    def remember(self, owner: object, now: Tensor) -> Tensor:
        """Store values of this call's tokens, and return them after those of the tokens in the cache.

        Args:
            owner: the intervention that they are for.
            now: values of this call's tokens, ``[B, S]``.

        Returns:
            ``[B, past + S]``.

        Raises:
            AttachError: if the cache has tokens that were computed while the owner was not attached, or its rows are
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
                f"{type(owner).__name__} depends on the {start} tokens before, which are in a cache that was filled "
                "without it (before it was attached, or the cache is a copy): begin with an empty cache."
            )
        whole = now if past is None or not start else torch.cat([past[:, :start].to(now.device), now], 1)
        self.histories[owner] = whole.detach()
        return whole

    def forget(self) -> None:
        """Release the computed values."""
        self._computed.clear()

    def finish(self) -> None:
        """Release all tensors but the histories."""
        self._computed.clear()
        self._seen.clear()


class SiteCall:
    """The activation at one site that an intervention writes, in one forward.

    Args:
        x: the clean activation ``[B, S, d]``.
        tokens: the tokens of the call.
        sae_on: returns an SAE on a device; by default SAEs are used on the device where they are.
        call: the forward.
        output: number of the site among those that the intervention writes.
    """

    def __init__(
        self,
        x: Tensor,
        tokens: TokenContext,
        sae_on: Callable[[SAEModel, torch.device], SAEModel] | None = None,
        *,
        call: ModelCall | None = None,
        output: int = 0,
    ) -> None:
        self.x = x
        self.tokens = tokens
        self.call = call or ModelCall(tokens)
        self.output = output
        self._sae_on = sae_on

    def sae(self, sae: SAEModel, device: torch.device | None = None) -> SAEModel:
        """Return the SAE on the activation's device, or on another one."""
        device = device or self.x.device
        return sae if self._sae_on is None or sae.b_dec.device == device else self._sae_on(sae, device)

    def source(self, sae: SAEModel, source: int = 0) -> Tensor:
        """Return the clean activation that one source of an SAE reads, ``[B, S, d_in]``, in the SAE's dtype."""
        writes_elsewhere = not (sae.one_site and sae.config.site_out is None) and sae.config.is_transcoder
        if source == self.output and not writes_elsewhere:
            return self.x.to(sae.b_dec.dtype)
        return self.call.seen(Site.parse(sae.config.sites_read[source])).to(sae.dtype)

    def latents(self, sae: SAEModel, latents: Sequence[int]) -> Tensor:
        """Return some latents, ``[B, S, n]``, from their encoder rows alone if possible.

        Latents of sources after this site are not known yet, and are 0: they do not write here.
        """
        rows = rows_of(sae, latents)
        sources = [0] if sae.one_site else sae.sources_of(rows)
        if sources[0] <= self.output and len(set(sources)) == 1:
            return self._of_source(sae, sources[0], rows, tuple(latents))
        values = self.x.new_zeros(*self.x.shape[:-1], len(rows), dtype=sae.dtype)
        for source in sorted({source for source in sources if source <= self.output}):
            indices = [index for index, other in enumerate(sources) if other == source]
            values[..., indices] = self._of_source(
                sae, source, rows[indices], tuple(latents[index] for index in indices)
            )
        return values

    def _of_source(self, sae: SAEModel, source: int, rows: Tensor, latents: tuple[int, ...]) -> Tensor:
        """Return the latents of some rows, all of one source."""
        if not sae.elementwise or self.call.is_computed((sae, source)):
            every = self.all_latents(sae, source)
            return every[..., sae.rows_in_source(rows, source).to(every.device)]

        def encode() -> Tensor:
            x = self.source(sae, source)
            local = self.sae(sae, x.device)
            return local.encode_source(x, source, rows_of(local, latents))

        return self.call.once((sae, source, latents), encode).to(self.x.device)

    def all_latents(self, sae: SAEModel, source: int = 0) -> Tensor:
        """Return all latents of one source, ``[B, S, n]``; encoded once per call."""

        def encode() -> Tensor:
            x = self.source(sae, source)
            return self.sae(sae, x.device).encode_source(x, source)

        return self.call.once((sae, source), encode).to(self.x.device)

    def written(self, sae: SAEModel, latents: Sequence[int], amounts: Tensor) -> Tensor:
        """Return the activation that amounts of latents write here, at the activation's scale.

        Args:
            sae: the SAE.
            latents: indices of the latents.
            amounts: ``[B, S, n]``, or ``[n]`` for the same amounts at every token.

        Returns:
            ``[B, S, d]``, or ``[d]``.
        """
        local = self.sae(sae)
        rows = local.rows_at(rows_of(local, latents), self.output)
        amounts = amounts.to(rows.dtype)
        written = (amounts.unsqueeze(-1) * rows).sum(0) if amounts.ndim == 1 else amounts @ rows
        scale = local.written_scale(self.x.to(local.dtype))
        return written if scale is None else written * scale

    def reconstruction(self, sae: SAEModel) -> Tensor:
        """Return an SAE's reconstruction of this site, ``[B, S, d]``."""
        own = min(self.output, len(sae.config.sites_read) - 1)
        x = self.source(sae, own).to(self.x.device)
        if sae.one_site and not self.call.is_computed((sae, own)):  # reconstructs without all latents in memory
            return self.sae(sae).reconstruct(x)
        latents = [self.all_latents(sae, source) for source in range(own + 1)]
        return self.sae(sae).decode_at(latents, self.output, x)


_MOST_CACHED = 256  # so that a sweep over single latents does not fill the memory
_ROWS: WeakKeyDictionary[SAEModel, dict[tuple[Any, ...], Tensor]] = WeakKeyDictionary()


def rows_of(sae: SAEModel, latents: Sequence[int]) -> Tensor:
    """Return the rows of latents on the SAE's device, cached per SAE, as checking would slow every decoding step."""
    known = _ROWS.setdefault(sae, {})
    key = (sae.b_dec.device, *latents)
    if key not in known:
        if len(known) >= _MOST_CACHED:
            known.clear()
        with torch.inference_mode(False):  # they serve later calls, which may need gradients
            known[key] = sae.latent_indices(latents)
    return known[key]
