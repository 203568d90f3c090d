"""Helpers of the scripts: inputs, random weights and the files of a case."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TOKENS = 24
D_IN = 10


def inputs(seed: int = 0, width: int = D_IN) -> Tensor:
    """Return activations ``[tokens, width]`` that are not centred."""
    return 2 * torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed)) + 0.3


@torch.no_grad()
def scramble(module: nn.Module, seed: int = 1, *, size: float = 0.4) -> None:
    """Add noise to every floating-point tensor, so that none has a value that a fresh SAE would have."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = size * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            tensor += noise.abs() if "threshold" in name else noise


def write_case(root: Path, name: str, address: str, x: Tensor, latents: Tensor, output: Tensor, **config: Any) -> None:
    """Write input, latents and output of a checkpoint in ``root/name/repository/address``."""
    folder = root / name
    values = {"x": x, "latents": latents, "output": output}
    np.savez(folder / "expected.npz", **{key: value.detach().float().numpy() for key, value in values.items()})
    (folder / "about.json").write_text(json.dumps({"address": address, "config": config}))


def write_versions(root: Path, *packages: str) -> None:
    """Write which versions the checkpoints come from."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "versions.json").write_text(json.dumps({name: version(name) for name in (*packages, "torch")}))
