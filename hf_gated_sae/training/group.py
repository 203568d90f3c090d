"""Several SAEs as one module, since a `transformers.Trainer` trains one module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..errors import InputError
from ..modeling import SAEModel

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=|-]*(/[A-Za-z0-9_][A-Za-z0-9_.+=|-]*)*")


class SAEGroupConfig(PreTrainedConfig):
    """The configurations of several SAEs, by name, for experiment trackers."""

    model_type = "sae_group"
    saes: dict[str, Any] | None = None


class SAEGroup(nn.Module):
    """SAEs by name that are trained on the same stream and share nothing else.

    Args:
        saes: by name; a name is also the subfolder that its SAE is saved in.

    Raises:
        InputError: if there are none, one is given twice, or a name is not a relative path.
    """

    def __init__(self, saes: Mapping[str, SAEModel]) -> None:
        super().__init__()
        if not saes or len({id(sae) for sae in saes.values()}) < len(saes):
            raise InputError(f"Given the SAEs {list(saes)}; expected at least one, and each of them once.")
        require_names(saes)
        self.names = tuple(saes)
        self.config = SAEGroupConfig(saes={name: sae.config.to_dict() for name, sae in saes.items()})
        self.saes = nn.ModuleList(saes.values())  # by index: a name may have dots

    def items(self) -> Iterator[tuple[str, SAEModel]]:
        """Yield names and SAEs."""
        yield from zip(self.names, self.saes, strict=True)

    def forward(self, x: Any) -> Any:
        """Refuse: several SAEs have no common input; call them one by one."""
        raise InputError(f"A group of SAEs cannot be called; call one of {', '.join(self.names)}.")


def require_names(names: Iterable[str]) -> None:
    """Raise unless every SAE can be saved in a folder of its name.

    Raises:
        InputError: naming the first that cannot.
    """
    for name in names:
        if not _NAME.fullmatch(name) or name.startswith("checkpoint-"):
            raise InputError(
                f"The SAE's name {name!r} cannot be used as the folder that it is saved in; expected letters, digits "
                "and any of _ . + = | - between slashes, such as 'resid_post.12/l1_2'."
            )
