"""Whether an SAE belongs where it is to be attached: what it explains of a short text there, and what it should.

An SAE at a wrong place of the right width computes something, and says nothing. So it is run once on a text, and what
comes out is compared with what was measured when it was published. Where it explains little, the places that its site
could be mistaken for are tried in one more forward. Only a place that fits, beside one that does not, is an error; an
SAE that fits nowhere may simply be young.
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
from ..functional.brief import brief
from ..functional.metrics import centred_norm
from ..hub.index import known_at
from ..interventions import Intervention
from ..interventions.base import sites_read, sites_written
from ..modeling import SAEModel
from ..modeling.saving import FACTS_FILE
from ..sites import Site, resolve
from ..sites.probe import quiet, unwrap
from .dispatch import paused
from .fit import Fit, activations, fit, siblings
from .probe_text import probe_tokens
from .token_batches import model_inputs

Check = bool | Tensor | Mapping[str, Any]
"""Whether to check; or token ids ``[B, S]``, or keyword arguments of a forward, on which to do it."""

DOUBTFUL = 0.5
"""The FVU from which other places are tried, where none is recorded."""
FITS = 0.7
"""A place fits below this FVU and that from which it would be in doubt itself, with half of that at the own site."""
OFF = {"l0": 5.0, "norm": 3.0}
"""How many times more or less than recorded is another thing; texts differ by less."""


class Expected(NamedTuple):
    """What was measured when the SAE was published; None for what is not known."""

    fvu: float | None = None
    l0: float | None = None
    norm: float | None = None

    @property
    def doubtful(self) -> float:
        """The FVU from which other places are tried."""
        return DOUBTFUL if self.fvu is None else max(2 * self.fvu, self.fvu + 0.15)


@dataclass(frozen=True)
class AttachCheck:
    """What was found when an SAE was attached.

    Attributes:
        sae: which SAE.
        site: where it writes.
        tokens: number of tokens that it was tried on; 0 if it was not.
        fvu: fraction of variance unexplained there; of the site that is worst off, where there are several.
        l0: mean number of non-zero latents per token.
        norm: root mean square of ``|x - mean x|`` of the activations.
        expected_fvu: what was measured when the SAE was published; None if that is not known.
        expected_l0: the same of `l0`.
        expected_norm: the same of `norm`.
        verdict: what follows, in a sentence.
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

    __repr__ = brief

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.sae} at {self.site}: {self.verdict}"


class _Found(NamedTuple):
    """A check, the error that it gives each time, and what is to be warned of once."""

    check: AttachCheck
    error: str | None = None
    warning: str | None = None


_Key = tuple[Any, ...]
_CACHE: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[SAEModel, tuple[_Key, _Found]]]
_CACHE = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def check_saes(model: nn.Module, interventions: Iterable[Intervention], check: Check) -> tuple[AttachCheck, ...]:
    """Check every SAE among interventions, each once; what was found on our own text is remembered.

    Args:
        model: the model as the user calls it.
        interventions: what is to be attached, at sites that exist and are as wide as their SAEs.
        check: whether to, or on what.

    Returns:
        What was found, SAE by SAE; nothing if there is to be no check.

    Raises:
        SiteError: if an SAE does not fit its site, but another one.
        InputError: if what an SAE makes of the text is not finite, or the given batch cannot be used.
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
        InputError: if there are no ids of tokens.
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
    """Return what changes when the SAE is another one than before: its sites and its weights."""
    tensors = [*sae.parameters(), *sae.buffers()]
    written = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
    return (tuple(sae.config.sites_read), tuple(sae.config.sites_written), sae.dtype, written)


def _measure(model: nn.Module, root: nn.Module, sae: SAEModel, given: Mapping[str, Any] | None) -> _Found:
    inputs = given if given is not None else _own_text(root)
    reason = inputs if isinstance(inputs, str) else _not_to_be_measured(sae, given)
    if isinstance(inputs, str) or reason:
        return _Found(_report(sae, None, Expected(), f"not measured: {reason}"))
    found = resolve(model)
    read, written = [*map(str, sites_read(sae))], [*map(str, sites_written(sae))]
    try:
        seen = activations(model, {name: found[name] for name in (*read, *written)}, inputs)
    except Exception as error:  # whatever the user's model needs that our text does not give it is no fault of the SAE
        if given is not None:
            raise
        why = f"the model does not run on plain text ({type(error).__name__}: {error}); pass check=batch"
        return _Found(_report(sae, None, Expected(), f"not measured: {why}"))
    measured = fit(sae, [seen[name] for name in read], [seen[name] for name in written])
    expected = _expected(sae)
    different = _differences(measured, expected)
    if not measured.fvu > expected.doubtful and not different:
        return _Found(_report(sae, measured, expected, "it fits"))
    most = min(FITS, measured.fvu / 2, expected.doubtful)
    better = _better(model, root, sae, inputs, most) if sae.one_site else None
    about = _about(model, sae, measured, expected)
    if better is not None:
        return _Found(
            _report(sae, measured, expected, "it belongs elsewhere"), error=f"{about} {_advice(sae, better)}"
        )
    if not different:
        return _Found(_report(sae, measured, expected, "it explains little, but no place near it fits better"))
    advice = (
        "No place near it fits better: is this the model that the SAE was made for, and is the text of the kind? Pass "
        "check=batch to try it on another text, or check=False to leave this out."
    )
    return _Found(
        _report(sae, measured, expected, "it is not as recorded, and no place near it fits better"),
        warning=f"{about} {advice}",
    )


def _own_text(root: nn.Module) -> dict[str, Any] | str:
    """Return our own text as keyword arguments, or why it cannot be had."""
    tokens = probe_tokens(root)
    return f"{tokens}; pass check=batch" if isinstance(tokens, str) else {"input_ids": tokens}


def _not_to_be_measured(sae: SAEModel, given: Mapping[str, Any] | None) -> str:
    """Return why an SAE cannot be tried, empty if it can."""
    held = sae.config.kept_latents
    if held is not None:
        return f"{len(held)} of {sae.config.d_sae} latents are loaded, which do not make up a reconstruction"
    if given is None and distributed.is_available() and distributed.is_initialized():
        return "several processes run this model; pass check=batch in all of them"
    return ""


def _expected(sae: SAEModel) -> Expected:
    """Return what is known of an SAE: from its configuration, the facts saved beside it, or the index."""
    config, origin = sae.config, sae.checkpoint
    known = Expected(config.recorded_fvu, config.recorded_l0, config.recorded_norm)
    if origin is None or None not in known:
        return known
    facts: dict[str, float | None] = {}
    file = origin.folder / FACTS_FILE if origin.folder is not None else None
    if file is not None and file.is_file():
        facts = _metrics(file.read_text(encoding="utf-8"))
    elif origin.format != "native" and (listed := known_at(origin.repo, origin.subfolder)) is not None:
        facts = {"l0": listed.l0}
    return Expected(*(_either(own, facts.get(name)) for name, own in zip(Expected._fields, known, strict=True)))


def _either(first: float | None, second: float | None) -> float | None:
    return second if first is None else first


def _metrics(text: str) -> dict[str, float | None]:
    """Return the numbers of a file of facts that are numbers; the file may be anybody's."""
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


def _differences(measured: Fit, expected: Expected) -> list[str]:
    """Return which numbers are far from what was recorded."""
    far = []
    for name, most in OFF.items():
        value, recorded = getattr(measured, name), getattr(expected, name)
        if recorded and not math.isnan(value) and not 1 / most < value / recorded < most:
            far.append(name)
    worse = expected.fvu is not None and measured.fvu > max(3 * expected.fvu, expected.fvu + 0.3)
    return ["fvu", *far] if worse else far


def _better(
    model: nn.Module, root: nn.Module, sae: SAEModel, inputs: Mapping[str, Any], most: float
) -> tuple[str, str, Fit] | None:
    """Return the place near an SAE's own that it fits best, as the sites to read and to write; None if it fits none.

    Args:
        model: the model as the user calls it.
        root: the model without wrappers.
        sae: the SAE, which reads and writes one site.
        inputs: keyword arguments of a forward.
        most: the FVU with which it fits.
    """
    found = resolve(model)
    [reads], [writes] = sites_read(sae), sites_written(sae)
    near = siblings(found, root, reads, sae.config.d_in)
    near_output = siblings(found, root, writes, sae.d_out)
    slots = {str(site): found[site] for site in (reads, writes)}
    seen = activations(model, slots | near | near_output, inputs)
    moved = [(name, str(writes)) for name in near], [(str(reads), name) for name in near_output]
    if sae.config.is_transcoder:
        stages = [[*moved[0], *moved[1]]]
    else:  # perhaps a transcoder, of which one site only was stated
        stages = [[(name, name) for name in near]]
        stages += [[*moved[0], *moved[1]]] if sae.config.normalization == "none" else []
    for pairs in stages:
        fits = [(*pair, fit(sae, [seen[pair[0]]], [seen[pair[1]]])) for pair in pairs]
        fitting = [each for each in fits if each[2].fvu < most]
        least = min((each[2].fvu for each in fitting), default=0.0)
        equal = [each for each in fitting if each[2].fvu <= 1.02 * least]  # one tensor may have several names
        if equal:
            alike = (each for each in equal if Site.parse(each[0]).name == reads.name)
            return next(alike, equal[0])
    return None


def _advice(sae: SAEModel, better: tuple[str, str, Fit]) -> str:
    """Say where an SAE fits, and what to do about it."""
    *place, measured = better
    change = {"site": place[0]} if place[0] != sae.config.site else {}
    if place[1] != (sae.config.site_out or place[0]):
        change["site_out"] = place[1]
    where = " to ".join(f"'{name}'{_what(Site.parse(name), sae)}" for name in dict.fromkeys(place))
    what = " and ".join(f"sae.config.{key} = {name!r}" for key, name in change.items())
    return (
        f"At {where} FVU is {measured.fvu:.3g}: did you mean that place? Set {what}, or pass check=False to attach it "
        "here all the same."
    )


def _what(site: Site, sae: SAEModel) -> str:
    """Return what tells a place apart from the SAE's own, with which it is easily confused."""
    [given] = sites_written(sae)
    if site.is_path and given.name.endswith("_out"):
        return ", before what the block does to it on its way into the residual stream, such as a post-norm,"
    if site.name.endswith("_out") and given.is_path:
        return ", what is added to the residual stream, after the post-norm if there is one,"
    return ""


def _about(model: nn.Module, sae: SAEModel, measured: Fit, expected: Expected) -> str:
    """Say what was measured, and what was expected."""
    pairs = zip(("FVU", "L0", "norm"), measured[1:], expected, strict=True)
    numbers = (
        f"{name} {value:.3g}" + ("" if recorded is None else f" (recorded: {recorded:.3g})")
        for name, value, recorded in pairs
    )
    name = getattr(getattr(unwrap(model)[0], "config", None), "name_or_path", "")
    base = sae.config.base_model
    other = f" It was made for {base!r}; this is {name!r}." if base and base != name else ""
    return f"{_name(sae)} does not fit {_place(sae)}: on {measured.tokens} tokens it has {', '.join(numbers)}.{other}"


def _name(sae: SAEModel) -> str:
    return type(sae).__name__ if sae.checkpoint is None else f"{type(sae).__name__} {sae.checkpoint}"


def _place(sae: SAEModel) -> str:
    """Return where an SAE is attached, in words."""
    read, written = _several(sae.config.sites_read), _several(sae.config.sites_written)
    return read if read == written else f"{read} to {written}"


def _several(sites: Sequence[str]) -> str:
    return sites[0] if len(sites) == 1 else f"{sites[0]} .. {sites[-1]}"


def _report(sae: SAEModel, measured: Fit | None, expected: Expected, verdict: str) -> AttachCheck:
    numbers: tuple[int, float | None, float | None, float | None] = measured or (0, None, None, None)
    return AttachCheck(_name(sae), _place(sae), *numbers, *expected, verdict=verdict)
