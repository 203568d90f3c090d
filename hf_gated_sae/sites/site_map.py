"""The proven sites of one model, by name."""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import SiteError, did_you_mean
from ..functional.short_repr import few_lines
from .norm_sites import Norms
from .site import GLOBAL, LAYERED, Site
from .slots import Slot, TensorPath
from .transforms import NORM_NO_GAIN, Transform

PathKey = tuple[str, str, int | None]
"""Path and port of a module, and the index of one of its tensors there; None for its activation."""

LAYER = "L"


@dataclass(frozen=True, slots=True)
class SiteRow:
    """Sites of one name at the same tensor of several blocks, or refused for the same reason.

    Args:
        name: the semantic name.
        layers: the blocks; empty for names without a layer.
        tensor_path: module path and port, with ``L`` for the layer, and a scale; empty if refused.
        width: last dimension; 0 if refused.
        reason: why the sites are refused; empty if they are proven.
    """

    name: str
    layers: tuple[int, ...]
    tensor_path: str
    width: int
    reason: str

    @property
    def proven(self) -> bool:
        """Whether the sites can be used."""
        return not self.reason


class SiteMap:
    """The sites of one model: a mapping of names to slots.

    Args:
        root: the model without wrappers; only a weak reference is stored.
        slots: the proven semantic sites.
        refused: the other semantic sites, each with the reason.
        paths: for each tensor of each port of each module, its tensor path, or why it cannot be a site.
        layers: number of blocks.
        text_path: path of the module that takes the ids and contains the blocks.
        evidence: how the blocks were found, or why they were not.
        norms: the norms that read the sites.
        blocks: path of each block by its number.
    """

    def __init__(
        self,
        root: nn.Module,
        slots: Mapping[Site, Slot],
        refused: Mapping[Site, str],
        paths: Mapping[PathKey, TensorPath | str],
        layers: int,
        text_path: str,
        evidence: str,
        norms: Norms,
        blocks: Mapping[int, str],
    ) -> None:
        self.n_layers = layers
        self.refused = dict(refused)
        self.evidence = evidence
        self._root = weakref.ref(root)
        self._slots = dict(slots)
        self._paths = dict(paths)
        self._text_path = text_path
        self._norms = norms
        self._blocks = dict(blocks)

    @property
    def text_model(self) -> nn.Module:
        """The module that takes the ids and contains the blocks."""
        return self._model().get_submodule(self._text_path)

    def names(self) -> list[str]:
        """Return every proven semantic name in execution order."""
        return [str(site) for site in sorted(self._slots, key=lambda site: self._slots[site].order)]

    def rows(self) -> list[SiteRow]:
        """Return all semantic sites, proven and refused; blocks in which a site is the same share a row."""
        groups: dict[tuple[str, str, int, str], list[int]] = {}
        by_name = {name: number for number, name in enumerate((GLOBAL[0], *LAYERED, GLOBAL[1]))}
        known = sorted({*self._slots, *self.refused}, key=lambda site: (by_name[site.name], site.layer or 0))
        for site in known:
            slot = self._slots.get(site)
            block = "" if site.layer is None else self._blocks.get(site.layer, "")
            pattern = "" if slot is None else _pattern(slot.tensor_path, block)
            width, reason = (slot.width, "") if slot is not None else (0, self.refused[site])
            blocks = groups.setdefault((site.name, pattern, width, _masked(reason, block)), [])
            blocks += [] if site.layer is None else [site.layer]
        return [
            SiteRow(name, tuple(layers), pattern, width, reason)
            for (name, pattern, width, reason), layers in groups.items()
        ]

    def __contains__(self, name: object) -> bool:
        """Whether the name is a site that can be used."""
        try:
            self[name]  # type: ignore[index]  # anything that is not a site is refused by the grammar
        except SiteError:
            return False
        return True

    def __getitem__(self, name: str | Site) -> Slot:
        """Return the slot of a site.

        Module paths start at the model, as in ``model.layers.3.mlp.output``, or at its ``base_model``, as in
        ``layers.3.mlp.output``.

        Raises:
            SiteError: if the name is not a site, the layer or module does not exist, the site could not be proven, or
                one of its transforms cannot be applied there.
        """
        site = Site.parse(name)
        slot = self._untransformed(site.bare)
        if not site.transforms:
            return slot
        transforms = tuple(
            self._model_independent(site, number, slot.tensor_path) for number in range(len(site.transforms))
        )
        return Slot(site, dataclasses.replace(slot.tensor_path, transforms=transforms), self._model())

    def _untransformed(self, site: Site) -> Slot:
        """Return the slot of a site without transforms."""
        if site in self._slots:
            return self._slots[site]
        if site.is_path:
            return self._at_path(site)
        if site.layer is not None and self.n_layers and site.layer >= self.n_layers:
            raise SiteError(
                f"There is no site '{site}': the model has {self.n_layers} layers, 0 to {self.n_layers - 1}."
            )
        reason = self.refused.get(site, self.evidence)
        raise SiteError(
            f"The site '{site}' could not be proven in this model of {self.n_layers} layers, because {reason}. "
            f"Proven: {self._summary()}. "
            "A module path such as 'model.layers.0.output' can be used without proof."
        )

    def _model_independent(self, site: Site, number: int, tensor_path: TensorPath) -> Transform:
        """Return one transform of a site; ``norm_no_gain`` is replaced by the proven norm of this model."""
        transform = site.transforms[number]
        if transform.name != NORM_NO_GAIN:
            return transform
        if number:
            raise SiteError(
                f"'{site}' cannot be used: '{NORM_NO_GAIN}' is the model's own norm of the untransformed site, so it "
                f"must be the first transform, as in '{site.bare}|{NORM_NO_GAIN}'."
            )
        return self._norms.reading(site.bare, tensor_path)

    def _at_path(self, site: Site) -> Slot:
        root = self._model()
        assert site.port is not None
        path = site.name
        if (path, site.port, None) not in self._paths:  # some checkpoints record paths inside the base model
            path = f"{_base_path(root)}.{site.name}"
        activation = self._paths.get((path, site.port, None))
        if activation is None:
            known = [path for path, _ in root.named_modules() if path]
            if site.name in known:
                raise SiteError(f"The module {site.name!r} did not run in the probe, so '{site}' has no activation.")
            raise SiteError(f"The model has no module {site.name!r}.{did_you_mean(site.name, known)}")
        found = self._paths.get((path, site.port, site.index))
        if found is None and isinstance(activation, TensorPath):
            count = sum(key[:2] == (path, site.port) and key[2] is not None for key in self._paths)
            tensors = f"{count} tensor{'' if count == 1 else 's'}"
            raise SiteError(f"There is no '{site}': the module's {site.port} has {tensors}, counted from 0.")
        found = activation if found is None else found
        if isinstance(found, str):
            raise SiteError(f"'{site}' cannot be used as a site: {found}.")
        return Slot(site, found, root)

    def _model(self) -> nn.Module:
        root = self._root()
        if root is None:
            raise SiteError("The model of these sites no longer exists; call resolve(model) for a new one.")
        return root

    def _summary(self) -> str:
        """Return the proven names, with ``L`` for the layer."""
        return (
            ", ".join(dict.fromkeys(f"{site.name}.L" if site.layer is not None else site.name for site in self._slots))
            or "none"
        )

    def __repr__(self) -> str:
        """Show the number of layers and the proven names."""
        return few_lines([f"SiteMap({self.n_layers} layers; {self._summary()})"])


def _base_path(root: nn.Module) -> str:
    """Return the path of the model's ``base_model``, as transformers defines it; empty if that is the model itself."""
    base = getattr(root, "base_model", root)
    return next((path for path, module in root.named_modules() if module is base), "")


def _pattern(tensor_path: TensorPath, block: str) -> str:
    """Return a tensor path as text, with the layer masked and the scale appended."""
    factor = "" if tensor_path.scale == 1.0 else f" * {tensor_path.scale:.6g}"
    return f"{_masked(str(tensor_path), block)}{factor}"


def _masked(text: str, block: str) -> str:
    """Replace the number at the end of a block's path by ``L`` wherever a text has that path; no other number."""
    if not block:
        return text
    return re.sub(rf"(?<![\w.]){re.escape(block)}(?!\w)", f"{block.rpartition('.')[0]}.{LAYER}".lstrip("."), text)
