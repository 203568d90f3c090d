"""Which tensor of a home-made checkpoint is which of ours: by the stated names, the usual ones, and the shapes."""

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
"""Widths that tell the sides of an architecture's tensors apart; nothing of that size is made."""

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
"""Other people's usual names of our tensors, besides our own; case and punctuation do not count."""
UNUSED = (
    *("num_batches_not_active", "num_batches_tracked", "stats_last_nonzero"),
    *("latents_activation_frequency", "latents_mean_square"),
)
"""Names of what training counts; no encoder and no decoder reads it."""


@dataclass(frozen=True)
class Parameter:
    """A tensor of an architecture.

    Attributes:
        name: ours, such as ``"W_enc_T"``.
        sides: what its axes count, such as ``("d_sae", "d_in")``.
        optional: whether it may be missing.
    """

    name: str
    sides: tuple[str, ...]
    optional: bool = False

    @property
    def stem(self) -> str:
        """Its name without the ``_T`` that says that it is stored transposed."""
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
    """A tensor of the file that is one of ours.

    Attributes:
        path: where it is in the file.
        transposed: whether the file holds the transpose of ours; of a matrix that the user named, as stated, and None
            if that was not.
    """

    path: str
    transposed: bool | None = None


@dataclass
class SiteFit:
    """How the tensors below one path of a file are those of an architecture.

    Attributes:
        root: the path.
        found: ours, by name.
        zeros: ours that the file does not have, and that are to be zero.
        widths: ``d_in``, ``d_sae`` and ``d_out``, as far as the shapes tell.
        missing: ours that were not found.
        leftover: paths of tensors that are none of ours.
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
        """How far it is from being complete; missing matrices count most."""
        missing = sum(3 if parameter.is_matrix else 1 for parameter in self.missing)
        return missing + len(self.leftover) + len(self.faults), len(self.found)


@functools.cache
def parameters_of(architecture: str, skip_connection: bool = False) -> dict[str, Parameter]:
    """Return the tensors of an architecture by name, the recorded statistics as optional ones.

    Raises:
        InputError: if the architecture has more than one row per latent, so that it cannot be described by names.
    """
    model_class = architectures[architecture]
    if not model_class.sliceable:
        raise InputError(
            f"The tensors of a {model_class.__name__} are of other shapes than one row per latent, so that names do "
            "not describe them: save it in a known layout."
        )
    options = {"apply_b_dec_to_input": False, "skip_connection": skip_connection}
    try:
        config = model_class.config_class(**WIDTHS, **options)
    except InputError:  # it writes where it reads
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
    """Return how the tensors below a path are those of an architecture.

    Args:
        content: what the file holds.
        root: the path.
        parameters: tensors of the architecture.
        names: as in `CheckpointDescription`.
        ignore: as in `CheckpointDescription`.
        widths: widths that the user gave.
    """
    fit = SiteFit(root, widths=dict(widths or {}))
    below = content.below(root)
    _take_stated(fit, content, below, parameters, names)
    taken = {found.path for found in fit.found.values()}
    rest = {short: path for short, path in below.items() if path not in taken}
    free = {short: path for short, path in rest.items() if not is_left_out(path, short, ignore)}
    settled = {*fit.found, *(parameter.name for parameter in fit.zeros)}
    for parameter in parameters.values():
        if parameter.name not in settled:
            _take_usual(fit, parameter, free)
    taken = {found.path for found in fit.found.values()}
    fit.leftover += [path for path in free.values() if path not in taken]
    _measure(fit, content, parameters)
    return fit


def is_left_out(path: str, short: str, ignore: tuple[str, ...]) -> bool:
    """Whether a tensor is none of the SAE's: training counts with it, or the user says so."""
    own = _plain(short.rpartition(".")[2])
    return own in map(_plain, UNUSED) or any(fnmatchcase(name, each) for each in ignore for name in (path, short))


def _take_stated(
    fit: SiteFit,
    content: Content,
    below: Mapping[str, str],
    parameters: Mapping[str, Parameter],
    names: Mapping[str, str | None],
) -> None:
    """Take the tensors that the user named."""
    everything = {**content.tensors, **content.training}
    by_key = {parameter.name: parameter for parameter in parameters.values()}
    by_key |= {name: parameter for parameter in parameters.values() for name in _keys(parameter)}
    for key, theirs in names.items():
        parameter = by_key.get(key)
        if parameter is None:
            turned = " (names= goes from our names to the file's)" if theirs in by_key else ""
            close = did_you_mean(key, [each.stem for each in parameters.values()])
            fit.faults.append(f"names= speaks of {key!r}, which this architecture lacks.{close}{turned}")
        elif parameter.name in fit.found or parameter in fit.zeros:
            fit.faults.append(f"names= speaks of {parameter.stem} twice")
        elif theirs is None and parameter.is_matrix:
            fit.faults.append(f"names= says that there is no {parameter.stem}; only vectors can be zero")
        elif theirs is None:
            fit.zeros.append(parameter)
        else:
            wanted = theirs if theirs in everything or theirs in below else theirs.removesuffix(".T")
            path = wanted if wanted in everything else below.get(wanted)
            if path is None:
                close = did_you_mean(wanted, [*everything, *below, *(path.rpartition(".")[2] for path in everything)])
                fit.faults.append(f"there is no {wanted!r}, which names= gives for {key}.{close}")
                continue
            marks = [key.endswith(TRANSPOSED), parameter.name != parameter.stem, wanted != theirs]
            is_stated = parameter.is_matrix and (marks[0] or marks[2])
            fit.found[parameter.name] = Found(path, sum(marks) % 2 == 1 if is_stated else None)


def _keys(parameter: Parameter) -> tuple[str, ...]:
    """Return the names by which a user may mean a tensor of ours."""
    return (parameter.stem, parameter.stem + TRANSPOSED) if parameter.is_matrix else (parameter.name,)


def _take_usual(fit: SiteFit, parameter: Parameter, free: Mapping[str, str]) -> None:
    """Take the one tensor that has a usual name of one of ours; two of them are a fault."""
    exact = [name for name in _keys(parameter) if name in free]
    usual = {_plain(name) for name in (*_keys(parameter), *USUAL.get(parameter.stem, "").split())}
    close = exact if len(exact) == 1 else [short for short in free if _plain(short) in usual]
    if len(close) > 1:
        fit.faults.append(f"{' and '.join(close)} could both be {parameter.stem}: say which in names=")
        fit.missing.append(parameter)
    elif close:
        fit.found[parameter.name] = Found(free[close[0]])
    elif not parameter.optional:
        fit.missing.append(parameter)


def _plain(name: str) -> str:
    """Return a name without case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _measure(fit: SiteFit, content: Content, parameters: Mapping[str, Parameter]) -> None:
    """Read the widths from the shapes, and from the widths which matrices are transposed."""
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
    for turned in product((False, True), repeat=len(matrices)):
        widths = _agreed(fit.widths, [parameters[name] for name in matrices], turned, [shapes[n] for n in matrices])
        if widths is not None:
            ways.append((dict(zip(matrices, turned, strict=True)), widths))
    # What was stated counts where it is possible; elsewhere the shapes leave no choice.
    stated = [
        way for way in ways if all(fit.found[name].transposed in (None, turned) for name, turned in way[0].items())
    ]
    ways = stated or ways
    if len(ways) == 1:
        turned_by_name, fit.widths = ways[0]
        fit.found |= {name: Found(fit.found[name].path, turned) for name, turned in turned_by_name.items()}
    elif not ways:
        held = ", ".join(f"{fit.found[name].path} {list(shapes[name])}" for name in matrices)
        wanted = ", ".join(str(parameters[name]) for name in matrices)
        said = ", ".join(f"{name} = {width}" for name, width in fit.widths.items())
        fit.faults.append(f"{held} cannot be {wanted}, transposed or not{f', where {said}' if said else ''}")
    else:
        unsure = [name for name in matrices if len({way[0][name] for way in ways}) > 1]
        fit.faults += [_unknown_orientation(fit, parameters[name], shapes[name]) for name in unsure]


def _agreed(
    known: Mapping[str, int], matrices: list[Parameter], turned: tuple[bool, ...], shapes: list[tuple[int, ...]]
) -> dict[str, int] | None:
    """Return the widths that matrices have, each transposed or not; None if they contradict each other."""
    widths = dict(known)
    for parameter, is_turned, shape in zip(matrices, turned, shapes, strict=True):
        for side, width in zip(parameter.sides, shape[::-1] if is_turned else shape, strict=True):
            if widths.setdefault(side, width) != width:
                return None
    return widths


def _misshaped(fit: SiteFit, parameter: Parameter, shape: tuple[int, ...], known: int | None = None) -> str:
    """Say that a tensor has a shape that ours cannot have."""
    width = f" with {parameter.sides[0]} = {known}" if known is not None and len(parameter.sides) == 1 else ""
    return f"{fit.found[parameter.name].path} has shape {list(shape)} and cannot be {parameter}{width}"


def _unknown_orientation(fit: SiteFit, parameter: Parameter, shape: tuple[int, ...]) -> str:
    """Say that a shape does not tell which axis is which, and how to state it."""
    path, key = fit.found[parameter.name].path, parameter.stem + TRANSPOSED
    first, second = parameter.sides if parameter.name != parameter.stem else parameter.sides[::-1]
    order = list(WIDTHS)
    linear = [", as nn.Linear keeps it", ""]  # whose rows are its outputs
    if order.index(first) < order.index(second):
        linear.reverse()
    return (
        f"the shape {list(shape)} of {path} does not tell which axis is which: state "
        f"names={{{key!r}: {path!r}}} if it is [{first}, {second}]{linear[0]}, or "
        f"{{{key!r}: {path + '.T'!r}}} if it is [{second}, {first}]{linear[1]}"
    )
