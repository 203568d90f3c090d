"""Interventions as plain functions of torch operations, which run where this package is not installed.

A server that runs a trace rebuilds functions from their source, and offers them little more than torch and Python's
own types. So what the interventions do at a site is recorded as torch operations on a block of tokens. Operations on
constants are computed while recording, so that only those rows of an SAE remain that the edited latents need. No
equation is written twice: the recorded operations are those that the hooks run.
"""

from __future__ import annotations

import hashlib
import linecache
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ...errors import AttachError
from ...interventions import ModelCall, TokenContext
from ...sites import Slot
from ...sites.transforms import view
from ..apply import apply_interventions
from ..attach import Attachment
from ..attach_report import Record

BLOCK = 64
"""Tokens that a recorded function takes at once, no more and no fewer."""

_INPUTS = ["x", "index", "prompt_length", "special", "ids"]


class _Unwatched(Record):
    """A record that keeps nothing: while operations are recorded there are no values."""

    def watch(self, value: Tensor, mask: Tensor | bool) -> None:
        """Do nothing."""

    def watch_range(self, beyond: Tensor, dtype: torch.dtype) -> None:
        """Do nothing."""


class _SingleTokens(TokenContext):
    """Tokens whose rows and columns in the batch are unknown."""

    @property
    def batch_rows(self) -> int:
        """Refuse."""
        raise AttachError("it depends on the rows of the batch.")

    @property
    def owners(self) -> Tensor:
        """Refuse."""
        raise AttachError("it depends on the rows of the batch.")

    def columns_of(self, values: Tensor, what: str, fill: Any = 0) -> Tensor:
        """Refuse."""
        raise AttachError("it depends on the columns of the batch.")


class _SingleTokensCall(ModelCall):
    """A forward that keeps nothing for the next one."""

    def remember(self, owner: object, now: Tensor) -> Tensor:
        """Refuse."""
        raise AttachError("it depends on earlier tokens.")


def portable(attachment: Attachment, slot: Slot, seen: Sequence[Slot]) -> tuple[Any, dict[str, Tensor]]:
    """Record the interventions at one site as a function of torch operations.

    Args:
        attachment: the interventions.
        slot: the site.
        seen: the sites before it whose activations are read.

    Returns:
        A function that uses torch alone and returns the new activation, and its constants. It takes the constants; the
        raw activation ``[BLOCK, 1, width]`` in float32; index, prompt length, mask of special tokens and ids,
        ``[BLOCK, 1]`` each; and the raw activations at `seen`.

    Raises:
        AttachError: if the edit of a token depends on other tokens, rows or columns, or Python branches on values.
    """
    records = [
        _Unwatched(each.intervention, each.output, each.transforms)
        for each in attachment.records.get(slot.tensor_path, ())
    ]

    def act(x: Tensor, index: Tensor, prompt_length: Tensor, special: Tensor, ids: Tensor, *raws: Tensor) -> Tensor:
        tokens = _SingleTokens(index, prompt_length, special, phase="mixed", end=1, ids=ids)
        call, here = _SingleTokensCall(tokens), view(x, slot.tensor_path.steps)
        before = [(other, view(raw, other.tensor_path.steps).value) for other, raw in zip(seen, raws, strict=True)]
        for other, value in (*before, (slot, here.value)):
            for site, transforms in attachment.reads.get(other.tensor_path, ()):
                call.see(site, view(value, transforms).value)
        new = apply_interventions(here.value, call, records, attachment.placed, replaying=True)
        return x if new is None else here.written(new) if slot.tensor_path.steps else new

    # With gradients, no shortcut is chosen by looking at values.
    floats = [torch.zeros(BLOCK, 1, each.width, requires_grad=True) for each in (slot, *seen)]
    numbers = [torch.zeros(BLOCK, 1, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.bool, torch.int64)]
    try:
        with torch.enable_grad():
            inputs = (floats[0], *numbers, *floats[1:])
            act(*inputs)  # fills caches, so that the look-ups are not recorded
            module = make_fx(act)(*inputs)
        return _function_of(module, f"at_{slot.site.name}".replace(".", "_"))
    except RuntimeError as error:
        names = ", ".join(dict.fromkeys(type(record.intervention).__name__ for record in records))
        raise AttachError(
            f"{names} at {slot.site} cannot be sent to another machine, where it must run token by token with torch "
            f"operations alone: {str(error).splitlines()[0]}"
        ) from error


def _function_of(module: fx.GraphModule, name: str) -> tuple[Any, dict[str, Tensor]]:
    """Return recorded operations as a function that has source, and the constants that it needs."""
    known: dict[fx.Node, Any] = {}
    written: dict[fx.Node, str] = {}
    constants: dict[str, Tensor] = {}
    inputs: list[str] = []
    lines: list[str] = []

    def text_of(value: Any) -> str:
        if isinstance(value, fx.Node) and value not in written:  # a constant that is needed now
            key = f"c{len(constants)}"
            # The clone keeps the memory layout, which determines the order of summation in a product.
            constants[key] = known[value].detach().clone()
            written[value] = f"constants[{key!r}]"
        return written[value] if isinstance(value, fx.Node) else _text_of(value, text_of)

    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            written[node] = _INPUTS[len(inputs)] if len(inputs) < len(_INPUTS) else f"raw_{len(inputs)}"
            inputs.append(written[node])
        elif node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        elif node.op == "output":
            lines.append(f"    return {text_of(node.args[0])}")
        elif node.all_input_nodes and all(each in known for each in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
        else:
            written[node] = f"v{len(lines)}"
            lines.append(f"    {written[node]} = {_call_of(node, text_of)}")
    source = f"def {name}(constants, {', '.join(inputs)}):\n" + "\n".join(lines) + "\n"
    return _compiled(source, name), constants


def _call_of(node: fx.Node, text_of: Any) -> str:
    """Return the source of one operation."""
    if node.target is operator.getitem:
        return f"{text_of(node.args[0])}[{text_of(node.args[1])}]"
    schema = getattr(node.target, "_schema", None)
    if schema is None or not str(node.target).startswith("aten."):
        raise RuntimeError(f"{node.target} is not an operation of torch.")
    arguments = [text_of(each) for each in node.args]
    if schema.is_mutable and arguments[0].startswith("constants["):
        raise RuntimeError(f"{node.target} would write into a constant.")
    arguments += [f"{name}={text_of(value)}" for name, value in node.kwargs.items()]
    return f"torch.ops.{node.target}({', '.join(arguments)})"


def _text_of(value: Any, text_of: Any) -> str:
    """Return the source of an argument that is not the result of an operation."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text_of, value)) + "]"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float):
        return f"float({str(value)!r})"  # also infinity
    if value is None or isinstance(value, int | str | torch.dtype | torch.layout | torch.memory_format):
        return repr(value)
    raise RuntimeError(f"an argument of type {type(value).__name__} cannot be written as source.")


def _compiled(source: str, name: str) -> Any:
    """Compile a function from source that `inspect` finds, so that it is pickled by source."""
    file = f"<{name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = {"torch": torch, "__name__": "__main__"}  # functions of no module are pickled by source
    exec(compile(source, file, "exec"), space)
    return space[name]


def by_value(function: Any, **uses: Any) -> Any:
    """Return a function that is pickled by its source rather than by its name.

    Args:
        function: one that uses only torch, builtins and what is given here.
        **uses: what it uses by these names.
    """
    space: dict[str, Any] = {**function.__globals__, **uses, "__name__": "__main__"}
    copy = type(function)(function.__code__, space, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    space[function.__name__] = copy  # it may call itself
    copy.__module__ = "__main__"
    return copy
