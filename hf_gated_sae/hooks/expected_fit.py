"""Compare an SAE's fit to a text at a site with its record, and tell whether another site suits it better.

The distance of an SAE from its record at a site is one number, in natural logarithms:

    distance = log max(FVU / recorded FVU, 1) + 2 |log(norm / recorded norm)| + 1/4 |log(L0 / recorded L0)|

A text of another kind changes the FVU at all sites by the same factor and the norm little, so sites are compared by
the difference of their distances. The FVU alone does not distinguish the layers of a residual stream: an SAE may well
explain the layer before its own better, since the variance there is smaller. The norm distinguishes these layers.

The thresholds were chosen on the numbers below, so expect higher rates on other models. The numbers result from
applying the rule to stored FVU, L0 and norm of four kinds of text of 48 to 256 tokens, at every semantic site of the
SAE's width, without transforms; `tests/hooks/check_rates.py` counts what attach() does.

    model                            SAEs   sites   false alarms         misses
    bundled, 4 layers                  18      14    3 of 666, 0.5 %     509 of 21756, 2.3 %
    Llama of 5 layers, 0.26 M          11      10    1 of 407, 0.2 %     796 of 16502, 4.8 %

None of these false alarms was an error. Most misses are sites of one residual stream between which little is added,
such as `mlp_out.0` and `resid_post.0` where the embedding is small, and `resid_mid` beside `resid_pre`. An SAE that
was trained on little text, and whose record is of that text, explains other text much worse, so more of its wrong
sites pass: 9 of 96 for one such SAE.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .site_fit import SiteFit

GAP = 0.25
"""Another site suits an SAE better if its distance is less by this."""
CERTAIN = 0.5
"""With this gap it is an error, with less a warning."""
FEW = 64
"""With fewer tokens the gap has to be larger, in proportion to the noise of a mean."""
DOUBT = 0.45
"""From this distance on, sites are tried that are not next to the SAE's own."""
ASTRAY = 0.9
"""A site with a larger distance is not the SAE's own, unless it explains more."""
WEIGHTS = {"norm": 2.0, "l0": 0.25}
"""Weights of the terms of the distance; that of the FVU is 1."""
LEAST_FVU = 0.01
"""All FVUs below this count as equal."""
FITS = 0.7
"""A site suits an SAE only with an FVU below this: where it explains little, one site is as good as another."""
DOUBTFUL = 0.5
"""Without a recorded FVU, other sites are tried if the FVU is above this.

One of them then fits if its FVU is below this, and below half of that at the SAE's own site.
"""
OFF = {"l0": 5.0, "norm": 3.0}
"""Factors above or below the record that no other text explains."""
EVIDENT = 1.5
"""Outliers must make the norm this many times larger for the record to show whether it includes them."""
ROWS = 10.0
"""The factor in `OFF` for a norm that includes high-norm tokens, whose share depends on the length of the rows."""


class ExpectedFit(NamedTuple):
    """What was measured when the SAE was published; None for what is not known."""

    fvu: float | None = None
    l0: float | None = None
    norm: float | None = None

    def with_outliers(self, ordinary: SiteFit, whole: SiteFit) -> bool:
        """Whether outliers change the norm much, and the recorded norm is nearer to the one with them."""
        if not self.norm or not ordinary.norm > 0 or not whole.norm > EVIDENT * ordinary.norm:
            return False
        return abs(math.log(whole.norm / self.norm)) < abs(math.log(ordinary.norm / self.norm))

    def distance(self, seen: SiteFit, *, without_norm: bool = False) -> float:
        """Return the distance of a measured fit from the record; without a recorded FVU, the log of the measured one.

        Args:
            seen: the measured fit.
            without_norm: leave out the norm if it says nothing about the site: if a transform sets it, or if it is
                due to high-norm tokens, whose share depends on the length of the text.
        """
        fvu = math.log(max(seen.fvu, LEAST_FVU))
        if self.fvu is None:
            return fvu
        distance = max(fvu - math.log(max(self.fvu, LEAST_FVU)), 0.0)
        for name, weight in WEIGHTS.items():
            value, recorded = getattr(seen, name), getattr(self, name)
            if recorded and not math.isnan(value) and not (without_norm and name == "norm"):
                distance += weight * abs(math.log(max(value, recorded / 1e6) / recorded))
        return distance

    def differences(self, seen: SiteFit, *, with_outliers: bool = False) -> list[str]:
        """Return the names of the numbers that are further from the record than another text explains."""
        far = []
        for name, most in OFF.items():
            value, recorded = getattr(seen, name), getattr(self, name)
            most = ROWS if with_outliers and name == "norm" else most
            if recorded and not math.isnan(value) and not 1 / most < value / recorded < most:
                far.append(name)
        worse = self.fvu is not None and seen.fvu > max(3 * self.fvu, self.fvu + 0.3)
        return ["fvu", *far] if worse else far

    def in_doubt(self, seen: SiteFit, *, with_outliers: bool = False) -> bool:
        """Whether sites further away should be tried."""
        distant = seen.fvu > DOUBTFUL
        if self.fvu is not None:
            distant = self.distance(seen, without_norm=with_outliers) > DOUBT
        return distant or bool(self.differences(seen, with_outliers=with_outliers))

    def gap(self, here: SiteFit, there: SiteFit, *, without_norm: bool = False) -> float:
        """Return by how much another site suits the SAE better than its own, on the same tokens; 0 if it does not.

        Without a recorded FVU only a large difference between the sites counts.

        Args:
            here: the measured fit at its own site.
            there: the measured fit at the other.
            without_norm: leave out the norm, as in `distance`.
        """
        if not there.fvu < FITS or math.isnan(here.fvu):
            return 0.0
        if self.fvu is None:
            doubt = self.in_doubt(here, with_outliers=without_norm)
            enough = doubt and there.fvu < min(DOUBTFUL, here.fvu / 2)
            return math.log(here.fvu / max(there.fvu, LEAST_FVU)) if enough else 0.0
        distance = self.distance(there, without_norm=without_norm)
        explains_more = math.log(max(here.fvu, LEAST_FVU) / max(there.fvu, LEAST_FVU)) > GAP
        if not explains_more and distance > ASTRAY:
            return 0.0
        gap = self.distance(here, without_norm=without_norm) - distance
        return gap if gap > GAP * math.sqrt(max(FEW / here.tokens, 1.0)) else 0.0
