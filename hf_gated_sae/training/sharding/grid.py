"""Which processes share what: a part of the latents, the batches, a base model."""

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
    """The processes of a run in rows of neighbours, which together hold every latent once.

    Attributes:
        everyone: all processes.
        latents: the row of this process: those that hold the other latents, and see the same tokens.
        data: its column: those that hold the same latents, and see other tokens.
        readers: those of its row that read different text and exchange what they read; in tensor parallelism of the
            base model neighbours read the same text, and have nothing to exchange.
        together: how many neighbours share one base model.
    """

    everyone: Processes = field(default_factory=Processes)
    latents: Processes = field(default_factory=Processes)
    data: Processes = field(default_factory=Processes)
    readers: Processes = field(default_factory=Processes)
    together: int = 1

    @classmethod
    def arrange(cls, latents: int, stream: ActivationStream, device_type: str) -> Grid:
        """Arrange all processes of the run.

        Args:
            latents: how many processes share an SAE; 1 for one in every process.
            stream: whose model may itself be split over processes.
            device_type: that they compute on, such as ``"cuda"``.

        Raises:
            InputError: if the processes cannot be arranged so.
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
                f"Every forward of the {type(stream.model).__name__} takes the processes "
                f"{list(ranks_of(stream.model))} together (FSDP), and each of them reads text of its own, not always "
                "in as many forwards: load the whole model in each, or split it by tensor parallelism."
            )
        together = _together(everyone, split)
        if latents % together:
            raise InputError(
                f"The base model is split over {together} processes, which all read the same text, and {latents} "
                f"share an SAE: expected a multiple of {together} as latent_parallel."
            )
        if latents == 1:
            return cls(everyone, Processes(), everyone, Processes())
        rows = everyone.count // latents
        mesh = init_device_mesh(device_type, (rows, latents), mesh_dim_names=("data", "latents"))
        shape = (rows, latents // together, together)
        finer = init_device_mesh(device_type, shape, mesh_dim_names=("data", "readers", "model"))
        return cls(
            everyone,
            _of(mesh.get_group("latents")),
            _of(mesh.get_group("data")),
            _of(finer.get_group("readers")),
            together,
        )

    def part(self, stream: ActivationStream) -> ActivationStream:
        """Return what this process reads of a stream, with what it gets from others."""
        if self.everyone.alone:
            return stream
        # Counted so that rows, exchanged by readers and then by columns, are in the order of one process.
        number = self.readers.rank * self.data.count + self.data.rank
        own = stream.shard(number, self.readers.count * self.data.count)
        return GatheredActivations(own, self.everyone, self.readers)


def _of(group: distributed.ProcessGroup) -> Processes:
    return Processes(group) if group.size() > 1 else Processes()


def _together(everyone: Processes, ranks: Sequence[int]) -> int:
    """Return how many neighbours share a base model.

    Raises:
        InputError: if those that do are no neighbours, as rows of the grid would have them.
    """
    first = everyone.rank - everyone.rank % max(1, len(ranks))
    if ranks and tuple(ranks) != tuple(range(first, first + len(ranks))):
        raise InputError(
            f"The base model is split over the processes {list(ranks)}; expected neighbours, such as "
            f"{list(range(first, first + len(ranks)))}."
        )
    return max(1, len(ranks))
