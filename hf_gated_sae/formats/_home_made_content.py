"""The tensors and values of a home-made checkpoint, in any nesting."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

DEEPEST = 6
MOST_ENTRIES = 20_000
SHOWN_TENSORS = 12
MOST_TENSORS = 64
"""Most tensors of an SAE; content with more is something else, such as a language model."""

_TRAINING = re.compile(r"(optim\w*|opt|opt_state|\w*scheduler\w*|rng\w*|\w+_rng\w*|grad_scaler|callbacks|loops)(\.|$)")
"""Names under which training stores its own state."""


@dataclass(frozen=True)
class Content:
    """Tensors and plain values by their path in nested dictionaries, such as ``state_dict.encoder.weight``.

    Attributes:
        tensors: stored tensors, or torch's own.
        values: numbers, texts and flags.
        training: tensors of an optimiser, a scheduler or a random generator, which are not weights.
    """

    tensors: Mapping[str, Any]
    values: Mapping[str, Any]
    training: Mapping[str, Any]

    def below(self, root: str) -> dict[str, str]:
        """Return the full paths of the tensors below a path, by their paths relative to it."""
        prefix = f"{root}." if root else ""
        return {path[len(prefix) :]: path for path in self.tensors if path.startswith(prefix)}

    def roots(self) -> list[str]:
        """Return the paths below which there are 2 to `MOST_TENSORS` tensors, the shortest first."""
        counts: dict[str, int] = {"": len(self.tensors)}
        for path in self.tensors:
            parts = path.split(".")[:-1]
            for length in range(1, min(len(parts), DEEPEST) + 1):
                root = ".".join(parts[:length])
                counts[root] = counts.get(root, 0) + 1
        few = [root for root, count in counts.items() if 1 < count <= MOST_TENSORS]
        return sorted(few, key=lambda root: (root.count(".") + bool(root), root))


def content_of(held: Mapping[str, Any], where: str) -> Content:
    """Return the content of a file, or of a ``state_dict=``.

    Raises:
        CheckpointError: if it has more than `MOST_ENTRIES` entries.
    """
    tensors: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for number, (path, value) in enumerate(_entries(held, "", 0)):
        if number >= MOST_ENTRIES:
            raise CheckpointError(f"{where} has more than {MOST_ENTRIES} entries; expected the tensors of one SAE.")
        (tensors if hasattr(value, "shape") and hasattr(value, "dtype") else values)[path] = value
    training = {path: tensor for path, tensor in tensors.items() if _TRAINING.match(path)}
    return Content({path: tensor for path, tensor in tensors.items() if path not in training}, values, training)


def _entries(held: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested containers with their paths; those below `DEEPEST` levels are skipped."""
    inner: Iterator[tuple[Any, Any]]
    if isinstance(held, Mapping):
        inner = iter(held.items())
    elif isinstance(held, Sequence) and not isinstance(held, (str, bytes)):
        inner = iter(enumerate(held))
    else:
        yield path, held
        return
    if depth < DEEPEST:
        for key, value in inner:
            yield from _entries(value, f"{path}.{key}" if path else str(key), depth + 1)


def listed(tensors: Mapping[str, Any]) -> str:
    """Return names and shapes for a message."""
    shown = [f"{name[:60]} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:SHOWN_TENSORS]]
    more = f", ... ({len(tensors)} tensors)" if len(tensors) > SHOWN_TENSORS else ""
    return (", ".join(shown) or "no tensors") + more
