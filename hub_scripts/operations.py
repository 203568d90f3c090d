"""Record the operations of one forward, and find what each block adds to the residual stream and what it reads.

This uses tensors and operations only, not modules or sites, so that it can check the site resolver independently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CLOSE = 1e-5  # relative error of two tensors that are the same up to rounding
_PICKS = ("index", "index_select", "gather")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "dot", "grouped_mm")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation on tensors of floating-point numbers.

    Args:
        kind: ``"product"`` for matrix products and operations that mix channels like one, ``"add"``, ``"scale"`` for a
            product with one number or a broadcast tensor, ``"pick"`` for some rows of a tensor, else ``"other"``.
        inputs: names of the input values.
        output: name of the output value.
        factor: of the second operand of an addition, or of the first of a scaling.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    factor: float | Tensor = 1.0


class Recording(TorchDispatchMode):
    """Records all operations within its context; values are named by a digest of their content.

    Values of equal content are the same value: a view, a copy, and a dropout that drops nothing are not recorded.
    Tensors whose elements are all equal are not tracked, since they carry no information.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.made: dict[str, Operation] = {}
        """The operation that first produced each value, in the order of execution."""
        self._alive: list[Tensor] = []  # prevents that the memory of a tensor is reused for another
        self._written: dict[int, dict[str, None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = tuple(value for value in map(self._input_value, given) if value)
        operands = [self.value(arg) if isinstance(arg, Tensor) else "" for arg in args]
        out = func(*args, **(kwargs or {}))
        kind, factor, inputs = _kind(func, args, kwargs or {}, operands, inputs)
        for tensor in tree_leaves(out):
            output = self.value(tensor) if isinstance(tensor, Tensor) else ""
            if output:
                self._note(Operation(kind, inputs, output, factor), tensor)
                self._alive.append(tensor)
                self._written.setdefault(tensor.untyped_storage().data_ptr(), {})[output] = None
        return out

    def value(self, tensor: Tensor) -> str:
        """Return the name of a tensor's content; empty if it is not tracked."""
        if not tensor.is_floating_point() or not tensor.numel():
            return ""
        flat = tensor.detach().contiguous().reshape(-1)
        if bool((flat == flat[0]).all()):
            return ""
        digest = hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=12).hexdigest()
        return f"{tensor.dtype}:{digest}"

    def _input_value(self, tensor: Tensor) -> str:
        value = self.value(tensor)
        if value and value not in self.values:  # no single operation produced it: it was written in parts
            parts = self._written.get(tensor.untyped_storage().data_ptr(), {})
            self._note(Operation("other", tuple(parts), value), tensor)
        return value

    def _note(self, operation: Operation, given: Tensor) -> None:
        if operation.output not in self.values:
            self.values[operation.output] = given.detach().clone()
            self.made[operation.output] = operation


def _kind(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], operands: list[str], inputs: tuple[str, ...]
) -> tuple[str, float | Tensor, tuple[str, ...]]:
    """Return an operation's kind, factor, and inputs; for an addition or a scaling, the operands in order."""
    name = func._schema.name.partition("::")[2].strip("_")
    if name in _PRODUCTS or "attention" in name or name.endswith(("_mm", "_linear")):
        return "product", 1.0, inputs
    if name == "convolution" and args[-1] < args[0].shape[1]:  # not a depthwise one, which mixes no channels
        return "product", 1.0, inputs
    if name in ("add", "sub") and len(operands) == 2 and all(operands):
        sign = 1.0 if name == "add" else -1.0
        return "add", sign * kwargs.get("alpha", 1), (operands[0], operands[1])
    if name in ("mul", "div") and len(operands) == 2:
        first, second = args
        one = not isinstance(second, Tensor) or second.numel() in (1, *second.shape[-1:])
        if one and isinstance(first, Tensor) and operands[0]:
            factor = second.detach().clone() if isinstance(second, Tensor) else second
            return "scale", factor if name == "mul" else 1 / factor, (operands[0],)
    return "pick" if name in _PICKS else "other", 1.0, inputs


@dataclass(frozen=True, slots=True)
class Term:
    """A summand of the residual stream.

    Attributes:
        value: its name.
        content: the tensor that is added, with its factor.
    """

    value: str
    content: Tensor


class Block:
    """The operations of one block, between two values of the residual stream.

    Args:
        recording: the recorded forward.
        start: the stream before the block.
        end: the stream after it.
    """

    def __init__(self, recording: Recording, start: Tensor, end: Tensor) -> None:
        self._made, self._values = recording.made, recording.values
        self._order = {value: number for number, value in enumerate(recording.made)}
        first, last = recording.value(start), recording.value(end)
        self._near = self._dominators(first, products=False)
        self._after = self._dominators(first, products=True)
        self.stream = {value for value in (first, *self._back(last)) if value in self._near}
        """The names of all values of the stream from start to end."""

    @property
    def values(self) -> list[Tensor]:
        """The values of the stream."""
        return [self._values[value] for value in self.stream]

    def _dominators(self, first: str, products: bool) -> dict[str, set[str]]:
        """Return, for each value computed from the first one, the values on every path to it.

        Args:
            first: the value at which all paths start.
            products: whether paths may include products.
        """
        dominators = {first: {first}}
        for made in self._made.values():
            before = [dominators[value] for value in made.inputs if value in dominators]
            if before and made.output not in dominators and (products or made.kind != "product"):
                dominators[made.output] = set.intersection(*before) | {made.output}
        return dominators

    def _back(self, value: str) -> Iterator[str]:
        """Yield a value and all values that it was computed from since the last products."""
        return self._walk(value, lambda made: made.inputs if made.kind != "product" else ())

    def _branch(self, value: str) -> Iterator[str]:
        """Yield a value and all that it was computed from, back to values computed from the start by no product."""
        return self._walk(value, lambda made: tuple(item for item in made.inputs if item not in self._near))

    def _walk(self, value: str, before: Callable[[Operation], tuple[str, ...]]) -> Iterator[str]:
        todo, known = [value], set()
        while todo:
            current = todo.pop()
            if current not in known:
                known.add(current)
                yield current
                todo += before(self._made[current]) if current in self._made else ()

    def terms(self) -> list[Term]:
        """Return all summands of the stream: each operand of an addition, and, if it is a sum, its parts."""
        found: list[Term] = []
        for made in self._made.values():
            if made.kind == "add" and made.output in self.stream:
                for value, factor, other in zip(made.inputs, (1.0, made.factor), made.inputs[::-1], strict=True):
                    if value not in self.stream and other in self.stream:
                        found += self._parts(value, factor)
        return found

    def _parts(self, value: str, factor: float | Tensor) -> Iterator[Term]:
        yield Term(value, self._values[value] * factor)
        made = self._made.get(value)
        if made is not None and made.kind == "add":
            yield from self._parts(made.inputs[0], factor)
            yield from self._parts(made.inputs[1], made.factor * factor)
        elif made is not None and made.kind == "scale":
            yield from list(self._parts(made.inputs[0], made.factor * factor))[1:]

    def first_operands(self, term: Term) -> list[Tensor]:
        """Return the input of the first products on the paths to a term, under up to two definitions.

        First: the products that read values computed from the stream without a product; if they read several values,
        the last value from which all of them are computed. Second, for sublayers whose input is mixed from earlier
        values of the stream by products: the first value of the stream's size on every path to the term that only
        products read.
        """
        products = [made for value in self._branch(term.value) if (made := self._product(value)) is not None]
        read = {value for made in products for value in made.inputs if value in self._near}
        found = [self._last(set.intersection(*(self._near[value] for value in read)))] if read else []
        inside = set(self._walk(term.value, lambda made: tuple(v for v in made.inputs if v in self._after)))
        readers: dict[str, set[str]] = {}
        for value in inside & set(self._made):
            for item in self._made[value].inputs:
                readers.setdefault(item, set()).add(self._made[value].kind)
        size = term.content.numel()
        only = [
            v for v in self._after.get(term.value, ()) if "product" in readers.get(v, set()) <= {"product", "pick"}
        ]
        only = [value for value in only if self._values[value].numel() == size]
        found += [min(only, key=lambda value: self._order.get(value, -1))] if only else []
        return [self._values[value] for value in found]

    def last_operands(self, term: Term) -> list[Tensor]:
        """Return the inputs of the last products before a term."""
        products = [made for value in self._back(term.value) if (made := self._product(value)) is not None]
        return [self._values[value] for made in products for value in made.inputs]

    def _product(self, value: str) -> Operation | None:
        made = self._made.get(value)
        return made if made is not None and made.kind == "product" else None

    def _last(self, values: Collection[str]) -> str:
        return max(values, key=lambda value: self._order.get(value, -1))


def is_same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors hold the same elements in the same order, up to rounding."""
    if found.numel() != wanted.numel():
        return False
    left, right = found.reshape(-1).double(), wanted.reshape(-1).double()
    return float((left - right).norm()) <= CLOSE * float(right.norm())
