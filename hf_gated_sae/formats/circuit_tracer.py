"""Per-layer transcoders in the layout of circuit-tracer, one file per layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ..architectures.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from ..architectures.standard import StandardSAE, StandardSAEConfig
from ..architectures.topk import TopKSAE, TopKSAEConfig
from ..errors import CheckpointError
from ..hub.base_model_norms import normalization_of
from ..hub.hook_names import site_of_hook
from ..hub.location import Location
from ..hub.model_names import repository_of
from ..modeling.checkpoint import Checkpoint
from ..modeling.config import SAEConfig
from ..modeling.model import SAEModel
from ..storage import StoredTensor
from ._config_values import integer, one_of, text
from ._layer_files import require_not_negative
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, selected_file

CONFIG = "config.yaml"
RUNS = ("wandb-config.yaml", "wanb-config.yaml")
NAMES = {"W_enc_T": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
OPTIONAL = {"threshold": "activation_function.threshold", "W_skip": "W_skip"}
ACTIVATIONS = ("relu", "topk", "jump_relu", "jumprelu")
KNOWN_K = {"facebook/crv-8b-instruct-transcoders": 128}
"""k of TopK transcoders whose files do not state it, by repository, as in circuit-tracer."""
QWEN_HOOKS = ("mlp.hook_in", "mlp.hook_out")

_FILE = re.compile(r"layer_(\d{1,4})\.safetensors")
_LAYER = re.compile(r"layer_(0|[1-9]\d{0,5})")
_QWEN = re.compile(r"mwhanna/(qwen3-[\d.]+b)-transcoders(-lowl0)?")


class CircuitTracerFormat(CheckpointFormat):
    """Written for circuit-tracer: one ``layer_L.safetensors`` per layer, and a ``config.yaml`` for all of them.

    Each file has ``W_enc [d_sae, d_in]`` and ``W_dec [d_sae, d_out]``, and is the address of one transcoder. The
    configuration names the base model and the hook points that are read and written, without the block. The activation
    is a JumpReLU if there is an ``activation_function.threshold``, else that in ``activation``, else a ReLU. With
    ``W_skip [d_out, d_in]`` the transcoder adds ``x @ W_skip.T``. Files of June 2025 have ``W_dec [d_out, d_sae]``,
    which the shapes of the biases show. mwhanna's transcoders for Qwen 3 also have the training run's configuration;
    those for the 14B model have only that.

    Source: safety-research/circuit-tracer.
    """

    name: ClassVar[str] = "circuit_tracer"
    files = ("layer_*.safetensors",)

    def addresses(self, location: Location) -> list[str]:
        """Return the files ``layer_L.safetensors`` of folders that have a configuration."""
        described = {name.rpartition("/")[0] for name in location.files if name.rpartition("/")[2] in (CONFIG, *RUNS)}
        return [
            name
            for name in location.files
            if _FILE.fullmatch(name.rpartition("/")[2]) and name.rpartition("/")[0] in described
        ]

    def claims(self, location: Location) -> bool:
        """Whether this is a file of a layer with circuit-tracer's tensors."""
        file = selected_file(location, _FILE)
        if file is None or not any(name in location for name in (CONFIG, *RUNS)):
            return False
        return set(location.content(file)) - set(OPTIONAL.values()) == set(NAMES.values())

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, the rest from the configuration.

        Raises:
            CheckpointError: if the tensors do not fit together, or the configuration lacks a required value.
        """
        file = selected_file(location, _FILE) or ""
        where = f"{file} of {location}"
        held = location.tensors(file)
        optional = {name: stored_name for name, stored_name in OPTIONAL.items() if stored_name in held}
        stored = renamed(held, {**NAMES, **optional}, where)
        stored["W_dec"] = _latent_major(stored, where)
        [layer] = re.findall(r"\d+", file)
        config = location.read_yaml(CONFIG) if CONFIG in location else {}
        settings = {
            "d_in": stored["W_enc_T"].shape[-1],
            "d_sae": stored["W_enc_T"].shape[0],
            "d_out": stored["W_dec"].shape[-1],
            "apply_b_dec_to_input": False,
            "skip_connection": "W_skip" in stored,
            "trained_on_bos": False,
            **_site_fields(location, config, int(layer)),
        }
        model_class, sae_config = _architecture(location, config, "threshold" in stored, settings)
        files = [file, *(name for name in (CONFIG, *RUNS) if name in location)]
        origin = location.at("/".join(part for part in (location.subfolder, file) if part)).origin(self.name, files)
        return Checkpoint(model_class, sae_config, origin, stored, finish=_checked)

    def examples(self, root: Path) -> list[Example]:
        """Write one transcoder of every activation, with and without skip connection, in old and new orientation."""
        return write_examples(root)


def named_layer(location: Location) -> tuple[Location, int] | None:
    """Return folder and layer of an address such as ``folder/layer_3``; None if that is an existing folder."""
    folder, _, name = location.address.rpartition("/")
    match = _LAYER.fullmatch(name)
    if match is None or location.file is not None or location.files:
        return None
    return location.at(folder), int(match[1])


def _latent_major(stored: dict[str, StoredTensor], where: str) -> StoredTensor:
    """Return the decoder with one row per latent; its stored orientation is determined by the biases' widths.

    Raises:
        CheckpointError: if the widths are equal, or the shapes do not fit together.
    """
    encoder, decoder, b_enc, b_dec = (stored[name].shape for name in ("W_enc_T", "W_dec", "b_enc", "b_dec"))
    wanted = (*b_enc, *b_dec)
    if len(wanted) != 2 or len(encoder) != 2 or encoder[0] != wanted[0] or decoder not in (wanted, wanted[::-1]):
        raise CheckpointError(
            f"{where} holds W_enc {list(encoder)}, W_dec {list(decoder)}, b_enc {list(b_enc)} and b_dec "
            f"{list(b_dec)}; expected [d_sae, d_in], [d_sae, d_out] or its transpose, [d_sae] and [d_out]."
        )
    if wanted[0] == wanted[1]:
        raise CheckpointError(
            f"{where} has the same number of latents and outputs ({wanted[0]}), so it is unknown whether W_dec is "
            "stored transposed, as it was until June 2025. Convert it to another layout."
        )
    return stored["W_dec"] if decoder == wanted else stored["W_dec"].T


def _site_fields(location: Location, config: dict[str, Any], layer: int) -> dict[str, Any]:
    """Return base model, sites and normalisation.

    Raises:
        CheckpointError: if there is no configuration and the repository's name is not a known one.
    """
    qwen, where = _QWEN.fullmatch(location.repo_id), f"{CONFIG} of {location}"
    if not config and qwen is None:
        raise CheckpointError(
            f"{location} has no {CONFIG}, which names the base model and the hook points that are read and written: "
            "add it, with model_name, feature_input_hook and feature_output_hook."
        )
    if not config and qwen is not None:
        base_model, hooks = repository_of(qwen[1]), QWEN_HOOKS
    else:
        base_model = repository_of(text(config, "model_name", where))
        hooks = text(config, "feature_input_hook", where), text(config, "feature_output_hook", where)
    return {"base_model": base_model, **site_fields(*hooks, layer, base_model, where)}


def site_fields(read: str, written: str, layer: int, base_model: str | None, where: str) -> dict[str, Any]:
    """Return the configuration fields for the hook points that are read and written.

    Raises:
        CheckpointError: if a hook point is unknown, the one that is written is normalised, or the one that is read is
            the output of a norm of an unknown kind.
    """
    site, normalization = site_of_hook(read, layer, base_model)
    site_out, normalised = site_of_hook(written, layer, base_model)
    if normalised != "none":
        raise CheckpointError(
            f"The checkpoint writes {written!r}, which is not added to the stream; expected 'hook_mlp_out'."
        )
    return {"site": site, "site_out": site_out, **normalization_of(normalization, base_model, read, where)}


def _architecture(
    location: Location, config: dict[str, Any], has_threshold: bool, settings: dict[str, Any]
) -> tuple[type[SAEModel], SAEConfig]:
    """Return class and configuration.

    Raises:
        CheckpointError: if threshold and configuration contradict each other, or `k` is not stated.
    """
    where = f"{CONFIG} of {location}"
    k = KNOWN_K.get(location.repo_id)
    usual = "jump_relu" if has_threshold else "relu" if k is None else "topk"
    activation = one_of(config, "activation", where, ACTIVATIONS, usual)
    if (activation in ("jump_relu", "jumprelu")) != has_threshold:
        raise CheckpointError(
            f"{where} has activation {activation!r}, and there is {'a' if has_threshold else 'no'} threshold; "
            "expected a threshold with a JumpReLU, and only with that."
        )
    if has_threshold:
        return JumpReLUSAE, JumpReLUSAEConfig(**settings)
    if activation == "relu":
        return StandardSAE, StandardSAEConfig(**settings)
    selected = integer(config, "k", where, k) if k is not None else integer(config, "k", where)
    return TopKSAE, TopKSAEConfig(**settings, rectified=False, k=selected)


def _checked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raise for a negative threshold, else return the tensors."""
    if "threshold" in tensors:
        require_not_negative(tensors["threshold"])
    return tensors


def write_examples(root: Path) -> list[Example]:
    """Write the examples, two layers each."""
    raw = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    gained = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    pre_gain = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    llama = "meta-llama/Llama-3.1-8B-Instruct"
    made: list[tuple[str, str, dict[str, Any] | None, str]] = [
        ("mntss/transcoder-Llama-3.2-1B", "", {"model_name": "meta-llama/Llama-3.2-1B", **raw}, "skip"),
        ("mwhanna/qwen3-0.6b-transcoders-lowl0", "", {"model_name": "Qwen/Qwen3-0.6B", **gained}, "wanb-config.yaml"),
        ("mwhanna/qwen3-14b-transcoders", "", None, "wandb-config.yaml"),
        ("facebook/crv-8b-instruct-transcoders", "", {"model_name": llama, **gained, "activation": "topk"}, ""),
        ("acme/gemma-transcoders", "", {"model_name": "gemma-2-2b", **pre_gain}, "threshold skip"),
        ("acme/topk-transcoders", "run/7", {"model_name": "gpt2", **raw, "activation": "topk", "k": 3}, "skip bf16"),
        ("acme/june-transcoders", "", {"model_name": "meta-llama/Llama-3.2-1B", **raw}, "skip transposed"),
    ]
    generator = torch.Generator().manual_seed(4)
    examples = []
    for repo, subfolder, config, kind in made:
        folder = root / repo / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        s, d = (140, 6) if "crv" in repo else (16, 7)
        for layer in range(2):
            tensors = _tensors(s, d, kind, generator)
            save_file(tensors, folder / f"layer_{layer}.safetensors")
        if config is not None:
            (folder / CONFIG).write_text(yaml.safe_dump({"model_kind": "transcoder_set", **config}))
        if kind in RUNS:
            (folder / kind).write_text(yaml.safe_dump({"d_model": {"value": d}, "d_feature": {"value": s}}))
        examples.append(Example(repo, f"{subfolder}/layer_1.safetensors".lstrip("/")))
    return examples


def _tensors(s: int, d: int, kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random tensors of a layer."""
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (s, d), "W_dec": (s, d), "b_enc": (s,), "b_dec": (d,)}
    if "transposed" in kind:
        shapes["W_dec"] = (d, s)
    if "skip" in kind:
        shapes["W_skip"] = (d, d)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "threshold" in kind:
        tensors["activation_function.threshold"] = 0.1 + torch.rand(s, generator=generator)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()} if "bf16" in kind else tensors
