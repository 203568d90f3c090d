"""Models on several ranks: tensors that are split between them, and forwards that must not stop early.

In tensor parallelism most activations are the same on every rank, but the input or output of a projection may be one
rank's part of a wider tensor. This is not looked up in a plan: all ranks compare what they recorded in the probe. So
every rank must resolve the same models, in the same order, just as it must call them.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from ..errors import SiteError
from ..upstream.torch_private import default_store

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = 300.0
"""How many seconds to wait for the other ranks at a point that all must reach."""


@dataclass(frozen=True, slots=True)
class Shards:
    """How the last dimension of a tensor is split over ranks: in equal parts, the last of which may be shorter.

    Args:
        mesh: the ranks, one-dimensional.
        width: last dimension of the whole tensor.
    """

    mesh: DeviceMesh
    width: int

    @property
    def part_width(self) -> int:
        """Last dimension of this rank's part."""
        return self.widths()[self.mesh.get_local_rank()]

    def widths(self) -> list[int]:
        """Return the last dimension of each rank's part."""
        step = ceil(self.width / self.mesh.size())
        return [max(0, min(step, self.width - rank * step)) for rank in range(self.mesh.size())]

    def whole(self, part: Tensor) -> Tensor:
        """Gather the whole tensor on every rank; gradients flow back to the parts.

        Args:
            part: this rank's part ``[..., part_width]``.

        Returns:
            The tensor ``[..., width]``.
        """
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((*part.shape[:-1], self.width))
        stride = torch.empty(shape, device="meta").stride()
        placements = [Shard(part.ndim - 1)]
        split = DTensor.from_local(
            part.contiguous(), self.mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return split.full_tensor()

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor that all ranks hold.

        Args:
            whole: the tensor ``[..., width]``, the same on all ranks.

        Returns:
            The part ``[..., part_width]``.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        held = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return held.redistribute(placements=[Shard(whole.ndim - 1)]).to_local().contiguous()


@dataclass(frozen=True, slots=True)
class Ranks:
    """The tensors that all ranks of tensor parallelism recorded in one forward.

    Args:
        mesh: the ranks, one-dimensional.
        seen: for each rank, the digest and shape of every tensor, by a key that is the same on all ranks.
    """

    mesh: DeviceMesh
    seen: Sequence[Mapping[Any, tuple[str, tuple[int, ...]]]]

    @classmethod
    def compare(cls, mesh: DeviceMesh, seen: Mapping[Any, tuple[str, tuple[int, ...]]]) -> Ranks:
        """Exchange the recorded tensors' digests and shapes; a collective, which all ranks must call."""
        every: list[Any] = [None] * mesh.size()
        distributed.all_gather_object(every, dict(seen), group=mesh.get_group())
        return cls(mesh, every)

    def agree(self, key: Hashable) -> bool:
        """Whether a tensor is the same on all ranks, bit for bit."""
        return len({rank.get(key, ("", ()))[0] for rank in self.seen}) == 1

    def split(self, key: Hashable, declared: int | None) -> Shards | str | None:
        """Return how a tensor is split.

        Args:
            key: the tensor.
            declared: width of the whole tensor according to its module; None if the module does not state it.

        Returns:
            The shards, None if every rank has the whole tensor, or the reason why neither is certain.
        """
        if self.agree(key):
            return None
        shapes = [rank[key][1] for rank in self.seen if key in rank]
        shards = Shards(self.mesh, declared or 0)
        if declared and [shape[-1] for shape in shapes] == shards.widths():
            return shards
        return (
            f"its values differ between the {self.mesh.size()} ranks of tensor parallelism, and the module does not "
            "state the width of a whole tensor of which they could be parts"
        )

    def require_same(self, outcome: object, what: str) -> None:
        """Raise on all ranks unless all have the same result; a collective, which all ranks must call.

        Raises:
            SiteError: if the results differ.
        """
        every: list[Any] = [None] * self.mesh.size()
        distributed.all_gather_object(every, outcome, group=self.mesh.get_group())
        if any(other != every[0] for other in every):
            raise SiteError(
                f"The {self.mesh.size()} ranks of tensor parallelism have {what} that is not bitwise equal on all of "
                "them. The same edit would have another effect on each rank, so no site can be proven."
            )

    def refuse_split_sequence(self, batch: int, sequence: int) -> None:
        """Raise if each rank holds only some tokens of a sequence.

        Raises:
            SiteError: in sequence parallelism.
        """
        for key in self.seen[0]:
            shapes = [rank[key][1] for rank in self.seen if key in rank]
            lengths = [shape[1] for shape in shapes if len(shape) == 3 and shape[0] == batch]
            if len(lengths) == self.mesh.size() and sum(lengths) == sequence and not self.agree(key):
                raise SiteError(
                    f"The {self.mesh.size()} ranks of tensor parallelism hold different tokens of one sequence "
                    f"({lengths} of {sequence}), so no rank knows the tokens' positions; load the model with a plan "
                    "that has no sequence parallelism."
                )


def mesh_within(module: nn.Module) -> DeviceMesh | None:
    """Return the ranks over which a module's parameters are split while it runs, None if they are not.

    FSDP gathers its parameters before a module runs, so only tensor parallelism splits them then.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    values: Iterable[Any] = module._parameters.values()
    meshes = (value.device_mesh for value in values if isinstance(value, DTensor))
    return next((mesh for mesh in meshes if mesh.ndim == 1 and mesh.size() > 1), None)


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as torch's own tensor-parallel plans pass between modules; none is edited."""
    return hasattr(tensor, "device_mesh")


def ranks_of(root: nn.Module) -> tuple[int, ...]:
    """Return all ranks that a forward of a model needs, empty if it needs this process alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ()
    from torch.distributed.tensor import DTensor

    split = [value for value in root.parameters() if isinstance(value, DTensor)]
    kinds = {(value.device_mesh, tuple(each.is_replicate() for each in value.placements)) for value in split}
    found: set[int] = set()
    for mesh, replicated in kinds:
        here = mesh.get_coordinate()
        if here is not None:  # replicas of the model run independently
            same = tuple(at if whole else slice(None) for at, whole in zip(here, replicated, strict=True))
            found |= {int(rank) for rank in mesh.mesh[same].flatten()}
    return tuple(sorted(found)) if len(found) > 1 else ()


def tensor_ranks(root: nn.Module) -> tuple[int, ...]:
    """Return the ranks over which tensor parallelism splits a model, empty if it does not; all must call it alike."""
    if not ranks_of(root):
        return ()
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    meshes = {value.device_mesh for value in root.parameters() if isinstance(value, DTensor)}
    fully_sharded = any(isinstance(module, FSDPModule) for module in root.modules())
    for mesh in meshes:
        named = "tp" in (mesh.mesh_dim_names or ())
        if named or (mesh.ndim == 1 and not fully_sharded):
            found = mesh["tp"] if named and mesh.ndim > 1 else mesh
            return tuple(int(rank) for rank in found.mesh.flatten()) if found.size() > 1 else ()
    return ()


def absent(ranks: Sequence[int], point: str) -> list[int]:
    """Wait until all ranks have reached a point of the program as often as this one; return those that have not.

    Unlike a collective, this does not hang if a rank never comes, and does not mix with the model's own collectives:
    it only uses the store of the process group.

    Args:
        ranks: the ranks that should come, this one included, by their number in the whole process group.
        point: name of the point, the same on all ranks.

    Returns:
        The ranks that did not come within `PATIENCE` seconds; if there are any, this rank's arrival is undone.
    """
    if not ranks:
        return []
    store = default_store()
    keys = {rank: f"hf_gated_sae/{point}/{list(ranks)}/{rank}" for rank in ranks}
    mine = keys[distributed.get_rank()]
    times, until = store.add(mine, 1), time.monotonic() + PATIENCE
    while True:
        missing = [rank for rank, key in keys.items() if store.add(key, 0) < times]
        if not missing:
            return []
        if time.monotonic() > until:
            store.add(mine, -1)
            return missing
        time.sleep(0.01)


def wait_for_ranks(root: nn.Module) -> None:
    """Wait until all ranks that a forward of a model needs are about to probe it.

    Raises:
        SiteError: if some do not come within `PATIENCE` seconds.
    """
    ranks = ranks_of(root)
    missing = absent(ranks, f"resolve/{type(root).__name__}")
    if missing:
        raise SiteError(
            f"A forward of the {type(root).__name__} needs the ranks {list(ranks)} together, but {missing} did not "
            f"resolve its sites within {PATIENCE:g} seconds: call resolve(), attach() and capture() on all ranks."
        )


def declared_width(module: nn.Module, port: str) -> int | None:
    """Return the width of a linear module's whole input or output, None for other modules."""
    width = getattr(module, "in_features" if port == "input" else "out_features", None)
    return width if isinstance(width, int) else None


def refuse_stages(root: nn.Module) -> None:
    """Raise if other ranks hold some of the layers.

    Raises:
        SiteError: in pipeline parallelism.
    """
    config = getattr(getattr(root, "config", None), "distributed_config", None)
    stages = config.get("pp_size") if isinstance(config, Mapping) else getattr(config, "pp_size", None)
    if isinstance(stages, int) and stages > 1:
        raise SiteError(
            f"The model is split into {stages} pipeline stages, so each rank holds only some of its layers and none "
            "can prove the sites; load it with tensor parallelism or a device_map instead."
        )


def must_finish(model: nn.Module) -> bool:
    """Whether a forward of the model must run to its end.

    FSDP, and accelerate where it offloads weights, release the weights in hooks that run when a module returns.
    """
    kinds: tuple[type, ...] = ()
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        kinds = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(module, kinds) or _offloads(getattr(module, "_hf_hook", None)) for module in model.modules())


def _offloads(hook: Any) -> bool:
    """Whether an accelerate hook, or one that it contains, offloads weights after the forward."""
    return bool(getattr(hook, "offload", False)) or any(_offloads(each) for each in getattr(hook, "hooks", ()))
