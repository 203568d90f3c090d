"""Stream positions as checkpoints store them, in JSON and safetensors; and batches of a stream."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from hf_gated_sae.training import ActivationStream


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a state to JSON and safetensors and back."""
    tensors: dict[str, Tensor] = {}

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.contiguous()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, dict):
            assert all(isinstance(name, str) for name in value)
            return {name: put(each) for name, each in value.items()}
        return [put(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(put(state))
    loaded = load(save(tensors))

    def get(value: Any) -> Any:
        if isinstance(value, dict):
            return loaded[value["tensor"]] if set(value) == {"tensor"} else {n: get(each) for n, each in value.items()}
        return [get(each) for each in value] if isinstance(value, list) else value

    return get(json.loads(text))


def first(stream: ActivationStream, batch_size: int, count: int) -> list[dict[str, Tensor]]:
    """Return the next batches of a stream."""
    return list(islice(stream.batches(batch_size), count))


def equal(ones: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    """Whether two lists of batches are bitwise equal."""
    return len(ones) == len(others) and all(
        list(a) == list(b) and all(torch.equal(a[site], b[site]) for site in a)
        for a, b in zip(ones, others, strict=True)
    )
