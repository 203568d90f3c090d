"""Small SAEs of every registered architecture, with parameters that no initialisation would give."""

from __future__ import annotations

from typing import Any

import torch

from hf_gated_sae.architectures import architectures
from hf_gated_sae.modeling import SAEModel

D_IN = 6
D_SAE = 16
ONE_SITE = [name for name in architectures if architectures[name].one_site]


def build(architecture: str, *, d_in: int = D_IN, d_sae: int = D_SAE, **settings: Any) -> SAEModel:
    """Return a freshly initialised SAE; settings that the architecture does not have are left out."""
    config_class = architectures[architecture].config_class
    known = {name: value for name, value in settings.items() if name in config_class.__dataclass_fields__}
    if "k" in config_class.__dataclass_fields__:
        known.setdefault("k", 3)
    if "sites" in config_class.__dataclass_fields__ and "site" not in known:
        known.setdefault("sites", ["resid_post.1", "resid_post.2"])
    return architectures[architecture](config_class(d_in=d_in, d_sae=d_sae, **known))


@torch.no_grad()
def randomised(sae: SAEModel, seed: int = 0) -> SAEModel:
    """Fill every parameter and buffer with values from 0.05 to 0.8; those of parameters have both signs."""
    generator = torch.Generator().manual_seed(seed)
    buffers = {name for name, _ in sae.named_buffers()} | {"threshold"}
    for name, tensor in sae.state_dict().items():
        values = 0.05 + 0.75 * torch.rand(tensor.shape, generator=generator)
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        tensor.copy_(values if name in buffers else values * signs)
    return sae


def example(architecture: str = "gated", **settings: Any) -> SAEModel:
    """Return an SAE whose tensors all differ from those of a fresh one."""
    return randomised(build(architecture, **settings))


def assert_same(left: SAEModel, right: SAEModel) -> None:
    """Check that two SAEs have equal configurations and bitwise equal tensors."""
    assert type(left) is type(right)
    assert settings_of(left) == settings_of(right)
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def settings_of(sae: SAEModel) -> dict[str, Any]:
    """Return the configuration's values, without those that depend on saving and loading."""
    written_by_transformers = {"architectures", "dtype", "_name_or_path"}  # when it saves or loads
    return {name: value for name, value in sae.config.to_dict().items() if name not in written_by_transformers}
