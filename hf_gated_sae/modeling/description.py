"""The user's description of a home-made checkpoint: one in no known layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import InputError, shown
from .architecture_registry import architectures

if TYPE_CHECKING:
    from .model import SAEModel

HOME_MADE = "home_made"
"""Name of the layout of such checkpoints."""


@dataclass(frozen=True)
class CheckpointDescription:
    """The arguments of `SAEModel.from_pretrained` that describe a home-made checkpoint.

    Attributes:
        model_class: the architecture's class.
        names: the file's name of each of our tensors, such as ``{"W_enc": "encoder.weight"}``. ``_T`` at the end of
            our name, or ``.T`` at the end of the file's, states which of the two is transposed; that counts where a
            matrix is square, since otherwise its shape decides. None: the file has no such vector, and zeros are used.
        ignore: names of tensors that are left out, perhaps with ``*`` and ``?``.
        options: keys of the configuration.
    """

    model_class: type[SAEModel]
    names: Mapping[str, str | None] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Name of the architecture."""
        return str(self.model_class.config_class.model_type).removesuffix("_sae")


def describe_checkpoint(
    architecture: str | None,
    names: Mapping[str, str | None] | None,
    ignore: str | Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> CheckpointDescription | None:
    """Return the description that arguments of `from_pretrained` give; None without an architecture.

    Args:
        architecture: short name, such as ``"standard"``.
        names: as in `CheckpointDescription`.
        ignore: as in `CheckpointDescription`; one name alone may be a string.
        options: further arguments; those that are keys of the configuration are kept.

    Raises:
        InputError: if names are given without an architecture, or are not strings.
        UnknownNameError: if there is no such architecture.
    """
    if architecture is None:
        if names or ignore:
            raise InputError(
                f"Given {'names' if names else 'ignore'}=, which says how to read a home-made checkpoint, without "
                "architecture=: pass that, too, such as architecture='standard'."
            )
        return None
    model_class = architectures[architecture]
    given = dict(names or {})
    if not all(isinstance(ours, str) and isinstance(theirs, (str, type(None))) for ours, theirs in given.items()):
        raise InputError(
            f"names is {shown(names)}; expected names of the file's tensors by names of ours, such as "
            "{'W_enc': 'encoder.weight'}."
        )
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    fields = model_class.config_class.own_fields()
    taken = {name: value for name, value in (options or {}).items() if name in fields}
    return CheckpointDescription(model_class, given, patterns, taken)
