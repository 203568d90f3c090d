"""Estimated memory, time and price of training a wide SAE on a large model on many devices.

    python hub_scripts/training_plan.py

Prints the table of the section "A 1M-latent Gated SAE on a 70B model, on paper" of hf_gated_sae/training/README.md,
which states the assumptions in words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import typer

from hf_gated_sae.architectures import architectures
from hf_gated_sae.training.memory import TrainingMemory

PRODUCTS = 7
"""Matrix products of ``tokens x width x latents`` in a dense Gated step: the encoder's, two reconstructions, the
gradients of the latents through each of them, and those of W_dec and W_enc. The auxiliary term's decoder is frozen."""

RECONSTRUCTIONS = 2
"""Sums over the processes that share a Gated SAE, each ``[tokens, width]``."""

UPDATE_BYTES = 48
"""Bytes read and written per parameter: 28 by Adam, 14 by the unit norm of half of them, 6 by a bfloat16 copy."""

PASSES = 16
"""Passes over a float32 array ``[tokens, latents]`` by all operations that are not matrix products."""


LAYOUTS = ((8, 8, 16_384), (16, 8, 32_768), (16, 16, 32_768), (64, 8, 131_072), (64, 16, 131_072), (64, 64, 131_072))
"""Devices in all, how many of them share an SAE, and activations per step, for each row of the table."""


@dataclass(frozen=True)
class Machine:
    """Devices and their connections; all but the first two numbers are assumptions.

    Attributes:
        operations: per second, of a large matrix product in bfloat16.
        bandwidth: of a device's memory, in bytes per second.
        memory: of a device, in bytes.
        node: number of devices that are connected by fast links.
        link: bytes per second and device that collectives reach within a node.
        network: the same between nodes.
        utilisation: share of `operations` that is reached.
        price: per device and hour.
    """

    operations: float = 790e12
    bandwidth: float = 4.3e12
    memory: float = 141e9
    node: int = 8
    link: float = 300e9
    network: float = 40e9
    utilisation: float = 0.5
    price: float = 3.0


@dataclass(frozen=True)
class Job:
    """An SAE to be trained, and its base model.

    Attributes:
        base_parameters: of the base model.
        base_layers: layers of the base model.
        layer: after which its forward is stopped.
        width: of the site.
        d_sae: number of latents.
        tokens: activations per step, of all processes.
        buffer: activations that every reader holds for shuffling.
    """

    base_parameters: float = 70.6e9
    base_layers: int = 80
    layer: int = 40
    width: int = 8192
    d_sae: int = 1_048_576
    tokens: int = 65_536
    buffer: int = 1_000_000


@dataclass(frozen=True)
class Plan:
    """A layout of a job on devices, with its costs.

    Attributes:
        devices: number of devices.
        latents: number of devices that share an SAE.
        model: number of devices that share a base model.
        memory: bytes per device, by use.
        seconds: per step, by kind of work; nothing is assumed to overlap.
        tokens: activations per step.
        price: per device and hour.
    """

    devices: int
    latents: int
    model: int
    memory: dict[str, float]
    seconds: dict[str, float]
    tokens: int
    price: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all devices together."""
        return self.tokens / sum(self.seconds.values())

    @property
    def price_per_billion(self) -> float:
        """Price of a billion tokens."""
        return 1e9 / self.tokens_per_second / 3600 * self.devices * self.price


def plan(
    devices: int, latents: int, *, model: int = 8, job: Job | None = None, machine: Machine | None = None
) -> Plan:
    """Return the memory and time of a step.

    Args:
        devices: number of devices.
        latents: number of devices over which the latents are split; the rest is data parallel.
        model: number of devices over which the base model is split.
        job: the SAE and its base model.
        machine: the devices.
    """
    job, machine = job or Job(), machine or Machine()
    rows, readers = devices // latents, latents // model
    seen = job.tokens / rows  # by every device
    speed = machine.operations * machine.utilisation
    share = job.layer / job.base_layers
    gated = architectures["gated"]
    with torch.device("meta"):
        part = gated(gated.config_class(d_in=job.width, d_sae=job.d_sae // latents))
    parameters = sum(each.numel() for each in part.parameters())
    step = TrainingMemory.of([part])
    between_latents = machine.link if latents <= machine.node else machine.network
    summed = RECONSTRUCTIONS * seen * job.width * 4
    through_model = 2 * job.layer * job.width * 2 * job.tokens * model / devices  # two sums per layer, in bfloat16
    return Plan(
        devices,
        latents,
        model,
        memory={
            "SAE": float(step.total(0)),
            "SAE in bfloat16": 2.0 * parameters,
            "step": float(step.per_activation * seen),
            "base model": 2 * job.base_parameters / model,
            "buffer": 2.0 * job.buffer * job.width,
        },
        seconds={
            "base model": 2 * job.base_parameters * share * job.tokens / devices / speed
            + _all_reduce(through_model, model) / machine.link,
            "SAE": PRODUCTS * 2 * job.width * job.d_sae / latents * seen / speed
            + PASSES * 4 * job.d_sae / latents * seen / machine.bandwidth,
            "sums over latents": _all_reduce(summed, latents) / between_latents,
            "exchange of activations": seen * job.width * 4 * (1 - 1 / readers) / machine.network,
            "gradients": _all_reduce(4.0 * parameters, rows) / machine.network,
            "update": UPDATE_BYTES * parameters / machine.bandwidth,
        },
        tokens=job.tokens,
        price=machine.price,
    )


def table(plans: list[Plan]) -> str:
    """Return plans as a Markdown table, as shown in `training/README.md`."""
    lines = [
        "| GPUs | share an SAE | data parallel | tokens/step | GB per GPU | s/step | tokens/s | $ per 10⁹ tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.devices} | {each.latents} | {each.devices // each.latents} | {each.tokens:,} "
        f"| {sum(each.memory.values()) / 1e9:.0f} | {sum(each.seconds.values()):.2f} "
        f"| {_rounded(each.tokens_per_second)} | {_rounded(each.price_per_billion)} |"
        for each in plans
    ]
    return "\n".join(lines)


def _rounded(number: float) -> str:
    """Return a number rounded to two digits, which exceeds the accuracy of the estimate."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _all_reduce(amount: float, among: int) -> float:
    """Return the bytes that a device sends in a ring all-reduce of `amount` bytes among `among` devices."""
    return 2 * amount * (among - 1) / among


def plans() -> list[Plan]:
    """Return the plan of each of `LAYOUTS`."""
    return [plan(devices, latents, job=Job(tokens=tokens)) for devices, latents, tokens in LAYOUTS]


def main() -> None:
    """Print the table."""
    typer.echo(table(plans()))


if __name__ == "__main__":
    typer.run(main)
