"""One process's part of an SAE: some of its latents, and all tensors that are not one row per latent.

The processes see the same tokens. Their reconstructions and sparsity penalties are summed; everything else, including
the optimiser's moments, never leaves its process. A step sends ``tokens * d_out`` numbers for every reconstruction of
the objective, independent of the SAE's width.
"""

from __future__ import annotations

import copy
import os

import torch

from ...errors import InputError
from ...modeling import SAEConfig, SAEModel, TopKObjective, architectures
from ...modeling.loading import open_checkpoint
from ..processes import Processes


def latents_of(d_sae: int, processes: Processes) -> range:
    """Return the latents that this process holds.

    Args:
        d_sae: of the whole SAE.
        processes: between which they are split.

    Raises:
        InputError: unless all hold the same number.
    """
    if d_sae % processes.count:
        wider = -(-d_sae // processes.count) * processes.count
        raise InputError(
            f"d_sae = {d_sae:,} latents cannot be split evenly over {processes.count} processes; the next number that "
            f"can is {wider:,}."
        )
    each = d_sae // processes.count
    return range(processes.rank * each, (processes.rank + 1) * each)


@torch.no_grad()
def split(sae: SAEModel, processes: Processes) -> SAEModel:
    """Return this process's part of an SAE that it holds whole; the SAE itself in a single process.

    Args:
        sae: the whole one, the same in all processes.
        processes: between which the latents are split.

    Raises:
        InputError: if the latents are not independent of each other, or cannot be split evenly.
    """
    if processes.alone:
        return sae
    held = latents_of(sae.config.d_sae, processes)
    with torch.device("meta"):
        part = _empty(type(sae), sae.config, processes)
    shared = type(sae).shared_names(sae.config)
    own = {name: x if name in shared else x[held.start : held.stop] for name, x in sae.state_dict().items()}
    part.load_state_dict({name: x.clone() for name, x in own.items()}, assign=True)
    for name, parameter in sae.named_parameters():
        part.get_parameter(name).requires_grad_(parameter.requires_grad)
    return part.train(sae.training)


def new_part(config: SAEConfig, processes: Processes, *, seed: int = 0) -> SAEModel:
    """Return this process's part of a new SAE, which no process ever holds whole.

    Args:
        config: of the whole SAE.
        processes: between which the latents are split.
        seed: of the initial weights, which differ between parts.

    Raises:
        InputError: as for `split`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * processes.count + processes.rank)
        return _empty(architectures[config.architecture], config, processes)


def load_part(folder: str | os.PathLike[str], subfolder: str = "", *, processes: Processes) -> SAEModel:
    """Return this process's part of a stored SAE; only that part is read.

    Args:
        folder: a folder or repository id, as for `SAEModel.from_pretrained`.
        subfolder: of the SAE inside it.
        processes: between which the latents are split.

    Raises:
        InputError: as for `split`.
    """
    if processes.alone:
        return SAEModel.from_pretrained(folder, subfolder)
    whole = open_checkpoint(os.fspath(folder), subfolder).config
    require_splittable(architectures[whole.architecture])
    part: SAEModel = SAEModel.from_pretrained(folder, subfolder, latents=latents_of(whole.d_sae, processes))
    rows = part.config.rows
    part.config.kept_latents = None
    part.config.d_sae = rows
    part.latent_group = processes
    return part


def whole_config(part: SAEModel) -> SAEConfig:
    """Return the configuration of the SAE that this is a part of."""
    config = copy.deepcopy(part.config)
    if isinstance(part.latent_group, Processes):
        config.d_sae *= part.latent_group.count
    return config


def require_splittable(sae_class: type[SAEModel]) -> None:
    """Raise unless the latents of an architecture are independent of each other.

    Raises:
        InputError: with the reason.
    """
    why = ""
    if not sae_class.elementwise or issubclass(sae_class.objective_class, TopKObjective):
        why = "which latents are active depends on all of them"
    elif not (sae_class.sliceable and sae_class.one_site and sae_class.per_token):
        why = "its tensors are not one row per latent"
    if why:
        raise InputError(
            f"The latents of a {sae_class.__name__} cannot be split over processes: {why}. Train it in data parallel, "
            "or a GatedSAE, StandardSAE or JumpReLUSAE."
        )


def _empty(sae_class: type[SAEModel], config: SAEConfig, processes: Processes) -> SAEModel:
    """Return this process's part of an SAE, with initial weights."""
    require_splittable(sae_class)
    config = copy.deepcopy(config)
    config.d_sae = len(latents_of(config.d_sae, processes))
    part = sae_class(config)
    if not processes.alone:
        part.latent_group = processes
    return part


def own_part(sae: SAEModel, processes: Processes, remedy: str | None) -> SAEModel:
    """Return this process's part of an SAE to be trained; the whole SAE if its latents are not split.

    Args:
        sae: the whole SAE, or already this process's part.
        processes: between which its latents are split.
        remedy: name of the remedy for dead latents, or None.

    Raises:
        InputError: if it cannot be split, or not be trained with the remedy in parts.
    """
    others = sae.latent_group
    if isinstance(others, Processes) and (others.count, others.rank) != (processes.count, processes.rank):
        raise InputError(
            f"This is the part of an SAE that {others.count} processes share (number {others.rank} of them), and "
            f"latent_parallel is {processes.count}: pass latent_parallel={others.count}, or the whole SAE."
        )
    if processes.alone:
        return sae
    if remedy not in (None, "resample"):
        raise InputError(
            f"dead_latent_remedy is {remedy!r}, which needs all dead latents in one process, and latent_parallel is "
            f"{processes.count}: choose 'resample', or None."
        )
    return sae if others is not None else split(sae, processes)
