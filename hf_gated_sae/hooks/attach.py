"""`attach`: apply interventions while a model runs."""

from __future__ import annotations

import copy
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import AttachError, InputError
from ..functional.short_repr import few_lines
from ..interventions import Edit, Intervention, Replacement
from ..interventions.splice import Splice
from ..modeling import SAEModel
from ..sites import Site, Slot
from ..sites.multi_rank import absent, tensor_ranks
from ..sites.probe import unwrap
from ..sites.slots import TensorPath
from ..sites.transforms import Transform
from ..upstream.torch_private import is_compiled
from .attach_report import AttachReport, Record
from .dispatch import enter, leave, prove
from .eager import run_eagerly
from .session import Session
from .site_check import AttachCheck, Check, check_saes


class Attachment(Session):
    """Interventions that act on a model between `enable` and `disable`, or inside a ``with`` block.

    Args:
        model: the causal LM; only a weak reference is kept.
        interventions: what to do.
        slots: the proven slot of each site that they write or read, by name.
        all_threads: whether calls from all threads are edited.
        checks: the result of checking each SAE.
    """

    def __init__(
        self,
        model: nn.Module,
        interventions: tuple[Intervention, ...],
        slots: Mapping[str, Slot],
        *,
        all_threads: bool = False,
        checks: tuple[AttachCheck, ...] = (),
    ) -> None:
        super().__init__(all_threads=all_threads)
        self.interventions = interventions
        self.checks = checks
        self._model = weakref.ref(unwrap(model)[0])
        self._slots = {slot.tensor_path.bare: slot.bare for slot in slots.values()}
        self._records: list[Record] = []
        at: dict[TensorPath, list[Record]] = {place: [] for place in self._slots}
        read: dict[TensorPath, list[tuple[Site, tuple[Transform, ...]]]] = {place: [] for place in self._slots}
        for intervention in interventions:
            for output, site in enumerate(intervention.sites):
                place = slots[str(site)].tensor_path
                self._records.append(Record(intervention, output, place.transforms))
                at[place.bare].append(self._records[-1])
            for site in intervention.reads:
                place = slots[str(site)].tensor_path
                read[place.bare].append((site, place.transforms))
        self.records, self.reads = at, read
        self._saes: dict[tuple[int, torch.device], SAEModel] = {}
        self._before: tuple[int, int, list[int]] = (0, 0, [])
        self._compile_again: Callable[[], object] = lambda: None

    # ------------------------------------------------------------------ for users

    def enable(self) -> Attachment:
        """Attach; every forward and generate of the model from this thread is now edited.

        Raises:
            AttachError: if it is attached already, or the model no longer exists.
            InputError: if another attachment replaces the same site.
        """
        model = self._model()
        if model is None:
            raise AttachError("The model that was given to attach() no longer exists; attach() to another one.")
        enter(model, self, self._slots.values())
        try:
            self._compile_again = run_eagerly(model)
        except BaseException:
            self._detach()
            raise
        self.passed_by = False
        self._before = (self.completed, self.generations, [record.calls for record in self._records])
        return self

    def disable(self) -> None:
        """Detach, which removes all hooks; do nothing if not attached.

        While an exception propagates or is handled, as in ``finally:`` or ``except:``, it only detaches, so that an
        error of its own never replaces that exception.

        Raises:
            AttachError: if the end of a ``with`` block would raise it.
        """
        was_enabled = self.enabled
        self._detach()
        if was_enabled and sys.exc_info()[0] is None:
            self._require_effect()

    @property
    def enabled(self) -> bool:
        """Whether the interventions act on the model now."""
        return self.active

    def __repr__(self) -> str:
        """Name the interventions, and say whether they act."""
        state = "acting" if self.enabled else "not acting"
        where = Counter(f"{type(each).__name__} at {', '.join(map(str, each.sites))}" for each in self.interventions)
        shown = (name if count == 1 else f"{name} ({count} times)" for name, count in where.items())
        return few_lines([f"Attachment, {state}: {'; '.join(shown)}"])

    def report(self) -> AttachReport:
        """Return which sites were reached, and which tokens of which rows were edited, since `attach`."""
        return AttachReport([record.report() for record in self._records])

    def __enter__(self) -> Attachment:
        """Attach."""
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach.

        Raises:
            AttachError: if the model ran but never reached a site, so that an intervention had no effect; if no token
                was at a given position; or if NaN, infinite numbers or numbers beyond the range of the model's dtype
                were put in.
        """
        was_enabled = self.enabled  # if not, disable() has raised these errors
        self._detach()
        if was_enabled and kind is None:
            self._require_effect()

    def _detach(self) -> None:
        """Remove all hooks from the model, without any check."""
        model = self._model() if self.enabled else None
        if model is not None:
            leave(model, self, self._slots.values())
        self._compile_again()
        self.active = False
        self._saes.clear()

    def _require_effect(self) -> None:
        """Raise if the model ran since `enable` and an intervention did not act as intended."""
        completed, generations, calls = self._before
        model = self._model()
        if model is not None and self.completed > completed:
            self._require_on_all_ranks(model)
        if self.failure is not None:
            raise AttachError(
                f"A call of the attached model failed in another thread, where perhaps only a log shows it: "
                f"{self.failure}"
            ) from self.failure
        for record in self._records:
            record.require_sound()
        idle = {record.site for record, before in zip(self._records, calls, strict=True) if record.calls == before}
        if idle and self.completed > completed:
            raise AttachError(
                f"The model ran, but never reached {', '.join(sorted(map(str, idle)))}, so interventions there had no "
                "effect. Compiled and fused forwards skip hooks: run the model uncompiled, or choose another site."
            )
        if idle and self.passed_by:
            raise AttachError(
                "The model was called from another thread or task than the one that attached, where calls are not "
                "edited: call it from the same one, or use attach(..., all_threads=True), which streamers need."
            )
        if self.generations > generations:
            for record in self._records:
                record.require_reach()

    def _require_on_all_ranks(self, model: nn.Module) -> None:
        """Raise if ranks that hold parts of the same model ran it without these interventions."""
        ranks = tensor_ranks(model)
        missing = absent(ranks, f"attach/{sorted(map(str, self._slots))}")
        if missing:
            raise AttachError(
                f"Ranks {missing} of {list(ranks)} ran without these interventions, so the ranks computed with "
                "different activations: attach the same interventions on every rank."
            )

    # ------------------------------------------------------------------ for the back-ends

    @property
    def slots(self) -> list[Slot]:
        """The sites that are written or read, each once, in the order in which the model runs through them."""
        return sorted(self._slots.values(), key=lambda slot: slot.order)

    def placed(self, sae: SAEModel, device: torch.device) -> SAEModel:
        """Return an SAE on a device, moved there once per attachment."""
        if sae.b_dec.device == device:
            return sae
        key = (id(sae), device)
        if key not in self._saes:
            with torch.inference_mode(False):  # the copies serve later calls, which may need gradients
                self._saes[key] = copy.deepcopy(sae).to(device)
        return self._saes[key]


def attach(model: Any, *interventions: Intervention, all_threads: bool = False, check: Check = True) -> Attachment:
    """Prepare interventions for a model; they act inside ``with attach(...)``, or between `enable` and `disable`.

    They act on calls from the thread, or asyncio task, that enters the block or calls `enable`, and on tasks begun
    there. Several interventions on one site all read the clean activation, and what they add is summed. The model's
    parameters, its configuration and other hooks are not touched, and the SAEs do not become part of it. A copy, a
    pickle or a checkpoint of an attached model has nothing attached. An SAE that is on another device than its site is
    copied there whole once per attachment, so that training through the attached model would train the copy: move the
    SAE there first. With gradient checkpointing, call ``backward()`` inside the block: it runs the layers again. Where
    several ranks hold parts of the model, attach on every rank in the same way. While interventions act, compiled
    functions of the whole process run as plain Python, since compiled code would skip the hooks; so does attention
    that a model compiles by itself.

    Args:
        model: any Hugging Face causal LM, as the user calls it.
        interventions: what to do, such as ``Splice(sae)`` or ``Ablate(sae, [123])``.
        all_threads: act on calls from every thread, which `generate` with a streamer needs.
        check: run each SAE on a short text, and compare FVU, L0 and norm with what was measured when it was
            published. True uses a built-in text, once per SAE and model, if the model's tokenizer is on this machine;
            or give a batch: ids ``[B, S]``, or what a tokenizer returns. False skips the check. The results are in the
            attachment's `checks`.

    Returns:
        A context manager, which also reports what was edited.

    Raises:
        InputError: if nothing, or something that is not an intervention, is given, or two replace the same site, or
            write one tensor under two names.
        SiteError: if a site does not exist in this model or could not be proven, or an SAE does not fit its site but
            another one, which is named.
        ShapeError: if an SAE, direction or value is not as wide as the site.
        AttachError: if the model is compiled.
    """
    require_model("attach()", model)
    slots = prove(model, sites_of(interventions))
    require_fit(interventions, slots)
    checks = check_saes(model, interventions, check)
    return Attachment(model, interventions, slots, all_threads=all_threads, checks=checks)


def sites_of(interventions: Sequence[Intervention]) -> list[str]:
    """Return the names of all sites that interventions write or read.

    Raises:
        InputError: if there are none, or something that is not an intervention.
    """
    if not interventions:
        raise InputError("attach() was given no interventions; pass at least one, such as Splice(sae).")
    for intervention in interventions:
        if not isinstance(intervention, (Edit, Replacement)):
            raise InputError(
                f"attach() was given {type(intervention).__name__}; expected interventions such as Splice(sae) or "
                "Ablate(sae, [123])."
            )
    written = [str(site) for intervention in interventions for site in intervention.sites]
    return [*written, *(str(site) for intervention in interventions for site in intervention.reads)]


def require_fit(interventions: Sequence[Intervention], slots: Mapping[str, Slot]) -> None:
    """Raise unless interventions fit their sites and each other.

    Raises:
        InputError: if two replace the same site, two name the same tensor differently, or a site is needed before the
            model computes it.
        ShapeError: if an SAE, direction or value is not as wide as the site.
    """
    replaced: dict[Hashable, Intervention] = {}
    held: dict[Hashable, tuple[Intervention, Slot]] = {}
    for intervention in interventions:
        _require_order(intervention, slots)
        for site in intervention.sites:
            slot = slots[str(site)]
            intervention.require_width(slot.width)
            for name in _names_of_tensor(slot):
                other = replaced.setdefault(name, intervention) if intervention.replaces else intervention
                if other is not intervention:
                    raise InputError(
                        f"Both {type(other).__name__} and {type(intervention).__name__} replace {site}; "
                        "attach only one of them."
                    )
                _require_one_name(held.setdefault(name, (intervention, slot)), (intervention, slot))
    _require_splice_of_crosscoders(interventions)


def _require_one_name(first: tuple[Intervention, Slot], second: tuple[Intervention, Slot]) -> None:
    """Raise if two interventions would act on one tensor one after the other.

    The second would then read what the first wrote, not the clean activation. Names that differ only in transforms are
    one site, where both read the clean activation.

    Raises:
        InputError: naming both.
    """
    (other, there), (intervention, here) = first, second
    if other is not intervention and there.tensor_path.bare != here.tensor_path.bare:
        raise InputError(
            f"{type(other).__name__} at {there.site} and {type(intervention).__name__} at {here.site} write one "
            "tensor under two names, so the second would not read the clean activation: name the same site in both, "
            "or nest two attach() blocks to apply them one after the other."
        )


def _names_of_tensor(slot: Slot) -> list[Hashable]:
    """Return keys of a slot's tensor: its path, and its step in the residual stream; slots of one tensor share one."""
    place, site = slot.tensor_path, slot.site
    names: list[Hashable] = [(place.path, place.port, place.keys)]
    if site.name in ("resid_pre", "resid_post") and site.layer is not None:
        names.append(site.layer + (site.name == "resid_post"))
    return names


def _require_order(intervention: Intervention, slots: Mapping[str, Slot]) -> None:
    """Raise unless the model computes every site that is read before the site where it is needed.

    Raises:
        ShapeError: if a site that is read has another width.
        InputError: otherwise.
    """
    for number, site in enumerate(intervention.reads):
        slot = slots[str(site)]
        intervention.require_read_width(slot.width)
        needed = slots[str(intervention.sites[min(number, len(intervention.sites) - 1)])]
        if slot.order > needed.order:
            base_model = None if intervention.sae_used is None else intervention.sae_used.config.base_model
            raise InputError(
                f"{type(intervention).__name__} reads {site} to write {needed.site}, but this model computes "
                f"{needed.site} first: the SAE (base model {base_model!r}) does not fit this model."
            )


def _require_splice_of_crosscoders(interventions: Sequence[Intervention]) -> None:
    """Raise if latents of a crosscoder are edited without a splice of the same SAE.

    What is added at one site of a residual stream also reaches the next one, where it would be added again. A splice
    replaces each site by the reconstruction, to which a latent contributes once.

    Raises:
        InputError: naming the splice to attach as well.
    """
    whole = [
        each
        for each in interventions
        if isinstance(each, Splice) and not each.error and isinstance(each.positions, str) and each.rows is None
    ]
    spliced = {each.sae: each.special_tokens for each in whole if each.positions == "all"}
    for each in interventions:
        sae = each.sae_used
        crosses = sae is not None and len(each.sites) > 1 and not sae.config.is_transcoder
        covered = sae in spliced and (spliced[sae] or not each.special_tokens)
        if crosses and isinstance(each, Edit) and not covered:
            raise InputError(
                f"{type(each).__name__} was given a crosscoder, whose latents write several sites of one residual "
                "stream: what is added at one would be counted again at the next. Attach Splice of the same SAE with "
                "it, at all positions and rows."
            )


def require_model(caller: str, model: Any) -> None:
    """Raise unless `model` can be hooked.

    Raises:
        InputError: if it is not a module.
        AttachError: if it is compiled.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"{caller} was given {type(model).__name__} as the model; expected a transformers model.")
    if any(map(_is_compiled, model.modules())):
        raise AttachError(
            f"{caller} was given a compiled model, and compiled code skips hooks that are added later: pass the "
            "uncompiled model (model._orig_mod), and call that one."
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module, its call or its `forward` went through torch.compile."""
    forward = vars(module).get("forward")
    return "_orig_mod" in module._modules or is_compiled(module) or hasattr(forward, "_torchdynamo_orig_callable")
