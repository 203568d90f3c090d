"""Advice for tensors that no layout claims: the nearest architecture, and the call that would load them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..hub.location import Location
from ..modeling import architectures
from ..storage import TENSOR_FILES
from ._home_made import tensor_files
from ._home_made_content import MOST_TENSORS, Content, content_of, listed
from ._home_made_matching import SiteFit, fitted, is_ignored, parameters_of
from ._home_made_options import options_of, required_counts

MOST_FILES = 3
SHOWN_ALIKE = 3
NEAREST = "nearest to architecture"


def advice(location: Location) -> str:
    """Return sentences about the tensor files of a folder that no layout claims; empty if it has none.

    Only headers are read, and of a few files.
    """
    files = [location.file] if location.file in location.files else tensor_files(location)
    files = files or [name for name in location.files if name.endswith(tuple(TENSOR_FILES))]
    sentences, unreadable = [], []
    for file in files[:MOST_FILES]:
        where = f"{file} of {location.at(location.subfolder)}"
        try:
            content = content_of(location.content(file), where)
        except CheckpointError as error:
            unreadable.append(str(error))
            continue
        sentences.append(_of_file(location, file, content))
    if len(files) > MOST_FILES:
        sentences.append(f"There are {len(files) - MOST_FILES} more tensor files.")
    return " ".join([*sentences, *unreadable])


def _of_file(location: Location, file: str, content: Content) -> str:
    """Return sentences about the tensors of one file and the call that would load them."""
    held = f"{file} holds {listed(content.tensors)}."
    found = nearest(content)
    if found is None:
        return f"{held} They do not look like an SAE's."
    fit, alike = found
    first = alike[0]
    more = [*map(repr, alike[1:SHOWN_ALIKE]), *(["..."] if len(alike) > SHOWN_ALIKE else [])]
    others = f" (or {', '.join(more)})" if more else ""
    lacks = f", lacking {', '.join(parameter.stem for parameter in fit.missing)}" if fit.missing else ""
    leftover = f", with {', '.join(fit.leftover[:6])} left over" if fit.leftover else ""
    address = "/".join(part for part in (location.subfolder, file) if part)
    arguments = [f"architecture={first!r}"]
    if fit.missing or fit.leftover:
        names = ", ".join(f"{parameter.stem!r}: '...'" for parameter in fit.missing)
        arguments += [f"names={{{names}}}"] if names else []
        arguments += [f"ignore={fit.leftover[:6]!r}"] if fit.leftover else []
    stated = options_of(architectures[first], {}, content)[0]
    arguments += [f"{name}=..." for name in required_counts(architectures[first]) if name not in stated]
    return (
        f"{held} That is {NEAREST} {first!r}{others}{lacks}{leftover}. To load a home-made SAE, describe it: "
        f"SAEModel.from_pretrained({location.repo!r}, {address!r}, {', '.join(arguments)}, site=..., base_model=...)."
    )


def nearest(content: Content) -> tuple[SiteFit, list[str]] | None:
    """Return the nearest fit and the architectures that it fits equally well; None if the tensors are not an SAE's."""
    tensors: Mapping[str, Any] = content.tensors
    if sum(len(tensor.shape) == 2 for tensor in tensors.values()) < 1 or not content.roots():
        return None
    ranked: list[tuple[tuple[Any, ...], SiteFit, str]] = []
    for name, model_class in architectures.items():
        if model_class.sliceable:
            fit = _nearest_root(content, name)
            counts = required_counts(model_class)
            stated = options_of(model_class, {}, content)[0]
            # A file that states k is more likely a TopK's; among equals the shortest name comes first.
            likely = (all(count in stated for count in counts) and -len(counts), len(counts), len(name), name)
            ranked.append(((fit.distance[0], -fit.distance[1], *likely), fit, name))
    ranked.sort(key=lambda each: each[0])
    best = ranked[0][1]
    if best.missing and len(tensors) > MOST_TENSORS:
        return None
    return best, [name for _, fit, name in ranked if fit.distance == best.distance and fit.found == best.found]


def _nearest_root(content: Content, architecture: str) -> SiteFit:
    """Return the fit with the fewest faults, at any path of the file."""
    parameters = parameters_of(architecture)
    used = options_of(architectures[architecture], {}, content)[2]
    fits = [fitted(content, root, parameters, {}) for root in content.roots()]
    for fit in fits:
        inside = content.below(fit.root).values()
        outside = [path for path in content.tensors if path not in inside and not is_ignored(path, path, ())]
        fit.leftover = [path for path in [*fit.leftover, *outside] if path not in used]
    return min(fits, key=lambda fit: (fit.distance[0], -fit.distance[1]))
