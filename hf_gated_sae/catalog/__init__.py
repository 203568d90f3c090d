"""Find SAEs: search in the index and on the Hub, and the SAEs of one repository as a set."""

from .index_search import search
from .sae_set import SAESet
from .search_result import SearchResult

__all__ = ["SAESet", "SearchResult", "search"]
