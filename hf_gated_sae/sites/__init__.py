"""Names such as ``resid_post.12`` to a proven place in a model, for any causal language model of transformers."""

from .names._read_name import read as read_name
from .resolver import resolve
from .site import Site
from .site_map import SiteMap, SiteRow
from .slots import Slot
from .transforms import Transform

__all__ = ["Site", "SiteMap", "SiteRow", "Slot", "Transform", "read_name", "resolve"]
