"""One SAE that a search found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..functional.short_repr import short_repr

if TYPE_CHECKING:
    from ..modeling import SAEModel


@dataclass(frozen=True)
class SearchResult:
    """One SAE that can be loaded; fields that are not known before it is opened are None.

    Attributes:
        repo: repository on the Hub.
        subfolder: folder or file of the SAE inside it.
        revision: the commit, if the result is only for that one.
        base_model: repository of the model that it was trained on.
        site: the site that it reads, such as ``"resid_post.12"``.
        site_out: the site that a transcoder writes; None if it is `site`.
        layer: the block of its site.
        d_sae: number of latents.
        architecture: such as ``"jumprelu"``.
        l0: mean number of active latents per token.
        l0_kind: ``"measured"``; or ``"target"``, if `l0` is the target of training or the k of a TopK.
        neuronpedia: name of its dashboards, as ``<model>/<sae>``.
        release: the release that lists it; None if it is not in the index.
    """

    repo: str
    subfolder: str = ""
    revision: str | None = None
    base_model: str | None = None
    site: str | None = None
    site_out: str | None = None
    layer: int | None = None
    d_sae: int | None = None
    architecture: str | None = None
    l0: float | None = None
    l0_kind: str | None = None
    neuronpedia: str | None = None
    release: str | None = None

    __repr__ = short_repr

    @property
    def code(self) -> str:
        """The line that loads it."""
        return f"SAEModel.from_pretrained({', '.join(self.arguments)})"

    @property
    def arguments(self) -> list[str]:
        """The arguments in `code`."""
        # Names come from the Hub: JSON quotes them safely, whatever they contain.
        quoted = [json.dumps(name) for name in (self.repo, self.subfolder) if name]
        return quoted + ([f"revision={json.dumps(self.revision)}"] if self.revision else [])

    def load(self, **kwargs: Any) -> SAEModel:
        """Load it.

        Args:
            **kwargs: further arguments of `SAEModel.from_pretrained`, such as ``latents=`` or ``dtype=``.
        """
        from ..modeling import SAEModel

        return SAEModel.from_pretrained(self.repo, self.subfolder, **{"revision": self.revision, **kwargs})
