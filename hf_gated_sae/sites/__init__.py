"""Resolve names such as ``resid_post.12`` to proven tensors of a model, for any causal LM of transformers."""

from .names._read_name import read as read_name
from .resolver import resolve
from .site import Site
from .site_map import SiteMap, SiteRow
from .slots import Slot
from .transforms import Transform

__all__ = ["Site", "SiteMap", "SiteRow", "Slot", "Transform", "read_name", "resolve"]
