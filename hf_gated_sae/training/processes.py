"""Communication between the processes that train together; all of it is in this file.

In a single process it does nothing and costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
from torch.distributed import ReduceOp

from ..errors import CheckpointError, InputError, SAEError
from ..functional.parallel import DataParallelGroup, LatentParallelGroup

if TYPE_CHECKING:
    from transformers import TrainingArguments

Item = TypeVar("Item")

GRADIENTS_AT_ONCE = 1 << 26
"""Elements of a gradient sent in one message: few messages, and little additional memory."""

_DIGIT = 16  # bits examined in each round of a selection


class Processes(LatentParallelGroup, DataParallelGroup):
    """A group of processes that communicate, of which this process is one.

    Every method has to be called by all of them, in the same order, with tensors of the same shapes.

    Args:
        group: of `torch.distributed`; None for a single process. `Processes.all()` returns those of this run.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group
        self.count = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.device = torch.device("cpu")  # of single numbers
        if group is not None and "gloo" not in distributed.get_backend_config(group):
            self.device = torch.device(torch.accelerator.current_accelerator() or "cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        """Return this object: a copy of an SAE is shared by the same processes."""
        return self

    @classmethod
    def all(cls) -> Processes:
        """Return the processes of this run, as `torchrun` or `accelerate launch` has started them."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return cls(distributed.group.WORLD)
        return cls()

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    # ------------------------------------------------------------------ numbers

    @torch.no_grad()
    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes, any shape."""
        return self._reduced(values, ReduceOp.SUM)

    @torch.no_grad()
    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the processes, any shape."""
        return values if self.alone else self._reduced(values, ReduceOp.SUM) / self.count

    @torch.no_grad()
    def largest(self, values: Tensor) -> Tensor:
        """Return the maximum of each number over the processes, any shape."""
        return self._reduced(values, ReduceOp.MAX)

    @torch.no_grad()
    def any(self, flags: Tensor) -> Tensor:
        """Return which flags are set in at least one process, any shape, bool."""
        return flags if self.alone else self._reduced(flags.to(torch.uint8), ReduceOp.MAX).bool()

    def smallest(self, number: int) -> int:
        """Return the smallest of the processes' numbers."""
        if self.alone:
            return number
        return int(self._reduced(torch.tensor(number, device=self.device), ReduceOp.MIN))

    def mean_by_name(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the means over the processes of named numbers, in one message.

        Args:
            values: numbers; the same names in all processes.
        """
        if self.alone:
            return dict(values)
        means = self.mean(torch.tensor(list(values.values()), dtype=torch.float64, device=self.device))
        return dict(zip(values, means.tolist(), strict=True))

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.alone:
            return values
        reduced = values.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(reduced, operation, group=self.group)
        return reduced

    def number_of_first(self, number: int) -> int:
        """Return the first process's number."""
        held = torch.tensor(number, device=self.device)
        self.broadcast([held])
        return int(held)

    # ------------------------------------------------------------------ rows

    @torch.no_grad()
    def gather_rows(self, own: Tensor) -> Tensor:
        """Return the rows of all processes, the first of each, then the second of each, and so on.

        This is the order in which `RowActivations.shard` distributes a batch.

        Args:
            own: ``[n, ...]``, the same `n` in every process.

        Returns:
            ``[n * count, ...]``, on the communication device, or on the rows' own device if that is a CPU.
        """
        if self.alone:
            return own
        if self.device.type != "cpu":  # its backend sends tensors on that device only
            own = own.to(self.device)
        every = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.count)]
        distributed.all_gather(every, own.contiguous(), group=self.group)
        return torch.stack(every, dim=1).flatten(0, 1)

    @torch.no_grad()
    def gather_selected_rows(self, own: Tensor, indices: Tensor) -> Tensor:
        """Return some of the rows of all processes, without gathering the others.

        Args:
            own: ``[n, ...]``, the same `n` in every process.
            indices: into ``gather_rows(own)``, ``[m]`` int64; the same in all processes.

        Returns:
            ``[m, ...]``.
        """
        if self.alone:
            return own[indices]
        mine = indices % self.count == self.rank
        found = own.new_zeros(len(indices), *own.shape[1:])
        found[mine] = own[indices[mine] // self.count]
        return self.sum(found)

    # ------------------------------------------------------------------ gradients

    @torch.no_grad()
    def average_gradients(self, module: nn.Module) -> None:
        """Replace the gradients of a module by their mean over the processes, if no wrapper does so."""
        if self.alone:
            return
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        for gradient in gradients:
            whole = gradient.contiguous()
            for piece in whole.view(-1).split(GRADIENTS_AT_ONCE):
                distributed.all_reduce(piece, ReduceOp.SUM, group=self.group)
                piece.div_(self.count)
            if whole is not gradient:
                gradient.copy_(whole)

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first process's values into the same tensors of all processes, in place."""
        for tensor in () if self.alone else tensors:
            values = tensor.detach().contiguous()
            distributed.broadcast(values, group=self.group, group_src=0)
            tensor.detach().copy_(values)

    # ------------------------------------------------------------------ one SAE over several processes

    def summed(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' tensors; its gradient is passed unchanged to every part."""
        if self.alone:
            return part
        whole: Tensor = _Summed.apply(part, self)
        return whole

    def alike(self, value: Tensor) -> Tensor:
        """Return a value that is the same in all processes; its gradient is summed over them."""
        if self.alone:
            return value
        result: Tensor = _SumGradients.apply(value, self)
        return result

    # ------------------------------------------------------------------ one batch over several processes

    @torch.no_grad()
    def lowest_of_largest(self, values: Tensor, count: int) -> Tensor:
        """Return the smallest of the largest positive values of all processes, ``[]``; 0 if there are none.

        This is an exact radix selection: positive floating-point numbers are in the order of their bits, which are
        counted in all processes 16 at a time from the highest. It takes two small sums for float32, and no value
        leaves its process.

        Args:
            values: of this process, any shape.
            count: number of largest values to select, per process.
        """
        positive = values[values > 0]
        if positive.dtype not in (torch.float32, torch.float64):
            positive = positive.float()
        integers = torch.int64 if positive.dtype == torch.float64 else torch.int32
        bits = positive.view(integers)
        left, prefix = count * self.count, 0
        for shift in range(8 * bits.element_size() - _DIGIT, -1, -_DIGIT):
            digits = (bits >> shift) & ((1 << _DIGIT) - 1)
            counts = self.sum(torch.bincount(digits, minlength=1 << _DIGIT))
            from_top = counts.flip(0).cumsum(0)
            left = min(left, int(from_top[-1]))
            if not left:
                return values.new_zeros(())
            below_top = int((from_top >= left).int().argmax())
            digit = (1 << _DIGIT) - 1 - below_top
            left -= int(from_top[below_top - 1]) if below_top else 0
            prefix = (prefix << _DIGIT) | digit
            bits = bits[digits == digit]
        return torch.tensor([prefix], dtype=integers, device=values.device).view(positive.dtype)[0].to(values.dtype)

    # ------------------------------------------------------------------ stopping together

    def first_text(self, text: str | None) -> str | None:
        """Return, in all processes, the first process's text that is not None, followed by that process's rank."""
        if self.alone:
            return text
        texts = ((rank, each) for rank, each in enumerate(self._gather(text)) if each is not None)
        return next((f"{each} (in process {rank} of {self.count})" for rank, each in texts), None)

    def _gather(self, own: Any) -> list[Any]:
        """Return a small picklable object of each process."""
        every: list[Any] = [None] * self.count
        distributed.all_gather_object(every, own, group=self.group)
        return every

    def own_share(self, items: Sequence[Item]) -> list[Item]:
        """Return this process's share of items that the processes divide between them."""
        return list(items[self.rank :: self.count])

    def merged(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the union of the mappings of all processes; their values are small and can be pickled."""
        if self.alone:
            return dict(own)
        return {name: value for each in self._gather(dict(own)) for name, value in each.items()}

    def raise_first(self, error: SAEError | None, kind: type[SAEError] = InputError) -> None:
        """Raise the first error of any process in all processes; a single process raises its own error.

        Args:
            error: of this process; None if it has none.
            kind: type of the error raised in processes that have none themselves.

        Raises:
            SAEError: with the text of the first error, and the rank of its process unless all have the same error.
        """
        if self.alone:
            if error is not None:
                raise error
            return
        texts = self._gather(None if error is None else str(error))
        rank = next((rank for rank, text in enumerate(texts) if text is not None), None)
        if rank is None:
            return
        where = f" (in process {rank} of {self.count})" if len({*texts}) > 1 else ""
        raise (kind if error is None else type(error))(f"{texts[rank]}{where}") from error

    @contextmanager
    def raising_together(self, explained: Callable[[Exception], SAEError]) -> Iterator[None]:
        """Raise an error of the code inside in all processes; that code must not communicate.

        Args:
            explained: converts an error of the disk, or an `SAEError`, to the one that is raised.

        Raises:
            SAEError: the same in all processes.
        """
        failed: SAEError | None = None
        try:
            yield
        except (OSError, SafetensorError, SAEError) as error:
            failed = explained(error)
            if failed is not error:
                failed.__cause__ = error
        self.raise_first(failed, CheckpointError)

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if not self.alone:
            distributed.barrier(group=self.group)

    # ------------------------------------------------------------------ one after the other

    @torch.no_grad()
    def send_to_first(self, tensor: Tensor, source: int) -> Tensor | None:
        """Send the tensor of one process to the first one.

        Args:
            tensor: of the same shape and dtype in all processes.
            source: rank of the process that sends.

        Returns:
            The tensor in the first process, None in all others.
        """
        if self.rank == source:
            if source:
                distributed.send(tensor.contiguous(), group=self.group, group_dst=0)
                return None
            return tensor
        if self.rank:
            return None
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        distributed.recv(received, group=self.group, group_src=source)
        return received


def require_launched(args: TrainingArguments) -> None:
    """Raise if several processes were started and transformers has not detected them.

    Raises:
        InputError: with how to launch them.
    """
    started = max(Processes.all().count, int(given) if (given := os.environ.get("WORLD_SIZE", "")).isdigit() else 1)
    if started == args.world_size:
        return
    on_cpu = " On CPUs pass use_cpu=True (--training.use_cpu true on the command line)." if not args.use_cpu else ""
    raise InputError(
        f"{started} processes were started, but transformers detects {args.world_size}, so each would train and write "
        f"separately.{on_cpu} Launch them with torchrun or accelerate launch; see hf_gated_sae/training/README.md."
    )


class _Summed(torch.autograd.Function):
    """Sums over processes in the forward pass; the identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, processes: Processes) -> Tensor:
        return processes.sum(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumGradients(torch.autograd.Function):
    """The identity in the forward pass; sums gradients over processes in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.sum(grad), None
