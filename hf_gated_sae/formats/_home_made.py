"""Load home-made checkpoints: tensors in no known layout, which the user describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError, shown
from ..hub.location import Location
from ..modeling import SAEConfig
from ..modeling.checkpoint import Checkpoint, Tensors, as_stored
from ..modeling.description import HOME_MADE, CheckpointDescription
from ..storage import TENSOR_FILES, StoredTensor
from ._folders import mapped_again
from ._home_made_content import Content, content_of, listed
from ._home_made_matching import WIDTHS, Parameter, SiteFit, fitted, is_ignored, parameters_of
from ._home_made_options import BIAS, options_of

MOST_FILES = 12


@dataclass(frozen=True)
class FittedContent:
    """Content that fits the user's description.

    Attributes:
        fit: the tensor of each parameter.
        config: the configuration.
        parameters: tensors of the architecture, by name.
    """

    fit: SiteFit
    config: SAEConfig
    parameters: Mapping[str, Parameter]


def open_home_made(location: Location, description: CheckpointDescription) -> Checkpoint:
    """Open a home-made SAE; only the headers of its file are read.

    Args:
        location: the file, or a folder in which exactly one file fits.
        description: the user's description.

    Raises:
        CheckpointError: if no file fits, or several do; the message lists the tensors of each, and what is missing.
    """
    files = [location.file] if location.file else tensor_files(location)
    if not files:
        raise CheckpointError(
            f"{location} has no tensor file; it has {location.listing()}. Expected one of "
            f"{', '.join(TENSOR_FILES)}: pass subfolder= if it is in a folder below."
        )
    found: dict[str, FittedContent] = {}
    faults: dict[str, CheckpointError] = {}
    for file in files[:MOST_FILES]:
        try:
            where = f"{file} of {location.at(location.subfolder)}"
            found[file] = fit_description(content_of(location.content(file), where), description, where)
        except CheckpointError as error:
            faults[file] = error
    if len(found) > 1:
        raise CheckpointError(
            f"Each of {', '.join(found)} of {location} could be the SAE: choose one, as part of subfolder=."
        )
    if not found:
        raise next(iter(faults.values())) if len(faults) == 1 else CheckpointError(" ".join(map(str, faults.values())))
    [(file, what)] = found.items()
    model_class = description.model_class
    stored = _stored(what, location.content(file), location, file)
    return Checkpoint(
        model_class,
        what.config,
        location.origin(HOME_MADE, [file]),
        stored,
        shared=model_class.shared_names(what.config),
        finish=partial(_with_zeros, zeros=what.fit.zeros) if what.fit.zeros else as_stored,
    )


def described_tensors(state_dict: Any, description: CheckpointDescription) -> tuple[SAEConfig, Tensors]:
    """Return configuration and tensors of an SAE from ``state_dict=`` and its description.

    Raises:
        CheckpointError: if it does not fit the description.
        InputError: if it is not a mapping of names to tensors.
    """
    if not isinstance(state_dict, Mapping):
        raise InputError(
            f"Given architecture= without a checkpoint, and state_dict= is {shown(state_dict)}; expected its tensors "
            "by name."
        )
    content = content_of(state_dict, "state_dict=")
    what = fit_description(content, description, "state_dict=")
    everything = {**content.tensors, **content.training}
    tensors: Tensors = {}
    for name, found in what.fit.found.items():
        tensor = everything[found.path]
        if not isinstance(tensor, Tensor):
            raise InputError(f"state_dict= holds {found.path} as a {type(tensor).__name__}; expected a torch.Tensor.")
        tensor = tensor.detach()
        shape = _shape(what, name)
        tensor = tensor.T.contiguous() if found.transposed else tensor.reshape(shape)
        twice = any(tensor.data_ptr() == other.data_ptr() for other in tensors.values())
        tensors[name] = tensor.clone() if twice else tensor
    return what.config, _with_zeros(tensors, what.fit.zeros)


def tensor_files(location: Location) -> list[str]:
    """Return the tensor files directly in a folder."""
    return [name for name in location.files if "/" not in name and name.endswith(tuple(TENSOR_FILES))]


def fit_description(content: Content, description: CheckpointDescription, where: str) -> FittedContent:
    """Return how content fits the user's description of it.

    Args:
        content: the content of the file.
        description: the user's description.
        where: the file, for messages.

    Raises:
        CheckpointError: listing everything that does not fit, the tensors, and how to name them.
    """
    skips = bool(description.options.get("skip_connection", False))
    parameters = parameters_of(description.architecture, skips)
    options, faults, used = options_of(description.model_class, description.options, content)
    widths = {name: width for name in WIDTHS if type(width := description.options.get(name)) is int}
    fit = best_fit(content, description, parameters, widths, used)
    if not fit.complete or faults:
        raise CheckpointError(_misfit_message(fit, faults, content, description, parameters, where))
    # A tied SAE has one matrix only, which gives one of the two widths.
    either = {"d_in": fit.widths.get("d_out"), "d_out": fit.widths.get("d_in")}
    options |= {**either, **fit.widths}
    moved = options.get("site_out") not in (None, options.get("site"))
    if moved or options["d_out"] != options["d_in"]:
        options.setdefault(BIAS, False)  # the decoder bias is at another site than the input
    return FittedContent(fit, description.model_class.config_class(**options), parameters)


def best_fit(
    content: Content,
    description: CheckpointDescription,
    parameters: Mapping[str, Parameter],
    widths: Mapping[str, int],
    used: set[str],
) -> SiteFit:
    """Return the one complete fit, or the nearest one with its faults.

    Args:
        content: the content of the file.
        description: the user's description.
        parameters: tensors of the architecture.
        widths: widths in the description.
        used: paths of tensors that are settings.
    """
    pinned = [name for name in description.names.values() if name is not None and name in content.tensors]
    roots = content.roots() or [""]
    fits = []
    for root in roots:
        if all(name.startswith(f"{root}.") or not root for name in pinned):
            fit = fitted(content, root, parameters, description.names, description.ignore, widths)
            fit.leftover = [path for path in fit.leftover if path not in used]
            fits.append(fit)
    fits = fits or [fitted(content, "", parameters, description.names, description.ignore, widths)]
    complete = _distinct([fit for fit in fits if fit.complete])
    if not complete:
        return min(fits, key=lambda fit: (fit.distance[0], -fit.distance[1]))
    best = complete[0]
    if len(complete) > 1:
        held = " and ".join(repr(fit.root) for fit in complete[:4])
        name, found = next(iter(complete[-1].found.items()))
        best.faults.append(
            f"{held} each hold one: name a tensor by its full path to choose, such as "
            f"names={{{parameters[name].stem!r}: {found.path!r}}}"
        )
        return best
    others = [fitted(content, root, parameters, {}) for root in roots if pinned]
    elsewhere = {found.path for other in others if other.complete for found in other.found.values()}
    inside = {*content.below(best.root).values(), *elsewhere, *used}
    best.leftover = [
        path for path in content.tensors if path not in inside and not is_ignored(path, path, description.ignore)
    ]
    best.leftover = [path for path in best.leftover if path not in {found.path for found in best.found.values()}]
    return best


def _distinct(fits: Sequence[SiteFit]) -> list[SiteFit]:
    """Return one fit for each set of tensors."""
    by_tensors = {frozenset(found.path for found in fit.found.values()): fit for fit in reversed(fits)}
    return list(reversed(by_tensors.values()))


def _misfit_message(
    fit: SiteFit,
    faults: Sequence[str],
    content: Content,
    description: CheckpointDescription,
    parameters: Mapping[str, Parameter],
    where: str,
) -> str:
    """Return the message for content that does not fit: all faults, the tensors, those expected, and what to do."""
    stated = [*faults, *fit.faults]
    advice = []
    if fit.missing:
        stated.append(f"no tensor is known to be {', '.join(map(str, fit.missing))}")
        vector = next((each.stem for each in fit.missing if not each.is_matrix), None)
        none = f" (None instead of a name if there is none: {vector} is then zero)" if vector else ""
        advice.append(f"name it, names={{{fit.missing[0].stem!r}: ...}}{none}")
    if fit.leftover:
        stated.append(f"{listed({path: content.tensors[path] for path in fit.leftover})} would be left over")
        advice.append(f"ignore tensors that encoding does not need, ignore={fit.leftover[:4]!r}")
    expected = ", ".join(str(parameter) for parameter in parameters.values() if not parameter.optional)
    what = f" To continue: {'; '.join(advice)}." if advice else ""
    return (
        f"{where} does not fit architecture {description.architecture!r}: {'; '.join(stated)}. It holds "
        f"{listed(content.tensors)}; expected {expected}.{what}"
    )


def _shape(what: FittedContent, name: str) -> tuple[int, ...]:
    """Return the shape of a parameter."""
    return tuple(what.fit.widths[side] for side in what.parameters[name].sides)


def _stored(what: FittedContent, held: Mapping[str, Any], location: Location, file: str) -> dict[str, StoredTensor]:
    """Return the stored tensors by parameter name, in the parameters' orientation."""
    content = content_of(held, file)
    everything = {**content.tensors, **content.training}
    stored: dict[str, StoredTensor] = {}
    paths: set[str] = set()
    for name, found in what.fit.found.items():
        tensor: StoredTensor = everything[found.path]
        if found.path in paths:
            tensor = mapped_again(tensor, location, file)
        paths.add(found.path)
        if len(tensor.shape) != len(what.parameters[name].sides):  # axes of length 1
            tensor = replace(tensor, stored_shape=_shape(what, name), transposed=False)
        stored[name] = tensor.T if found.transposed else tensor
    return stored


def _with_zeros(tensors: Tensors, zeros: Sequence[Parameter]) -> Tensors:
    """Add zeros for the vectors that a checkpoint does not have."""
    W_dec = tensors["W_dec"]
    widths = {"d_sae": W_dec.shape[0], "d_out": W_dec.shape[1], "d_in": W_dec.shape[1]}
    for parameter in zeros:
        tensors[parameter.name] = torch.zeros(
            [widths[side] for side in parameter.sides], dtype=W_dec.dtype, device=W_dec.device
        )
    return tensors
