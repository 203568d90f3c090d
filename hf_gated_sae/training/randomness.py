"""Saving and restoring the states of the global random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global generators, the device's included."""
    version, numbers, gauss = random.getstate()
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    keys = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": {**numpy, "state": {"key": keys, "pos": int(numpy["state"]["pos"])}},
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the global generators; the device's only if the state has one."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    keys = inner["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": keys, "pos": inner["pos"]}})
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
