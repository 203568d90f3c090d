"""`edit`: interventions as a stored edit of an nnsight model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ...errors import AttachError, InputError
from ...interventions import Intervention
from ...sites import Slot
from ...sites.probe import unwrap
from ...sites.slots import TensorPath
from ...sites.transforms import view
from ...upstream.nnsight_private import counts_rows
from ..apply import apply_interventions
from ..attach import Attachment, attach, require_fit, sites_of
from ..attach_report import AttachReport
from ..continuation import facts_of
from ..dispatch import is_attached, prove
from ..generation import generating, has_beams, is_guided
from ..site_check import Check
from ..token_tracker import TokenTracker


class _Carrier:
    """Applies interventions in the forwards of one run, as a block of a trace.

    nnsight runs a block beside the model and passes it the values that it waits for, in the order in which the model
    computes them. Each value is edited by the same code as in the hooks.

    Args:
        lm: the envoy of the whole model.
        model: the causal LM in it, without wrappers.
        attachment: the proven interventions.
    """

    def __init__(self, lm: Any, model: nn.Module, attachment: Attachment) -> None:
        envoys = {id(envoy._module): envoy for envoy in lm.modules()}
        self.attachment = attachment
        self.root = envoys[id(model)]
        self._counts_rows = counts_rows(lm)
        self._tracker = TokenTracker(model, lambda: (attachment,), facts_of(model))
        self._stops: list[tuple[Slot, Any, Callable[..., Any]]] = [
            (
                slot,
                envoys[id(slot.module)],
                slot.hook(partial(self._act, slot.tensor_path), tokens=self._tracker.shape),
            )
            for slot in attachment.slots
        ]
        self._waiting: Slot | None = None
        self._ended_before = 0

    def __call__(self) -> None:
        """Apply the interventions in every forward of the run.

        Raises:
            AttachError: if a forward skipped a site, or hooks are attached to the model as well.
        """
        from nnsight.intervention.interleaver import Mediator, OutOfOrderError
        from nnsight.intervention.iterator import Iterations

        run = Mediator.current("edit").interleaver
        self._waiting = None
        try:
            beams, guided = self._asks_for(has_beams, run.batcher), self._asks_for(is_guided, run.batcher)
            with generating([self.root._module], None, self._rows(run.batcher), beams=beams, guided=guided):
                for _ in Iterations()[:]:
                    self._forward(run)
        except OutOfOrderError:  # the run is over: it has no further forward, or was stopped before a site
            if self._waiting is not None and self._ended(run) > self._ended_before:
                raise AttachError(
                    f"The model ran, but never reached {self._waiting.site}, so interventions there had no effect."
                ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as plain functions of torch operations, to be sent to another machine."""
        from .remote_source import as_sent, to_send  # here, because torch's recorder takes a second to import

        parameters = inspect.signature(type(self.root._module).forward).parameters.values()
        names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][1:]
        return as_sent(to_send(self.root, [envoy for _, envoy, _ in self._stops], names, self.attachment))

    def _forward(self, run: Any) -> None:
        """Go through one forward, from site to site."""
        args, kwargs = self.root.inputs
        self._ended_before = self._ended(run)
        model = self.root._module
        refuse_hooks(model)
        self._tracker.begin(model, args, kwargs)
        for slot, envoy, hook in self._stops:
            self._waiting = slot
            if slot.tensor_path.port == "input":
                new = hook(envoy._module, *envoy.inputs)
                if new is not None:
                    envoy.inputs = new
            else:
                new = hook(envoy._module, (), envoy.output)
                if new is not None:
                    envoy.output = new
        self._waiting = None
        self._tracker.end(model, (), self.root.output)

    def _ended(self, run: Any) -> int:
        """Return how many forwards have ended."""
        return int(run.counts.get(f"{self.root.path}.output", 0))

    def _rows(self, batcher: Any) -> int | None:
        """Return the number of rows of the run; None for models for which nnsight does not count them."""
        return batcher.total if self._counts_rows else None

    def _asks_for(self, what: Callable[..., bool], batcher: Any) -> bool:
        """Return whether the run is a generation for which `what` is true: `has_beams`, `is_guided`."""
        given = [batcher.kwargs, batcher.extra_kwargs, *(kwargs for _, kwargs in batcher.invokes)]
        return what(self.root._module, (), {name: value for each in given for name, value in each.items()})

    def _act(self, place: TensorPath, x: Tensor) -> Tensor | None:
        """Apply the interventions at one site."""
        call = self._tracker.current
        for site, transforms in self.attachment.reads.get(place, ()):
            call.see(site, view(x, transforms).value)
        return apply_interventions(
            x, call, self.attachment.records.get(place, ()), self.attachment.placed, replaying=False
        )


_CARRIERS: WeakKeyDictionary[Any, _Carrier] = WeakKeyDictionary()


def edit(lm: Any, *interventions: Intervention, proven_on: nn.Module | None = None, check: Check = True) -> Any:
    """Return a copy of an nnsight model in whose traces interventions act; the model itself stays unchanged.

    They act in every forward of ``trace`` and ``generate``, before the trace's own operations at the same site, with
    bitwise the results of `attach`; with several invokes, on the rows of all of them. In a generation, the prompt is
    the input of its first forward. The copy shares modules and weights, and can be edited again; called as a module,
    ``edited(ids)``, it does what the unedited model does, as always in nnsight.

    With ``trace(..., remote=True)`` nnsight sends source and tensors: for each site a function of torch operations,
    and the parts of each SAE that it needs. For edits of n latents of element-wise architectures these are n rows of
    the encoder and of the decoder, for `Splice` the whole SAE. The other machine needs torch and nnsight, not this
    package. It computes the edits on its CPU, in float32; nothing is reported back. Edits that depend on more than
    each token itself (``rows=``, masks, `Patch`, windows, resampling) are refused when they are sent.

    Args:
        lm: an nnsight model, such as ``TransformersModel(model, tokenizer=tokenizer)``.
        *interventions: what to do, such as ``Splice(sae)`` or ``Ablate(sae, [123])``.
        proven_on: if the weights of `lm` are only on the other machine, a local model of the same class and number of
            layers, such as a narrow one with random weights. Sites are proven on it; they must be as wide as the
            residual stream, and SAEs are not checked.
        check: see `attach`.

    Returns:
        The edited copy.

    Raises:
        InputError: if `lm` is not an nnsight model or has no weights yet; and whatever `attach` raises.
        AttachError: if a site is split over ranks; and, from the trace, if a forward skips a site, or hooks are
            attached to the model as well.
    """
    if proven_on is None:
        model = wrapped_model("edit()", lm)
        attachment = attach(model, *interventions, check=check)
    else:
        model = wrapped_model("edit()", lm, weights=False)
        slots = _moved(prove(proven_on, sites_of(interventions)), unwrap(proven_on)[0], unwrap(model)[0])
        require_fit(interventions, slots)
        attachment = Attachment(model, interventions, slots)
    for slot in attachment.slots:
        if slot.tensor_path.shards is not None:
            raise AttachError(f"{slot.site} is split over ranks: use attach() for tensor parallelism.")
    carrier = _Carrier(lm, unwrap(model)[0], attachment)
    with lm.edit() as (_, edited):
        carrier()
    _CARRIERS[edited] = carrier
    return edited


def report(edited: Any) -> AttachReport:
    """Return which sites were reached, and which tokens of which rows were edited, since `edit`.

    Args:
        edited: what `edit` returned.

    Raises:
        InputError: if it is something else.
        AttachError: as at the end of a block of `attach`, if no token was at a given position in any trace so far, or
            if NaN or infinite numbers were put in. A single trace does not raise this, since the next one may continue
            its sequence.
    """
    if edited not in _CARRIERS:
        raise InputError(f"report() was given a {type(edited).__name__}; expected a model that edit() returned.")
    attachment = _CARRIERS[edited].attachment
    for slot in attachment.slots:
        for record in attachment.records.get(slot.tensor_path, ()):
            record.require_sound()
    return attachment.report()


def _moved(slots: Mapping[str, Slot], small: nn.Module, large: nn.Module) -> dict[str, Slot]:
    """Return the slots of one model in another of the same class.

    Raises:
        InputError: if the classes differ, or a site is not as wide as the residual stream.
    """
    if type(small) is not type(large):
        raise InputError(
            f"proven_on is a {type(small).__name__}, and the model a {type(large).__name__}; expected the same class."
        )
    narrow, wide = (each.config.get_text_config().hidden_size for each in (small, large))  # type: ignore[union-attr,operator]  # of transformers
    moved = {}
    for name, slot in slots.items():
        if slot.width != narrow:
            raise InputError(
                f"{name} is {slot.width} wide in proven_on, not hidden_size = {narrow}; expected a site of that width."
            )
        moved[name] = Slot(slot.site, dataclasses.replace(slot.tensor_path, width=wide), large)
    return moved


def wrapped_model(caller: str, lm: Any, *, weights: bool = True) -> nn.Module:
    """Return the model in an nnsight model.

    Raises:
        InputError: if it is not an nnsight model, or one without weights.
    """
    from nnsight.intervention.envoy import Envoy

    if not isinstance(lm, Envoy):
        raise InputError(
            f"{caller} was given {type(lm).__name__}; expected an nnsight model, such as "
            "nnsight.TransformersModel(model, tokenizer=tokenizer). For a plain transformers model use attach()."
        )
    model = lm._module
    if weights and any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            f"{caller} was given a model without weights, on which no site can be proven: load it with dispatch=True, "
            "or, if it will run only on another machine, pass a small model of the same class as proven_on=."
        )
    return model


def refuse_hooks(model: nn.Module) -> None:
    """Raise if something is attached to a model by hooks.

    Raises:
        AttachError: since nnsight would see the activations before those hooks.
    """
    if is_attached(model):
        raise AttachError(
            "Something is attached to this model by attach(), and nnsight would see its activations without those "
            "edits: use one of the two at a time."
        )
