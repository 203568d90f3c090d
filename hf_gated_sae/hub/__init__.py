"""Locations of checkpoints: local folders, and Hub repositories pinned to one commit."""

from .location import Location, locate

__all__ = ["Location", "locate"]
