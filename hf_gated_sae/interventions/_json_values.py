"""Convert values of interventions to JSON and back, exactly; other types are refused."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, shown
from ..modeling import SAEModel
from ..sites import Site
from .positions import TokenIds

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


@dataclass(frozen=True)
class Kind:
    """A type of value that JSON does not have, written as ``{tag: content}``.

    Attributes:
        tag: the key.
        type: the class.
        write: returns the content for a value.
        read: returns the value for a content; may raise any error on wrong content.
    """

    tag: str
    type: type
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _write_tensor(tensor: Tensor) -> dict[str, Any]:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"A tensor of {tensor.dtype} cannot be written; expected one of {', '.join(DTYPES)}.")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode("ascii")
    return {"dtype": name, "shape": list(tensor.shape), "data": data}


def _read_tensor(content: Any) -> Tensor:
    if not isinstance(content, dict) or set(content) != {"dtype", "shape", "data"} or content["dtype"] not in DTYPES:
        raise InputError(f"expected a tensor's dtype (one of {', '.join(DTYPES)}), shape and data")
    dtype, shape = DTYPES[content["dtype"]], whole_numbers(content["shape"])
    data = bytearray(base64.b64decode(content["data"], validate=True))
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise InputError(f"{len(data)} bytes do not fit a tensor {content['shape']} of {content['dtype']}")
    if dtype is torch.bool and any(byte > 1 for byte in data):
        raise InputError("a bool tensor has bytes other than 0 and 1")
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _write_mapping(values: Mapping[Any, Any]) -> list[Any]:
    return [[key, value] for key, value in values.items()]


def _read_mapping(content: Any) -> dict[Any, Any]:
    pairs = dict(content)
    if len(pairs) < len(content):
        raise InputError("a key occurs twice")
    return pairs


def whole_numbers(content: Any) -> tuple[int, ...]:
    """Return a list of whole numbers.

    Raises:
        InputError: if it is anything else.
    """
    if not isinstance(content, list) or any(type(number) is not int for number in content):
        raise InputError("expected a list of whole numbers")
    return tuple(content)


def _read_slice(content: Any) -> slice:
    start, stop = content
    return slice(start, stop)


KINDS = (
    Kind("tensor", Tensor, _write_tensor, _read_tensor),
    Kind("mapping", Mapping, _write_mapping, _read_mapping),
    Kind("site", Site, str, Site.parse),
    Kind("slice", slice, lambda span: [span.start, span.stop], _read_slice),
    Kind("token_ids", TokenIds, lambda tokens: list(tokens.ids), lambda content: TokenIds(whole_numbers(content))),
)


def written(value: Any, number_of: Callable[[SAEModel], int]) -> Any:
    """Return the JSON form of a value.

    Args:
        value: value of an intervention's field.
        number_of: returns an SAE's number in the plan.

    Raises:
        InputError: if it is of a type that cannot be written.
    """
    if isinstance(value, SAEModel):
        return {"sae": number_of(value)}
    for kind in KINDS:
        if isinstance(value, kind.type):
            return {kind.tag: kind.write(value)}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [written(each, number_of) for each in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise InputError(
        f"{shown(value)} ({type(value).__name__}) cannot be written; expected numbers, text, tensors, sites or SAEs."
    )


def read(content: Any, sae_of: Callable[[int], SAEModel]) -> Any:
    """Return the value of a JSON form that `written` returned; the content is untrusted.

    Args:
        content: the decoded JSON.
        sae_of: returns an SAE of the plan by its number.

    Raises:
        InputError: if it is not a form that `written` returns.
    """
    if isinstance(content, list):
        return tuple(read(each, sae_of) for each in content)
    if not isinstance(content, dict):
        return content
    [tag, inner] = next(iter(content.items())) if len(content) == 1 else (None, None)
    if tag == "sae" and type(inner) is int:
        return sae_of(inner)
    for kind in KINDS:
        if kind.tag == tag:
            try:
                return kind.read(inner)
            except (ValueError, TypeError, LookupError, RuntimeError, OverflowError, binascii.Error) as error:
                raise InputError(f"{shown(content)} is not a {tag}: {shown(str(error), 200)}.") from error
    tags = ", ".join(["sae", *(kind.tag for kind in KINDS)])
    raise InputError(f"{shown(content)} is not a value; expected one of {tags} with its content.")
