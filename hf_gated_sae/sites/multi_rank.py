"""Models over several ranks: tensors that are split between them, and forwards that must not be cut short.

In tensor parallelism most activations are the same on every rank, but what a projection reads or gives may be one
rank's part of a wider tensor. Which of the two it is, is not looked up in a plan: all ranks compare what they saw in
the probe. Every rank must therefore ask for the same sites, in the same order, as it must call the model.
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
"""How many seconds to wait for ranks that have to do the same; it is only waited out for those that never do it."""


@dataclass(frozen=True, slots=True)
class Shards:
    """How the last dimension of a tensor is split over ranks: in runs of equal length, of which the last are shorter.

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
        """Gather the tensor from all ranks; each gets all of it, and gradients flow back to the parts.

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
        """Cut this rank's part out of a tensor that all ranks hold.

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
    """What all ranks of tensor parallelism saw in one forward.

    Args:
        mesh: the ranks, one-dimensional.
        seen: for each rank, the number of the content and the shape of every tensor, by a name that all ranks share.
    """

    mesh: DeviceMesh
    seen: Sequence[Mapping[Any, tuple[str, tuple[int, ...]]]]

    @classmethod
    def compare(cls, mesh: DeviceMesh, seen: Mapping[Any, tuple[str, tuple[int, ...]]]) -> Ranks:
        """Let every rank know what the others saw; all ranks must call this at the same time."""
        every: list[Any] = [None] * mesh.size()
        distributed.all_gather_object(every, dict(seen), group=mesh.get_group())
        return cls(mesh, every)

    def agree(self, key: Hashable) -> bool:
        """Whether all ranks saw the same, bit for bit."""
        return len({rank.get(key, ("", ()))[0] for rank in self.seen}) == 1

    def split(self, key: Hashable, declared: int | None) -> Shards | str | None:
        """Tell how a tensor is split.

        Args:
            key: the tensor.
            declared: how wide the module says that the whole tensor is; None where it does not say.

        Returns:
            The shards, None if every rank has the whole tensor, or the reason why it cannot be told.
        """
        if self.agree(key):
            return None
        shapes = [rank[key][1] for rank in self.seen if key in rank]
        shards = Shards(self.mesh, declared or 0)
        if declared and [shape[-1] for shape in shapes] == shards.widths():
            return shards
        return (
            f"its values differ between the {self.mesh.size()} ranks of tensor parallelism, and the module does not "
            "say which tensor they are the parts of"
        )

    def require_same(self, outcome: object, what: str) -> None:
        """Raise, on all ranks, unless all have come to the same result; all must call this at the same time.

        Raises:
            SiteError: if they have not.
        """
        every: list[Any] = [None] * self.mesh.size()
        distributed.all_gather_object(every, outcome, group=self.mesh.get_group())
        if any(other != every[0] for other in every):
            raise SiteError(
                f"The {self.mesh.size()} ranks of tensor parallelism have {what} that differs from rank to rank, bit "
                "for bit. The same edit would do something else on each of them, so that no site can be proven."
            )

    def refuse_split_sequence(self, batch: int, sequence: int) -> None:
        """Raise if the ranks have different tokens.

        Raises:
            SiteError: in sequence parallelism.
        """
        for key in self.seen[0]:
            shapes = [rank[key][1] for rank in self.seen if key in rank]
            lengths = [shape[1] for shape in shapes if len(shape) == 3 and shape[0] == batch]
            if len(lengths) == self.mesh.size() and sum(lengths) == sequence and not self.agree(key):
                raise SiteError(
                    f"The {self.mesh.size()} ranks of tensor parallelism hold different tokens of one sequence "
                    f"({lengths} of {sequence}), so that no rank can tell a token's position; load the model with a "
                    "plan that has no sequence parallelism."
                )


def mesh_within(module: nn.Module) -> DeviceMesh | None:
    """Return the ranks over which a module's parameters are split while it runs, None if they are not.

    What FSDP splits is whole while a module runs, so that tensor parallelism is all that is left to see.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    values: Iterable[Any] = module._parameters.values()
    meshes = (value.device_mesh for value in values if isinstance(value, DTensor))
    return next((mesh for mesh in meshes if mesh.ndim == 1 and mesh.size() > 1), None)


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is itself one over several ranks, as torch's own plans pass on; no edit is put in those."""
    return hasattr(tensor, "device_mesh")


def ranks_of(root: nn.Module) -> tuple[int, ...]:
    """Return all ranks that a forward of a model needs, empty for a model that runs on its own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ()
    from torch.distributed.tensor import DTensor

    split = [value for value in root.parameters() if isinstance(value, DTensor)]
    kinds = {(value.device_mesh, tuple(place.is_replicate() for place in value.placements)) for value in split}
    found: set[int] = set()
    for mesh, replicated in kinds:
        here = mesh.get_coordinate()
        if here is not None:  # replicas of the model run without each other
            same = tuple(at if whole else slice(None) for at, whole in zip(here, replicated, strict=True))
            found |= {int(rank) for rank in mesh.mesh[same].flatten()}
    return tuple(sorted(found)) if len(found) > 1 else ()


def tensor_ranks(root: nn.Module) -> tuple[int, ...]:
    """Return the ranks among which tensor parallelism splits a model, which all have to run it alike; else none."""
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
    """Tell which ranks have not come to a point of the program as often as this one, after `PATIENCE`.

    A collective would tell, too, but hang, or mix with those of the model, where a rank never comes. This only writes
    to and reads from the store of the process group.

    Args:
        ranks: those that should come, this one among them, by their number in the whole process group.
        point: names the point, alike on all ranks.

    Returns:
        The ranks that have not come; if there are any, this one counts as not having come, either.
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


def meet(root: nn.Module) -> None:
    """Wait until all ranks that a forward of a model needs are about to probe it.

    Raises:
        SiteError: if some do not come.
    """
    ranks = ranks_of(root)
    missing = absent(ranks, f"resolve/{type(root).__name__}")
    if missing:
        raise SiteError(
            f"A forward of the {type(root).__name__} takes the ranks {list(ranks)} together, but {missing} did not "
            f"ask for its sites within {PATIENCE:g} seconds: resolve(), attach() and capture() on all ranks alike."
        )


def declared_width(module: nn.Module, port: str) -> int | None:
    """Return how wide a linear module says that its whole input or output is, None for other modules."""
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
            f"The model is split into {stages} pipeline stages, so that each rank holds only some of its layers and "
            "none can prove the sites; load it with tensor parallelism or a device_map instead."
        )


def must_finish(model: nn.Module) -> bool:
    """Whether a forward of the model must not be cut short.

    FSDP, and accelerate where it offloads weights, put weights away again by hooks that run when a module returns.
    """
    kinds: tuple[type, ...] = ()
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        kinds = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(module, kinds) or _offloads(getattr(module, "_hf_hook", None)) for module in model.modules())


def _offloads(hook: Any) -> bool:
    """Whether an accelerate hook, or one of those that it joins, takes weights away after the forward."""
    return bool(getattr(hook, "offload", False)) or any(_offloads(each) for each in getattr(hook, "hooks", ()))
