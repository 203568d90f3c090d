"""The arrangement of processes that share an SAE's latents, batches, or a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from ...errors import InputError
from ...sites.multi_rank import ranks_of, tensor_ranks
from ..processes import Processes
from ..streams import ActivationStream, ModelActivations
from .gathered import GatheredActivations


@dataclass(frozen=True)
class Grid:
    """The processes of a run in rows of consecutive ranks; each row together holds every latent once.

    Attributes:
        everyone: all processes.
        latents: the row of this process, which holds the other latents and sees the same tokens.
        data: its column, which holds the same latents and sees other tokens.
        readers: the processes of its row that read different text and exchange activations; with a tensor-parallel
            base model, processes that share it read the same text and do not exchange.
        model_processes: number of consecutive ranks that share one base model.
    """

    everyone: Processes = field(default_factory=Processes)
    latents: Processes = field(default_factory=Processes)
    data: Processes = field(default_factory=Processes)
    readers: Processes = field(default_factory=Processes)
    model_processes: int = 1

    @classmethod
    def arrange(cls, latents: int, stream: ActivationStream, device_type: str) -> Grid:
        """Arrange all processes of the run.

        Args:
            latents: number of processes that share an SAE; 1 for a whole SAE in every process.
            stream: of activations; its model may itself be split over processes.
            device_type: of the processes, such as ``"cuda"``.

        Raises:
            InputError: if the number of processes, or the split of the base model, does not allow it.
        """
        everyone = Processes.all()
        if latents < 1 or everyone.count % latents:
            raise InputError(
                f"{everyone.count} processes cannot be arranged in rows of {latents} that share an SAE; expected a "
                f"divisor of {everyone.count}."
            )
        split = tensor_ranks(stream.model) if isinstance(stream, ModelActivations) else ()
        if isinstance(stream, ModelActivations) and set(ranks_of(stream.model)) - set(split):
            raise InputError(
                f"The {type(stream.model).__name__} is split by FSDP over the processes "
                f"{list(ranks_of(stream.model))}, which must run every forward together, but each reads its own text "
                "in its own number of forwards: load the whole model in each, or split it by tensor parallelism."
            )
        model_processes = _model_processes(everyone, split)
        if latents % model_processes:
            raise InputError(
                f"The base model is split over {model_processes} processes, which all read the same text, and "
                f"{latents} share an SAE: expected a multiple of {model_processes} as latent_parallel."
            )
        if latents == 1:
            return cls(everyone, Processes(), everyone, Processes())
        rows = everyone.count // latents
        mesh = init_device_mesh(device_type, (rows, latents), mesh_dim_names=("data", "latents"))
        shape = (rows, latents // model_processes, model_processes)
        finer = init_device_mesh(device_type, shape, mesh_dim_names=("data", "readers", "model"))
        return cls(
            everyone,
            _of(mesh.get_group("latents")),
            _of(mesh.get_group("data")),
            _of(finer.get_group("readers")),
            model_processes,
        )

    def part(self, stream: ActivationStream) -> ActivationStream:
        """Return this process's part of a stream, joined with those that it receives from others."""
        if self.everyone.alone:
            return stream
        # Numbered so that rows, exchanged by readers and then by columns, are in the order of a single process.
        number = self.readers.rank * self.data.count + self.data.rank
        own = stream.shard(number, self.readers.count * self.data.count)
        return GatheredActivations(own, self.everyone, self.readers)


def _of(group: distributed.ProcessGroup) -> Processes:
    return Processes(group) if group.size() > 1 else Processes()


def _model_processes(everyone: Processes, ranks: Sequence[int]) -> int:
    """Return the number of processes that share a base model.

    Raises:
        InputError: if their ranks are not consecutive, as in a row of the grid.
    """
    first = everyone.rank - everyone.rank % max(1, len(ranks))
    if ranks and tuple(ranks) != tuple(range(first, first + len(ranks))):
        raise InputError(
            f"The base model is split over the processes {list(ranks)}; expected consecutive ranks, such as "
            f"{list(range(first, first + len(ranks)))}."
        )
    return max(1, len(ranks))
