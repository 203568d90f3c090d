"""Names such as ``resid_post.12`` to a proven place in a model, for any causal language model of transformers."""

from .resolver import resolve
from .site import Site
from .site_map import SiteMap
from .slots import Slot

__all__ = ["Site", "SiteMap", "Slot", "resolve"]
