"""All proven places of one model, by name."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import nn

from ..errors import SiteError, did_you_mean
from .site import Site
from .slots import Place, Slot


class SiteMap:
    """The places of one model by name.

    Args:
        root: the model without wrappers; only a weak reference is kept.
        slots: the proven semantic sites.
        refused: the other semantic sites, each with the reason.
        paths: for each side of each module, the place of its activation, or why it has none.
        layers: number of blocks.
        text_path: path of the module that sees the ids and holds the blocks.
        evidence: how the blocks were found, or why they were not.
    """

    def __init__(
        self,
        root: nn.Module,
        slots: Mapping[Site, Slot],
        refused: Mapping[Site, str],
        paths: Mapping[tuple[str, str], Place | str],
        layers: int,
        text_path: str,
        evidence: str,
    ) -> None:
        self.n_layers = layers
        self.refused = dict(refused)
        self.evidence = evidence
        self._root = weakref.ref(root)
        self._slots = dict(slots)
        self._paths = dict(paths)
        self._text_path = text_path

    @property
    def text_model(self) -> nn.Module:
        """The module that sees the ids and holds the blocks."""
        root = self._root()
        if root is None:
            raise SiteError("The model whose sites these are no longer exists.")
        return root.get_submodule(self._text_path)

    def names(self) -> list[str]:
        """Return every proven semantic name in execution order."""
        return [str(site) for site in sorted(self._slots, key=lambda site: self._slots[site].order)]

    def __contains__(self, name: object) -> bool:
        """Whether the name is a site that can be used."""
        try:
            self[name]  # type: ignore[index]  # whatever is no site is refused by the grammar
        except SiteError:
            return False
        return True

    def __getitem__(self, name: str | Site) -> Slot:
        """Return the slot of a site.

        Module paths are those in the model, ``model.layers.3.mlp.output``; one inside its ``base_model``, without the
        first name, is understood, too.

        Raises:
            SiteError: if the name is no site, the layer or module does not exist, or the site could not be proven.
        """
        site = Site.parse(name)
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
            f"The site '{site}' could not be proven in this model, because {reason}. Proven: {self._summary()}. "
            "A module path such as 'model.layers.0.output' names a place directly."
        )

    def _at_path(self, site: Site) -> Slot:
        root = self._root()
        if root is None:
            raise SiteError("The model whose sites these are no longer exists.")
        assert site.port is not None
        found = self._paths.get((site.name, site.port))
        if found is None:  # perhaps a path inside the base model, as some checkpoints write it
            found = self._paths.get((f"{_base_path(root)}.{site.name}", site.port))
        if found is None:
            known = [path for path, _ in root.named_modules() if path]
            if site.name in known:
                raise SiteError(f"The module {site.name!r} did not run in the probe, so '{site}' has no activation.")
            raise SiteError(f"The model has no module {site.name!r}.{did_you_mean(site.name, known)}")
        if isinstance(found, str):
            raise SiteError(f"'{site}' cannot be used as a site: {found}.")
        return Slot(site, found, root)

    def _summary(self) -> str:
        """Name what is proven, without one entry per layer."""
        return (
            ", ".join(dict.fromkeys(f"{site.name}.L" if site.layer is not None else site.name for site in self._slots))
            or "none"
        )

    def __repr__(self) -> str:
        """Name what is proven."""
        return f"SiteMap({self.n_layers} layers; {self._summary()})"


def _base_path(root: nn.Module) -> str:
    """Return the path of what transformers calls a model's base model, empty if that is the model itself."""
    base = getattr(root, "base_model", root)
    return next((path for path, module in root.named_modules() if module is base), "")
