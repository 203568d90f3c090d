"""Proposals of which modules are a model's blocks; `blocks.find_chain` accepts one only if the numbers prove it.

For a model family that no general proposal covers, add a file here that registers one more `Proposal`. Other
distributions can add theirs through the entry-point group with this package's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from ...registry import Registry


@dataclass(frozen=True, slots=True)
class Proposal:
    """One way of proposing block lists.

    Args:
        name: short name, for evidence and messages.
        rank: proposals are tried from low to high; general ones use 10 to 50, those for one family less than 10.
        propose: takes the model without wrappers and yields lists of module paths, each in execution order.
    """

    name: str
    rank: int
    propose: Callable[[nn.Module], Iterator[list[str]]]


PROPOSALS: Registry[Proposal] = Registry("block proposal", __name__)


def proposals() -> list[Proposal]:
    """Return all proposals in the order in which to try them."""
    return sorted(PROPOSALS.values(), key=lambda proposal: (proposal.rank, proposal.name))
