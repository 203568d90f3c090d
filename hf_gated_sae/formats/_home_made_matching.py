"""Match the tensors of a home-made checkpoint to parameters: by the user's names, usual names, and the shapes."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product

import torch

from ..errors import InputError, did_you_mean
from ..modeling import architectures
from ..modeling.building import STATISTICS
from ._home_made_content import Content

TRANSPOSED = "_T"
WIDTHS = {"d_in": 100_003, "d_sae": 1 << 18, "d_out": 300_007}
"""Distinct widths by which the sides of an architecture's tensors are recognised; no tensor of that size is made."""

USUAL = {
    "W_enc": "encoder encoder.weight encoder.0.weight encoder_linear.weight enc enc.weight encode.weight W_e",
    "W_dec": "decoder decoder.weight decoder.0.weight decoder_linear.weight dec dec.weight decode.weight W_d",
    "b_enc": "encoder.bias encoder.0.bias encoder_linear.bias enc.bias b_e latent_bias bias_enc",
    "b_dec": "decoder.bias decoder.0.bias decoder_linear.bias dec.bias b_d pre_bias bias_dec",
    "b_gate": "gate_bias",
    "b_mag": "mag_bias",
    "threshold": "thresholds",
    "W_skip": "skip skip.weight",
}
"""Usual names of the parameters in other code, beside their own; case and punctuation do not matter."""
UNUSED = (
    *("num_batches_not_active", "num_batches_tracked", "stats_last_nonzero"),
    *("latents_activation_frequency", "latents_mean_square"),
)
"""Names of training statistics, which neither encoder nor decoder uses."""


@dataclass(frozen=True)
class Parameter:
    """A tensor of an architecture.

    Attributes:
        name: its name, such as ``"W_enc_T"``.
        sides: names of its axes, such as ``("d_sae", "d_in")``.
        optional: whether it may be missing.
    """

    name: str
    sides: tuple[str, ...]
    optional: bool = False

    @property
    def stem(self) -> str:
        """Its name without the ``_T`` of a parameter that is stored transposed."""
        return self.name.removesuffix(TRANSPOSED)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two sides, in either order."""
        return len(self.sides) == 2

    def __str__(self) -> str:
        """Return name and sides, matrices in the usual orientation."""
        sides = self.sides[::-1] if self.name != self.stem else self.sides
        return f"{self.stem} [{', '.join(sides)}]"


@dataclass(frozen=True)
class Found:
    """The tensor of the file for one parameter.

    Attributes:
        path: its path in the file.
        transposed: whether the file has the transpose of the parameter; None where the user has not stated it and the
            shapes have not been compared yet.
    """

    path: str
    transposed: bool | None = None


@dataclass
class SiteFit:
    """How well the tensors below one path of a file match the parameters of an architecture.

    Attributes:
        root: the path.
        found: the matched tensors, by parameter name.
        zeros: parameters that the file does not have and that are set to zero.
        widths: ``d_in``, ``d_sae`` and ``d_out``, as far as the shapes determine them.
        missing: parameters that were not found.
        leftover: paths of tensors that match no parameter.
        faults: sentences about everything else that does not fit.
    """

    root: str
    found: dict[str, Found] = field(default_factory=dict)
    zeros: list[Parameter] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    missing: list[Parameter] = field(default_factory=list)
    leftover: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything fits."""
        return not (self.missing or self.leftover or self.faults)

    @property
    def distance(self) -> tuple[int, int]:
        """Number of faults, in which missing matrices count most, and number of matched tensors."""
        missing = sum(3 if parameter.is_matrix else 1 for parameter in self.missing)
        return missing + len(self.leftover) + len(self.faults), len(self.found)


@functools.cache
def parameters_of(architecture: str, skip_connection: bool = False) -> dict[str, Parameter]:
    """Return the parameters of an architecture by name; recorded statistics are optional.

    Raises:
        InputError: if the architecture has tensors without one row per latent, which names cannot describe.
    """
    model_class = architectures[architecture]
    if not model_class.sliceable:
        raise InputError(
            f"The tensors of a {model_class.__name__} are of other shapes than one row per latent, so names do not "
            "describe them: save it in a known layout."
        )
    options = {"apply_b_dec_to_input": False, "skip_connection": skip_connection}
    try:
        config = model_class.config_class(**WIDTHS, **options)
    except InputError:  # this architecture writes the site that it reads
        config = model_class.config_class(**{**WIDTHS, "d_out": WIDTHS["d_in"]}, **options)
    side = {width: name for name, width in WIDTHS.items()}
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in model_class(config).state_dict().items()}
    return {
        key: Parameter(key, tuple(side[width] for width in shape), optional=key in STATISTICS)
        for key, shape in shapes.items()
    }


def fitted(
    content: Content,
    root: str,
    parameters: Mapping[str, Parameter],
    names: Mapping[str, str | None],
    ignore: tuple[str, ...] = (),
    widths: Mapping[str, int] | None = None,
) -> SiteFit:
    """Match the tensors below a path to the parameters of an architecture.

    Args:
        content: the content of the file.
        root: the path.
        parameters: the parameters.
        names: as in `CheckpointDescription`.
        ignore: as in `CheckpointDescription`.
        widths: widths in the description.
    """
    fit = SiteFit(root, widths=dict(widths or {}))
    below = content.below(root)
    _take_stated(fit, content, below, parameters, names)
    taken = {found.path for found in fit.found.values()}
    rest = {short: path for short, path in below.items() if path not in taken}
    free = {short: path for short, path in rest.items() if not is_ignored(path, short, ignore)}
    settled = {*fit.found, *(parameter.name for parameter in fit.zeros)}
    for parameter in parameters.values():
        if parameter.name not in settled:
            _take_usual(fit, parameter, free)
    taken = {found.path for found in fit.found.values()}
    fit.leftover += [path for path in free.values() if path not in taken]
    _resolve_shapes(fit, content, parameters)
    return fit


def is_ignored(path: str, short: str, ignore: tuple[str, ...]) -> bool:
    """Whether a tensor is ignored: it is a training statistic, or the user names it in ``ignore=``."""
    own = _normalised(short.rpartition(".")[2])
    return own in map(_normalised, UNUSED) or any(fnmatchcase(name, each) for each in ignore for name in (path, short))


def _take_stated(
    fit: SiteFit,
    content: Content,
    below: Mapping[str, str],
    parameters: Mapping[str, Parameter],
    names: Mapping[str, str | None],
) -> None:
    """Match the tensors that the user named."""
    everything = {**content.tensors, **content.training}
    by_key = {parameter.name: parameter for parameter in parameters.values()}
    by_key |= {name: parameter for parameter in parameters.values() for name in _accepted_keys(parameter)}
    for key, stored_name in names.items():
        parameter = by_key.get(key)
        if parameter is None:
            hint = " (names= maps this library's names to the file's)" if stored_name in by_key else ""
            close = did_you_mean(key, [each.stem for each in parameters.values()])
            fit.faults.append(f"names= has {key!r}, which this architecture lacks.{close}{hint}")
        elif parameter.name in fit.found or parameter in fit.zeros:
            fit.faults.append(f"names= has {parameter.stem} twice")
        elif stored_name is None and parameter.is_matrix:
            fit.faults.append(f"names= states that there is no {parameter.stem}; only vectors can be zero")
        elif stored_name is None:
            fit.zeros.append(parameter)
        else:
            wanted = (
                stored_name if stored_name in everything or stored_name in below else stored_name.removesuffix(".T")
            )
            path = wanted if wanted in everything else below.get(wanted)
            if path is None:
                close = did_you_mean(wanted, [*everything, *below, *(path.rpartition(".")[2] for path in everything)])
                fit.faults.append(f"there is no {wanted!r}, which names= gives for {key}.{close}")
                continue
            marks = [key.endswith(TRANSPOSED), parameter.name != parameter.stem, wanted != stored_name]
            is_stated = parameter.is_matrix and (marks[0] or marks[2])
            fit.found[parameter.name] = Found(path, sum(marks) % 2 == 1 if is_stated else None)


def _accepted_keys(parameter: Parameter) -> tuple[str, ...]:
    """Return the keys of ``names=`` that refer to a parameter."""
    return (parameter.stem, parameter.stem + TRANSPOSED) if parameter.is_matrix else (parameter.name,)


def _take_usual(fit: SiteFit, parameter: Parameter, free: Mapping[str, str]) -> None:
    """Match the one tensor with a usual name of a parameter; two of them are a fault."""
    exact = [name for name in _accepted_keys(parameter) if name in free]
    usual = {_normalised(name) for name in (*_accepted_keys(parameter), *USUAL.get(parameter.stem, "").split())}
    close = exact if len(exact) == 1 else [short for short in free if _normalised(short) in usual]
    if len(close) > 1:
        fit.faults.append(f"{' and '.join(close)} could both be {parameter.stem}: choose one in names=")
        fit.missing.append(parameter)
    elif close:
        fit.found[parameter.name] = Found(free[close[0]])
    elif not parameter.optional:
        fit.missing.append(parameter)


def _normalised(name: str) -> str:
    """Return a name in lower case, without punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _resolve_shapes(fit: SiteFit, content: Content, parameters: Mapping[str, Parameter]) -> None:
    """Determine the widths from the shapes, and which matrices are transposed from the widths."""
    everything = {**content.tensors, **content.training}
    shapes = {name: tuple(everything[found.path].shape) for name, found in fit.found.items()}
    for name, shape in shapes.items():
        parameter = parameters[name]
        if not parameter.is_matrix:
            sides = tuple(side for side in shape if side != 1) if len(shape) != len(parameter.sides) else shape
            if len(sides) != len(parameter.sides):
                fit.faults.append(_misshaped(fit, parameter, shape))
            elif sides and (known := fit.widths.setdefault(parameter.sides[0], sides[0])) != sides[0]:
                fit.faults.append(_misshaped(fit, parameter, shape, known))
        elif len(shape) != 2:
            fit.faults.append(_misshaped(fit, parameter, shape))
    matrices = [name for name in fit.found if parameters[name].is_matrix and len(shapes[name]) == 2]
    ways = []
    for flags in product((False, True), repeat=len(matrices)):
        widths = _consistent_widths(
            fit.widths, [parameters[name] for name in matrices], flags, [shapes[n] for n in matrices]
        )
        if widths is not None:
            ways.append((dict(zip(matrices, flags, strict=True)), widths))
    # The user's statement decides where it is possible; elsewhere the shapes leave no choice.
    as_stated = [
        way for way in ways if all(fit.found[name].transposed in (None, flag) for name, flag in way[0].items())
    ]
    ways = as_stated or ways
    if len(ways) == 1:
        transposed, fit.widths = ways[0]
        fit.found |= {name: Found(fit.found[name].path, flag) for name, flag in transposed.items()}
    elif not ways:
        held = ", ".join(f"{fit.found[name].path} {list(shapes[name])}" for name in matrices)
        wanted = ", ".join(str(parameters[name]) for name in matrices)
        stated = ", ".join(f"{name} = {width}" for name, width in fit.widths.items())
        fit.faults.append(f"{held} cannot be {wanted}, transposed or not{f', where {stated}' if stated else ''}")
    else:
        unsure = [name for name in matrices if len({way[0][name] for way in ways}) > 1]
        fit.faults += [_unknown_orientation(fit, parameters[name], shapes[name]) for name in unsure]


def _consistent_widths(
    known: Mapping[str, int], matrices: list[Parameter], transposed: tuple[bool, ...], shapes: list[tuple[int, ...]]
) -> dict[str, int] | None:
    """Return the widths of matrices, each transposed or not; None if they contradict each other."""
    widths = dict(known)
    for parameter, is_transposed, shape in zip(matrices, transposed, shapes, strict=True):
        for side, width in zip(parameter.sides, shape[::-1] if is_transposed else shape, strict=True):
            if widths.setdefault(side, width) != width:
                return None
    return widths


def _misshaped(fit: SiteFit, parameter: Parameter, shape: tuple[int, ...], known: int | None = None) -> str:
    """Return the fault of a tensor whose shape the parameter cannot have."""
    width = f" with {parameter.sides[0]} = {known}" if known is not None and len(parameter.sides) == 1 else ""
    return f"{fit.found[parameter.name].path} has shape {list(shape)} and cannot be {parameter}{width}"


def _unknown_orientation(fit: SiteFit, parameter: Parameter, shape: tuple[int, ...]) -> str:
    """Return the fault of a matrix whose orientation its shape does not determine, and how to state it."""
    path, key = fit.found[parameter.name].path, parameter.stem + TRANSPOSED
    first, second = parameter.sides if parameter.name != parameter.stem else parameter.sides[::-1]
    order = list(WIDTHS)
    linear = [", as nn.Linear stores it", ""]  # whose rows are its outputs
    if order.index(first) < order.index(second):
        linear.reverse()
    return (
        f"the shape {list(shape)} of {path} does not determine which axis is which: state "
        f"names={{{key!r}: {path!r}}} if it is [{first}, {second}]{linear[0]}, or "
        f"{{{key!r}: {path + '.T'!r}}} if it is [{second}, {first}]{linear[1]}"
    )
