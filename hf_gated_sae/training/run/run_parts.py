"""The parts of a run: model, proven sites, activations and new SAEs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...architectures import architectures
from ...errors import InputError, SAEError, TrainingError
from ...hooks.activation_shards import ActivationShards
from ...hooks.dispatch import prove
from ...modeling import SAEConfig, SAEModel
from ..arguments import SAETrainingArguments
from ..memory import TrainingMemory, available_memory, is_out_of_memory
from ..processes import Processes
from ..sharding import Grid, new_part
from ..streams import ActivationStream, ModelActivations, ShardActivations
from .assembly import arguments, settings_of
from .base_model import NOWHERE, is_folder, load_model, load_tokenizer, pinned_model, with_dtype
from .run_config import ModelSettings, RunConfig, SAESettings
from .run_text import open_documents, open_tokens, pinned_data, sized, with_held_out


@dataclass(frozen=True)
class Parts:
    """The loaded parts of a run.

    Attributes:
        config: the run, with the revisions of model and data set resolved to commits.
        arguments: of the trainer.
        stream: of activations.
        grid: the arrangement of the processes that train together.
        saes: the new SAEs, by the name of their section; if processes share them, this process's parts.
        model: the causal LM; None if activations come from shards.
        tokenizer: the model's; None if activations come from shards.
        dtype_remark: why the model's dtype differs from its checkpoint's; empty if it does not.
    """

    config: RunConfig
    arguments: SAETrainingArguments
    stream: ActivationStream
    grid: Grid
    saes: Mapping[str, SAEModel]
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    dtype_remark: str = ""


def build(config: RunConfig) -> Parts:
    """Load the model, prove the sites, open the data, and create the SAEs.

    Args:
        config: the run.

    Raises:
        InputError: if a part cannot be built with the run's settings.
        SiteError: if the model does not have a site.
    """
    chosen = arguments(config)
    sites = list(dict.fromkeys(site for sae in config.named.values() for site in (sae.site, sae.site_out) if site))
    if config.data.shards is not None:
        return _from_shards(config, chosen, sites)
    assert config.model is not None  # checked by `assemble`
    settings = pinned_model(config.model)
    data = pinned_data(config.data)
    text = open_documents(data)  # errors here come before the model is loaded, which takes longer
    settings, remark = with_dtype(settings, chosen.device)
    model = load_model(settings, chosen.device)
    widths = {site: slot.width for site, slot in prove(model, sites).items()}
    tokenizer = load_tokenizer(settings)
    data = sized(data, chosen, model)
    whole = open_tokens(data, tokenizer, model, text)
    tokens = with_held_out(data, whole, tokenizer, model, chosen.world_size)
    pinned = dataclasses.replace(config, model=settings, data=data)
    stream = ModelActivations(
        model,
        sites,
        tokens,
        buffer_size=data.buffer_size,
        seed=config.seed,
        special_tokens=data.special_tokens,
        device=chosen.device,
        save_buffer=data.save_buffer,
    )
    facts = {"base_model": base_model(pinned.model), "base_model_revision": settings.revision}
    grid = Grid.arrange(chosen.latent_parallel, stream, chosen.device.type)
    saes = new_saes(pinned, widths, facts, chosen.device, grid.latents)
    return Parts(pinned, chosen, stream, grid, saes, model, tokenizer, remark)


def _from_shards(config: RunConfig, chosen: SAETrainingArguments, sites: list[str]) -> Parts:
    assert config.data.shards is not None
    shards = ActivationShards(config.data.shards)
    stream = ShardActivations(shards, sites, seed=config.seed, device=chosen.device)
    widths = {site: shards.index["values"][site]["width"] for site in sites}
    written = shards.index.get("base_model")
    if config.model is not None and written not in (None, config.model.name):
        raise InputError(
            f"model.name is {config.model.name!r}, and the shards in {shards.folder} are of {written!r}: remove the "
            "section model, or give shards of that model."
        )
    settings = config.model or (ModelSettings(written) if written else None)
    facts = {"base_model": base_model(settings), "base_model_revision": shards.index.get("base_model_revision")}
    grid = Grid.arrange(chosen.latent_parallel, stream, chosen.device.type)
    return Parts(config, chosen, stream, grid, new_saes(config, widths, facts, chosen.device, grid.latents))


def base_model(settings: ModelSettings | None) -> str | None:
    """Return the model's id on the Hub; None if it has none, such as a local folder."""
    if settings is None:
        return None
    if settings.hub_id is not None:
        return None if settings.hub_id == NOWHERE else settings.hub_id
    return None if is_folder(settings.name) or Path(settings.name).is_absolute() else settings.name


def new_saes(
    config: RunConfig,
    widths: Mapping[str, int],
    facts: Mapping[str, Any],
    device: torch.device,
    sharing: Processes | None = None,
) -> dict[str, SAEModel]:
    """Return the SAEs with initial weights, by the name of their section; the same ones for the same seed.

    Args:
        config: the run.
        widths: of the activations at each site.
        facts: further fields of their configurations.
        device: of the SAEs.
        sharing: the processes that share them, each of which creates its own part; this one alone by default.

    Raises:
        InputError: if an architecture refuses its settings, or cannot be shared.
        TrainingError: if they do not fit into memory, with sizes that would.
    """
    configs = {
        name: _configuration(sae, widths, facts, f"saes.{name}." if name else "sae.")
        for name, sae in config.named.items()
    }
    sharing = sharing or Processes()
    available = available_memory(device)
    with torch.device("meta"):
        memory = TrainingMemory.of(_made(config, configs, torch.device("meta"), sharing).values())
    advice = memory.advice(
        int(config.training.get("activation_batch_size", SAETrainingArguments.activation_batch_size)), available
    )
    if available is not None and memory.weights > available:
        raise TrainingError(f"The SAEs do not fit into memory. {advice}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return _made(config, configs, device, sharing)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"The SAEs do not fit into memory. {advice}") from error


def _made(
    config: RunConfig, configs: Mapping[str, SAEConfig], device: torch.device, sharing: Processes
) -> dict[str, SAEModel]:
    made = {}
    for number, (name, sae) in enumerate(config.named.items()):
        if sharing.alone:
            new = architectures[sae.architecture](configs[name])
        else:
            new = new_part(configs[name], sharing, seed=config.seed + number)
        made[name] = new.to(device=device, dtype=getattr(torch, sae.dtype))
    return made


def _configuration(sae: SAESettings, widths: Mapping[str, int], facts: Mapping[str, Any], key_path: str) -> SAEConfig:
    sae_class = architectures[sae.architecture]
    assert sae.site is not None  # checked by `assemble`
    d_in = widths[sae.site]
    wanted = sae.d_sae if sae.d_sae is not None else round(d_in * (sae.expansion_factor or 0))
    out = {"site_out": sae.site_out, "d_out": widths[sae.site_out]} if sae.site_out else {}
    if sae.site_out and "apply_b_dec_to_input" not in sae.settings:
        out["apply_b_dec_to_input"] = False  # b_dec belongs to the other site
    try:
        settings = {**out, **settings_of(sae, key_path)}
        return sae_class.config_class(d_in=d_in, d_sae=wanted, site=sae.site, **facts, **settings)
    except SAEError as error:
        message = str(error)
        raise InputError(message if message.startswith(key_path) else f"{key_path}{message}") from error
