"""Check that an SAE belongs at its site, by comparing its fit to a short text there with what was recorded.

An SAE at a wrong site of the right width computes something, without any error. So it is run once on a text, at its
site and at those next to it, and the numbers are compared with those measured when it was published. If they differ
much, sites further away are tried in one more forward. A site that suits the SAE better is an error, or, if it is not
much better, a warning. It is not an error that an SAE explains little everywhere: it may be early in its training.
"""

from __future__ import annotations

import json
import math
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, distributed, nn

from ..errors import InputError, SiteError, shown
from ..functional.metrics import centred_norm
from ..functional.short_repr import short_repr
from ..hub.index import known_at
from ..interventions import Intervention
from ..interventions.base import sites_written
from ..modeling import SAEModel
from ..sites import Site, resolve
from ..sites.probe import quiet, unwrap
from ..storage.atomic_write import FACTS_FILE
from .alternative_sites import AlternativeSites, far_sites, near_sites
from .dispatch import paused
from .expected_fit import CERTAIN, ExpectedFit
from .probe_text import probe_tokens
from .site_fit import SiteFit
from .site_trial import BetterSite, SiteTrial
from .token_batches import model_inputs

Check = bool | Tensor | Mapping[str, Any]
"""Whether to check; or token ids ``[B, S]``, or keyword arguments of a forward, on which to do it."""


@dataclass(frozen=True)
class AttachCheck:
    """The result of checking an SAE when it is attached.

    Attributes:
        sae: the SAE's class and origin.
        site: the sites that it reads and writes.
        tokens: number of tokens that it was tried on; 0 if it was not tried.
        fvu: fraction of variance unexplained there; the highest, if it writes several sites.
        l0: mean number of non-zero latents per token.
        norm: root mean square of ``|x - mean x|`` of the activations.
        expected_fvu: the `fvu` measured when the SAE was published; None if unknown.
        expected_l0: the same for `l0`.
        expected_norm: the same for `norm`.
        verdict: the conclusion, in a sentence.
    """

    sae: str
    site: str
    tokens: int
    fvu: float | None
    l0: float | None
    norm: float | None
    expected_fvu: float | None
    expected_l0: float | None
    expected_norm: float | None
    verdict: str

    __repr__ = short_repr

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.sae} at {self.site}: {self.verdict}"


class _Found(NamedTuple):
    """A check, its error, which is raised each time, and its warning, which is given once."""

    check: AttachCheck
    error: str | None = None
    warning: str | None = None


_Key = tuple[Any, ...]
_CACHE: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[SAEModel, tuple[_Key, _Found]]]
_CACHE = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def check_saes(model: nn.Module, interventions: Iterable[Intervention], check: Check) -> tuple[AttachCheck, ...]:
    """Check every SAE among interventions once; results on the built-in text are cached.

    Args:
        model: the model as the user calls it.
        interventions: the interventions to attach, at sites that exist and are as wide as their SAEs.
        check: whether to check, or the batch to check on.

    Returns:
        The result for each SAE; empty if `check` is False.

    Raises:
        SiteError: if an SAE does not fit its site, but another one.
        InputError: if an SAE's output is not finite, or the given batch cannot be used.
    """
    if check is False:
        return ()
    given = None if check is True else _inputs(model, check)
    saes = {id(each.sae_used): each.sae_used for each in interventions if each.sae_used is not None}
    checks = []
    for sae in saes.values():
        found = _checked(model, sae, given)
        if found.error is not None:
            raise SiteError(found.error)
        if found.warning is not None:
            warnings.warn(found.warning, UserWarning, stacklevel=3)  # where attach() was called
        checks.append(found.check)
    return tuple(checks)


def _inputs(model: nn.Module, check: Check) -> dict[str, Any]:
    """Return a given batch as keyword arguments, on the model's device.

    Raises:
        InputError: if there are no token ids.
        ShapeError: if they are not a batch of sequences.
    """
    if not isinstance(check, (Tensor, Mapping)):
        raise InputError(
            f"attach() was given check={shown(check)}; expected True, False, or a batch of tokens: ids [B, S], or "
            "what the tokenizer returns with return_tensors='pt'."
        )
    return model_inputs(unwrap(model)[0], check)


def _checked(model: nn.Module, sae: SAEModel, given: Mapping[str, Any] | None) -> _Found:
    """Check one SAE, unless that was done before."""
    root, _ = unwrap(model)
    with _LOCK:
        known = _CACHE.setdefault(root, weakref.WeakKeyDictionary())
        now = _key(sae)
        before, found = known.get(sae, (None, None))
        if found is not None and before == now and given is None:
            return found
        with paused(), quiet(sae):
            found = _measure(model, root, sae, given)
        if given is None:
            known[sae] = (now, found._replace(warning=None))
        return found


def _key(sae: SAEModel) -> _Key:
    """Return a key that changes with the SAE's sites and weights."""
    tensors = [*sae.parameters(), *sae.buffers()]
    written = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
    return (tuple(sae.config.sites_read), tuple(sae.config.sites_written), sae.dtype, written)


def _measure(model: nn.Module, root: nn.Module, sae: SAEModel, given: Mapping[str, Any] | None) -> _Found:
    inputs = given if given is not None else _own_text(root)
    reason = inputs if isinstance(inputs, str) else _not_to_be_measured(sae, given)
    if isinstance(inputs, str) or reason:
        return _Found(_report(sae, None, ExpectedFit(), f"not measured: {reason}"))
    found = resolve(model)
    near = near_sites(found, sae) if sae.one_site else AlternativeSites({}, [])
    expected = _expected(sae)
    try:
        trial = SiteTrial(model, sae, expected, inputs, near)
    except Exception as error:  # the model may need more than plain text, which is no fault of the SAE
        if given is not None:
            raise
        why = f"the model does not run on plain text ({type(error).__name__}: {error}); pass check=batch"
        return _Found(_report(sae, None, ExpectedFit(), f"not measured: {why}"))
    trial.measure()
    better = trial.better()
    if better is None and trial.in_doubt and sae.one_site:
        better = SiteTrial(model, sae, expected, inputs, far_sites(found, root, sae)).better()
    return _judged(model, trial, better)


def _judged(model: nn.Module, trial: SiteTrial, better: BetterSite | None) -> _Found:
    """Return the conclusion from the measurements."""
    sae, expected, measured = trial.sae, trial.expected, trial.measure()
    if better is not None:
        certain = better.gap >= CERTAIN
        where = " to ".join(dict.fromkeys(better.sites))
        verdict = "it belongs elsewhere" if certain else f"it seems to belong to {where}"
        said = f"{_about(model, trial, 'does not fit' if certain else 'may not belong at')} {_advice(sae, better)}"
        check = _report(sae, measured, expected, verdict)
        return _Found(check, error=said) if certain else _Found(check, warning=said)
    if not trial.in_doubt:
        how = ", high-norm tokens counted as in its record" if trial.with_outliers else ""
        return _Found(_report(sae, measured, expected, f"it fits{how}"))
    if not trial.differences:
        return _Found(_report(sae, measured, expected, "it explains little, but no nearby site fits better"))
    advice = (
        "No nearby site fits better: is this the model for which the SAE was trained, and the kind of text? Pass "
        "check=batch to try it on another text, or check=False to skip this check."
    )
    return _Found(
        _report(sae, measured, expected, "it differs from its record, but no nearby site fits better"),
        warning=f"{_about(model, trial)} {advice}",
    )


def _own_text(root: nn.Module) -> dict[str, Any] | str:
    """Return the built-in text as keyword arguments, or the reason why it cannot be used."""
    tokens = probe_tokens(root)
    return f"{tokens}; pass check=batch" if isinstance(tokens, str) else {"input_ids": tokens}


def _not_to_be_measured(sae: SAEModel, given: Mapping[str, Any] | None) -> str:
    """Return the reason why an SAE cannot be measured; empty if it can."""
    held = sae.config.kept_latents
    if held is not None:
        return f"only {len(held)} of {sae.config.d_sae} latents are loaded, and a reconstruction needs all of them"
    if given is None and distributed.is_available() and distributed.is_initialized():
        return "several processes run this model; pass check=batch in all of them"
    return ""


def _expected(sae: SAEModel) -> ExpectedFit:
    """Return the recorded fit of an SAE from its configuration, the facts saved beside it, or the index."""
    config, origin = sae.config, sae.checkpoint
    known = ExpectedFit(config.recorded_fvu, config.recorded_l0, config.recorded_norm)
    if origin is None or None not in known:
        return known
    facts: dict[str, float | None] = {}
    file = origin.folder / FACTS_FILE if origin.folder is not None else None
    if file is not None and file.is_file():
        facts = _metrics(file.read_text(encoding="utf-8"))
    elif origin.format != "native" and (listed := known_at(origin.repo, origin.subfolder)) is not None:
        facts = {"l0": listed.l0}
    return ExpectedFit(*(_either(own, facts.get(name)) for name, own in zip(ExpectedFit._fields, known, strict=True)))


def _either(first: float | None, second: float | None) -> float | None:
    return second if first is None else first


def _metrics(text: str) -> dict[str, float | None]:
    """Return those metrics in a file of facts that are positive numbers; the file is not trusted."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    metrics = content.get("metrics") if isinstance(content, dict) else None
    named = metrics if isinstance(metrics, dict) else {}
    numbers: dict[str, float | None] = {
        name: float(value)
        for name in ("fvu", "l0", "mse")
        if isinstance(value := named.get(name), (int, float)) and math.isfinite(value) and value > 0
    }
    mse, fvu = numbers.pop("mse", None), numbers.get("fvu")
    return {**numbers, "norm": centred_norm(mse, fvu)} if mse and fvu else numbers


def _advice(sae: SAEModel, better: BetterSite) -> str:
    """Return a sentence on where an SAE fits better, and what to do about it."""
    place, measured = better.sites, better.measured
    change = {"site": place.read} if place.read != sae.config.site else {}
    if place.written != (sae.config.site_out or place.read):
        change["site_out"] = place.written
    where = " to ".join(f"'{name}'{_what(Site.parse(name), sae)}" for name in dict.fromkeys(place))
    what = " and ".join(f"sae.config.{key} = {name!r}" for key, name in change.items())
    return (
        f"At {where} FVU is {measured.fvu:.3g}, L0 {measured.l0:.3g} and norm {measured.norm:.3g}: did you mean that "
        f"site? Set {what}, or pass check=False to attach it here anyway."
    )


def _what(site: Site, sae: SAEModel) -> str:
    """Return how a site differs from the SAE's own, with which it is easily confused."""
    [given] = sites_written(sae)
    if site.is_path and given.name.endswith("_out"):
        return ", before the block changes it on its way into the residual stream, for example by a post-norm,"
    if site.name.endswith("_out") and given.is_path:
        return ", which is added to the residual stream, after the post-norm if there is one,"
    return ""


def _about(model: nn.Module, trial: SiteTrial, finding: str = "does not fit") -> str:
    """Return a sentence on what was measured and what was expected."""
    sae, measured = trial.sae, trial.measure()
    pairs = zip(("FVU", "L0", "norm"), measured[1:], trial.expected, strict=True)
    numbers = (
        f"{name} {value:.3g}" + ("" if recorded is None else f" (recorded: {recorded:.3g})")
        for name, value, recorded in pairs
    )
    name = getattr(getattr(unwrap(model)[0], "config", None), "name_or_path", "")
    base = sae.config.base_model
    other = f" It was made for {base!r}; this is {name!r}." if base and base != name else ""
    return f"{_name(sae)} {finding} {_place(sae)}: on {measured.tokens} tokens it has {', '.join(numbers)}.{other}"


def _name(sae: SAEModel) -> str:
    return type(sae).__name__ if sae.checkpoint is None else f"{type(sae).__name__} {sae.checkpoint}"


def _place(sae: SAEModel) -> str:
    """Return the sites at which an SAE is attached, in words."""
    read, written = _several(sae.config.sites_read), _several(sae.config.sites_written)
    return read if read == written else f"{read} to {written}"


def _several(sites: Sequence[str]) -> str:
    return sites[0] if len(sites) == 1 else f"{sites[0]} .. {sites[-1]}"


def _report(sae: SAEModel, measured: SiteFit | None, expected: ExpectedFit, verdict: str) -> AttachCheck:
    numbers: tuple[int, float | None, float | None, float | None] = measured or (0, None, None, None)
    return AttachCheck(_name(sae), _place(sae), *numbers, *expected, verdict=verdict)
