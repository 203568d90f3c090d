"""A layout's tensor names, as ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import CheckpointError
from ..storage import StoredTensor

TRANSPOSED = ".T"


def renamed(
    held: Mapping[str, object], names: Mapping[str, str], where: object, *, besides: Iterable[str] = ()
) -> dict[str, StoredTensor]:
    """Return the tensors of a file by our names.

    Args:
        held: what the file holds, by its own names.
        names: for each of our names the file's; with ``.T`` at the end where the file holds the transpose.
        where: the file, for messages.
        besides: names that the file may hold, too, and that are left out here.

    Raises:
        CheckpointError: if a tensor is missing or is none, or the file holds something that is unknown.
    """
    wanted = {name: theirs.removesuffix(TRANSPOSED) for name, theirs in names.items()}
    missing = sorted(set(wanted.values()) - set(held))
    unknown = sorted(set(held) - set(wanted.values()) - set(besides))
    if missing or unknown:
        faults = [
            f"{verb} {', '.join(found)}" for verb, found in (("lacks", missing), ("has an unknown", unknown)) if found
        ]
        raise CheckpointError(
            f"{where} {' and '.join(faults)}; expected {', '.join(sorted(wanted.values()))}: fetch it again, or "
            "correct the configuration beside it."
        )
    tensors = {}
    for name, theirs in wanted.items():
        tensor = held[theirs]
        if not isinstance(tensor, StoredTensor):
            raise CheckpointError(f"{where} holds {theirs} = {str(tensor)[:60]!r}; expected a tensor.")
        tensors[name] = tensor.T if names[name].endswith(TRANSPOSED) else tensor
    return tensors
