"""Measure an SAE's fit at its own site and at others, in one forward, and find the site that suits it best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import InputError
from ..interventions.base import sites_read, sites_written
from ..modeling import SAEModel
from ..sites import Site, resolve
from .alternative_sites import AlternativeSites, SitePair
from .expected_fit import ExpectedFit
from .site_fit import FEWEST, SiteFit, are_ordinary, fit, observe, tokens_of

MOST_LATENTS = 2**24
"""Other sites are tried on the first tokens of a batch, as many as have this many latents, zeros included."""
TOKENS = 64, 1024
"""Minimum and maximum number of these tokens."""
ALIKE = 0.02
"""Sites whose gaps differ by less suit an SAE equally well; one tensor may have several names."""


class BetterSite(NamedTuple):
    """A site that suits an SAE better than its own.

    Attributes:
        sites: where it reads and writes.
        gap: by how much, see `ExpectedFit.gap`.
        measured: the SAE's fit there.
    """

    sites: SitePair
    gap: float
    measured: SiteFit


class SiteTrial:
    """One forward, and an SAE's fit at its own and some other sites.

    Args:
        model: the model as the user calls it.
        sae: the SAE, with all of its latents.
        expected: its recorded fit.
        inputs: keyword arguments of a forward.
        others: the other sites.

    Raises:
        ShapeError: if one of the SAE's own sites does not have a vector for each token.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: SAEModel,
        expected: ExpectedFit,
        inputs: Mapping[str, Any],
        others: AlternativeSites,
    ) -> None:
        found = resolve(model)
        self.sae, self.expected, self._stages = sae, expected, others.stages
        self._read, self._written = [*map(str, sites_read(sae))], [*map(str, sites_written(sae))]
        own = {name: found[name] for name in (*self._read, *self._written)}
        self._seen = observe(model, own, others.slots, inputs, sae.config.special_token_ids)
        self._measured: SiteFit | None = None
        self.with_outliers = False

    def measure(self) -> SiteFit:
        """Return the SAE's fit at its own site.

        Outliers and special tokens are counted if its recorded norm shows that they were counted for the record.

        Raises:
            InputError: if there are too few tokens, or something is not finite.
        """
        if self._measured is None:
            here = self._values(self._read), self._values(self._written)
            self._ordinary, self._whole = tokens_of(self.sae, self._seen, *here)
            sets = [self._ordinary] if self._whole is None else [self._ordinary, self._whole]
            fits = fit(self.sae, *here, sets)
            if math.isinf(fits[0].fvu):
                raise InputError(
                    f"The SAE's output for these activations is not finite in {self.sae.dtype}: load it in float32, "
                    "or check its weights."
                )
            self.with_outliers = len(fits) > 1 and self.expected.with_outliers(fits[0], fits[1])
            self._measured = fits[self.with_outliers]
        return self._measured

    @property
    def in_doubt(self) -> bool:
        """Whether sites further away should be tried."""
        return self.expected.in_doubt(self.measure(), with_outliers=self.with_outliers)

    @property
    def differences(self) -> list[str]:
        """Names of the numbers that are further from the record than another text explains."""
        return self.expected.differences(self.measure(), with_outliers=self.with_outliers)

    def better(self) -> BetterSite | None:
        """Return the site that suits the SAE best, or None if none suits it better than its own."""
        self.measure()
        own = Site.parse(self._read[0]).name
        for stage in self._stages:
            found = self._better_of([pair for pair in stage if {*pair} <= {*self._seen.values}])
            best = max((each.gap for each in found), default=0.0)
            equal = [each for each in found if each.gap >= best - ALIKE]
            if equal:
                return next((each for each in equal if Site.parse(each.sites.read).name == own), equal[0])
        return None

    def _better_of(self, pairs: Sequence[SitePair]) -> list[BetterSite]:
        """Return the sites among `pairs` that suit the SAE better than its own."""
        sets = {pair: tokens for pair in pairs if (tokens := self._shared_tokens(pair)) is not None}
        if not sets:
            return []
        several = {tuple(each.nonzero().flatten().tolist()): each for each in sets.values()}
        own = fit(self.sae, self._values(self._read), self._values(self._written), list(several.values()))
        here = dict(zip(several, own, strict=True))
        found = []
        for pair, tokens in sets.items():
            there = fit(self.sae, self._values([pair.read]), self._values([pair.written]), [tokens])[0]
            own_fit = here[tuple(tokens.nonzero().flatten().tolist())]
            # Many transforms give all activations one norm, which equals the recorded one only by chance.
            without_norm = self.with_outliers or self._is_other_view(pair)
            gap = self.expected.gap(own_fit, there, without_norm=without_norm)
            if gap > 0:
                found.append(BetterSite(pair, gap, there))
        return found

    def _shared_tokens(self, pair: SitePair) -> Tensor | None:
        """Return the tokens on which a pair is compared with the SAE's own, ``[n]`` bool; None if it cannot be."""
        values = self._values(pair)
        tokens = self._ordinary
        if self.with_outliers:
            assert self._whole is not None
            tokens = self._whole
        else:
            for x in values:
                tokens = tokens & are_ordinary(x, ~self._seen.special)
        least, most = TOKENS
        tokens = tokens & (tokens.cumsum(0) <= min(max(MOST_LATENTS // self.sae.config.d_sae, least), most))
        finite = all(bool(x[tokens.to(x.device)].isfinite().all()) for x in values)
        return tokens if finite and int(tokens.sum()) >= FEWEST else None

    def _is_other_view(self, pair: SitePair) -> bool:
        """Whether a site is seen through other transforms than the SAE's own."""
        own = SitePair(self._read[0], self._written[0])
        return any(Site.parse(a).transforms != Site.parse(b).transforms for a, b in zip(own, pair, strict=True))

    def _values(self, names: Sequence[str]) -> list[Tensor]:
        return [self._seen.values[name] for name in names]
