"""Example checkpoints in the layouts of all SAELens versions and architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .base import Example

D_SAE = 16
MINE = "acme/saelens-saes"
GPT2 = {"model_name": "gpt2-small", "hook_name": "blocks.2.hook_resid_pre"}
GEMMA = {"model_name": "gemma-2-2b", "hook_name": "blocks.3.hook_resid_post", "prepend_bos": True}
LLAMA = {
    "model_name": "meta-llama/Llama-3.2-1B",
    "model_class_name": "AutoModelForCausalLM",
    "hook_name": "model.layers.4",
    "prepend_bos": True,
    "exclude_special_tokens": True,
}
MLP = {**GEMMA, "hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
VERSIONS = {"sae_lens_version": "6.18.1", "sae_lens_training_version": "6.18.1", "context_size": 1024}
SCALED = {"normalize_activations": "expected_average_only_in"}
ATTENTION = {"n_heads": 2, "n_attn_layers": 2, "bottleneck_factor": 2, "sae_diff_type": "topk", "kval_topk": 4}


def _current() -> list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Return address, architecture, further keys of ``cfg.json``, its metadata, and settings of the tensors."""
    scaler = {"activation_scaler.json": {"scaling_factor": 0.37, "has_whitening": False}}
    half = torch.bfloat16
    tied = {**ATTENTION, "tied_weights": True, "apply_b_dec_to_input": False}
    untied = {**ATTENTION, "tied_weights": False, "normalize_activations": "constant_scalar_rescale"}
    untied["activation_normalization_factor"] = 0.21
    return [
        ("acme/root-sae", "standard", {"normalize_activations": "layer_norm"}, LLAMA, {}),
        (f"{MINE}/gated/layer_2", "gated", {"apply_b_dec_to_input": False}, GPT2, {"dtype": half}),
        (f"{MINE}/blocks.3.hook_resid_post", "jumprelu", {}, GEMMA, {}),
        (
            f"{MINE}/topk_k5:v1",
            "topk",
            {"k": 5, "rescale_acts_by_decoder_norm": False, "normalize_activations": "constant_norm_rescale"},
            {**GEMMA, "hook_name": "blocks.3.attn.hook_z"},
            {"reshape": "hook_z"},
        ),
        (f"{MINE}/topk.rescaled", "topk", {"k": 5, "rescale_acts_by_decoder_norm": True}, GEMMA, {}),
        (f"{MINE}/abstopk.pt", "abstopk", {"k": 5, "rescale_acts_by_decoder_norm": False}, GPT2, {}),
        (f"{MINE}/abstopk.rescaled.pt", "abstopk", {"k": 5, "rescale_acts_by_decoder_norm": True}, GPT2, {}),
        (f"{MINE}/pursuit", "matching_pursuit", {**_pursuit(1.5, 4), **SCALED}, GEMMA, {"files": scaler}),
        (f"{MINE}/pursuit/plain", "matching_pursuit", {**_pursuit(0, None), "apply_b_dec_to_input": False}, GEMMA, {}),
        (f"{MINE}/temporal/tied", "temporal", tied, GEMMA, {}),
        (f"{MINE}/temporal/untied", "temporal", untied, GEMMA, {}),
        (f"{MINE}/tc/relu", "transcoder", {"d_out": 5}, MLP, {}),
        (f"{MINE}/tc/skip", "skip_transcoder", {"d_out": 5}, {**MLP, "hook_name": "blocks.3.mlp.hook_in"}, {}),
        (
            f"{MINE}/tc/jump",
            "jumprelu_transcoder",
            {"d_out": 7, "normalize_activations": "layer_norm"},
            {**MLP, "hook_name": "blocks.3.hook_resid_mid"},
            {"dtype": half},
        ),
        (f"{MINE}/tc/jump_skip", "jumprelu_skip_transcoder", {"d_out": 5}, MLP, {}),
        (
            f"{MINE}/checkpoints/final_122880000",
            "batchtopk",
            {"k": 4.5, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01, **SCALED},
            GEMMA,
            {"files": scaler},
        ),
        (
            f"{MINE}/checkpoints/matryoshka",
            "matryoshka_batchtopk",
            {"k": 4.0, "rescale_acts_by_decoder_norm": False, "matryoshka_widths": [4, 16], **SCALED},
            GEMMA,
            {"files": scaler},
        ),
    ]


def write_current(root: Path) -> list[Example]:
    """Write one SAE of every architecture, normalisation and kind of folder name, as version 6 saves them."""
    examples = []
    for seed, (path, architecture, extra, metadata, how) in enumerate(_current()):
        example, d = _example(path), 6 + 2 * (seed % 3)
        transcoder = "transcoder" in architecture
        cfg = {"d_in": d, "d_sae": D_SAE, "dtype": "float32", "device": "cuda", **extra}
        cfg = {"apply_b_dec_to_input": not transcoder, "normalize_activations": "none", **cfg}
        cfg |= {"reshape_activations": how.get("reshape", "none"), "metadata": {**VERSIONS, **metadata}}
        cfg |= {"architecture": architecture}
        tensors = _tensors(architecture, d, extra.get("d_out", d), seed, bool(extra.get("tied_weights")))
        tensors = {name: value.to(how.get("dtype", value.dtype)) for name, value in tensors.items()}
        examples.append(_write(root, example, cfg, tensors, how.get("files", {})))
    return examples


def write_legacy(root: Path) -> list[Example]:
    """Write SAEs as versions 2 to 5 saved them."""
    relu = {"activation_fn_str": "relu", "activation_fn_kwargs": {}}
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    old = {"architecture": "standard", **relu}
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    plain = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    mistral = {"model_name": "mistral-7b", "hook_name": "blocks.8.hook_resid_pre"}
    made: list[tuple[str, str, dict[str, Any]]] = [
        ("acme/gemma-2b-residual/gemma_2b_blocks.1.hook_resid_post_16384_anthropic", "standard", _whole_run()),
        ("jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre", "ones", {**relu, **GPT2, "prepend_bos": True}),
        (
            "tommmcgrath/gpt2-small-mlp-out-saes/sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1",
            "standard",
            {"model_name": "gpt2", "hook_name": "blocks.0.hook_mlp_out", "normalize_activations": True, **relu},
        ),
        ("JoshEngels/Mistral-7B-Residual-Stream-SAEs/mistral_7b_layer_8", "standard", {**old, **mistral}),
        (
            "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs/v5_32k_layer_0.pt",
            "standard",
            {**GPT2, **topk, "architecture": "standard", "normalize_activations": "layer_norm", **plain},
        ),
        (
            "ctigges/pythia-70m-deduped__att-sm_processed/0-att-sm",
            "standard",
            {**old, "model_name": "pythia-70m-deduped", "hook_name": "blocks.0.hook_attn_out", **centred},
        ),
        (f"{MINE}-4/gated", "gated", {"architecture": "gated", **relu, **GEMMA, "exclude_special_tokens": [2]}),
        (f"{MINE}-5/jump", "jumprelu", {"architecture": "jumprelu", **relu, **GEMMA, "seqpos_slice": [1, None]}),
        (f"{MINE}-5/topk", "standard", {"architecture": "topk", **topk, **GEMMA, "seqpos_slice": [None]}),
        (f"{MINE}-3/tanh", "standard", {**old, **GPT2, "activation_fn_str": "tanh-relu"}),
        (f"{MINE}-3/tuned", "factors", {**old, **GPT2, "finetuning_scaling_factor": True}),
        ("acme/legacy-root", "standard", {**old, **GPT2, "hook_name": "blocks.{layer}.hook_mlp_out", **plain}),
    ]
    examples = []
    for seed, (path, held, extra) in enumerate(made):
        d = 6 + seed % 3
        tensors = _tensors("standard" if held in ("ones", "factors") else held, d, d, 100 + seed)
        if held in ("ones", "factors"):
            generator = torch.Generator().manual_seed(seed)
            tensors["scaling_factor"] = torch.ones(D_SAE) + (held == "factors") * torch.rand(
                D_SAE, generator=generator
            )
        cfg: dict[str, Any] = {"d_in": d, "d_sae": D_SAE, "dtype": "torch.float32", "device": "mps"}
        if "hook_point" not in extra:
            cfg |= {"apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "context_size": 128}
            cfg |= {"hook_layer": 2, "hook_head_index": None, "dataset_trust_remote_code": True}
            cfg |= {"dataset_path": "Skylion007/openwebtext", "normalize_activations": "none"}
            cfg |= {"sae_lens_training_version": None, "neuronpedia_id": None}
        sparsity = {"sparsity.safetensors": {"sparsity": torch.linspace(-6, -1, D_SAE)}}
        examples.append(_write(root, _example(path), {**cfg, **extra}, tensors, sparsity))
    return examples


def _pursuit(threshold: float, iterations: int | None) -> dict[str, Any]:
    return {"residual_threshold": threshold, "max_iterations": iterations, "stop_on_duplicate_support": True}


def _whole_run() -> dict[str, Any]:
    """Return part of the training run's configuration, as version 2 wrote it."""
    return {
        "model_name": "gemma-2b",
        "hook_point": "blocks.1.hook_resid_post",
        "hook_point_layer": 1,
        "hook_point_head_index": None,
        "is_dataset_tokenized": False,
        "context_size": 1024,
        "prepend_bos": True,
        "b_dec_init_method": "zeros",
        "expansion_factor": 8,
        "activation_fn": "relu",
        "normalize_sae_decoder": False,
        "noise_at_init": 0.0,
        "l1_coefficient": 5,
        "lp_norm": 1,
        "lr": 5e-05,
        "use_ghost_grads": False,
        "model_kwargs": {},
    }


def _tensors(architecture: str, d: int, d_out: int, seed: int, tied: bool = False) -> dict[str, Tensor]:
    """Return random tensors with an architecture's names and shapes in the file."""
    s = D_SAE
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (s, d_out), "b_dec": (d_out,)}
    if architecture != "matching_pursuit" and not tied:
        shapes["W_enc"] = (d, s)
    if architecture == "gated":
        shapes |= {"b_gate": (s,), "b_mag": (s,), "r_mag": (s,)}
    elif architecture == "temporal":
        for layer in range(ATTENTION["n_attn_layers"]):  # type: ignore[call-overload]  # a number, among values of other types
            for name, width in (("q_target", s // 2), ("k_ctx", s // 2), ("v_ctx", s), ("c_proj", s)):
                shapes[f"attn_layers.{layer}.{name}.weight"] = (width, s)
                shapes[f"attn_layers.{layer}.{name}.bias"] = (width,)
    elif architecture != "matching_pursuit":
        shapes["b_enc"] = (s,)
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if architecture == "matching_pursuit":  # trained with unit norm
        tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=-1) * 1.02
    if "jumprelu" in architecture:
        tensors["threshold"] = torch.rand(s, generator=generator)
    if "batchtopk" in architecture:
        tensors["topk_threshold"] = torch.tensor(1.3, dtype=torch.float64)
    return tensors


def _example(path: str) -> Example:
    owner, name, *folders = path.split("/")
    return Example(f"{owner}/{name}", "/".join(folders))


def _write(
    root: Path, example: Example, cfg: dict[str, Any], tensors: dict[str, Tensor], files: dict[str, Any]
) -> Example:
    """Write the weights, ``cfg.json`` and the given other files, and return the example."""
    folder = root / example.repo / example.address
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    for name, content in {"cfg.json": cfg, "runner_cfg.json": {"seed": 42}, **files}.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content, indent=2))
        else:
            save_file(content, folder / name)
    return example
