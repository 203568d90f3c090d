"""Finding SAEs: search in the index and on the Hub, and the SAEs of one repository as a set."""

from .sae_set import SAESet
from .search import SearchResult, search

__all__ = ["SAESet", "SearchResult", "search"]
