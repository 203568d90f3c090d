"""Rename a layout's tensors to parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import CheckpointError
from ..storage import StoredTensor

TRANSPOSED = ".T"


def renamed(
    held: Mapping[str, object], names: Mapping[str, str], where: object, *, besides: Iterable[str] = ()
) -> dict[str, StoredTensor]:
    """Return the tensors of a file by parameter name.

    Args:
        held: content of the file, by its own names.
        names: for each parameter the name in the file, with ``.T`` at the end where the file has the transpose.
        where: the file, for messages.
        besides: further names that the file may have; they are not returned.

    Raises:
        CheckpointError: if a tensor is missing, an entry is not a tensor, or the file has an unknown entry.
    """
    wanted = {name: stored_name.removesuffix(TRANSPOSED) for name, stored_name in names.items()}
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
    for name, stored_name in wanted.items():
        tensor = held[stored_name]
        if not isinstance(tensor, StoredTensor):
            raise CheckpointError(f"{where} holds {stored_name} = {str(tensor)[:60]!r}; expected a tensor.")
        tensors[name] = tensor.T if names[name].endswith(TRANSPOSED) else tensor
    return tensors
