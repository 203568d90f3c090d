"""Write SAEs and transcoders with SAELens. Usage: write_saelens.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import sae_lens
import torch
from cases import D_IN, TOKENS, inputs, scramble, write_case, write_versions
from sae_lens.saes.sae import SAEMetadata

D_SAE = 32
D_OUT = 7
HOOK = "blocks.3.hook_resid_post"
MODEL = {"model_name": "pythia-70m-deduped", "model_class_name": "HookedTransformer", "prepend_bos": True}
PLACE = {"base_model": "EleutherAI/pythia-70m-deduped", "site": "resid_post.3", "d_sae": D_SAE, "d_in": D_IN}
TRANSCODER = {**MODEL, "hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}

PLAN: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("StandardSAE", {}),
    "standard_raw_input": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "standard_layer_norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "gated": ("GatedSAE", {}),
    "jumprelu": ("JumpReLUSAE", {"apply_b_dec_to_input": False}),
    "jumprelu_layer_norm": ("JumpReLUSAE", {"normalize_activations": "layer_norm"}),
    "topk": ("TopKSAE", {"k": 4}),
    "topk_layer_norm": ("TopKSAE", {"k": 4, "normalize_activations": "layer_norm"}),
    "topk_rescaled": ("TopKSAE", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "abs_topk": ("AbsTopKSAE", {"k": 4}),
    "abs_topk_rescaled": ("AbsTopKSAE", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "matching_pursuit": ("MatchingPursuitSAE", {"residual_threshold": 0.1, "max_iterations": 5}),
    "transcoder": ("Transcoder", {"d_out": D_OUT}),
    "skip_transcoder": ("SkipTranscoder", {"d_out": D_OUT}),
    "jumprelu_transcoder": ("JumpReLUTranscoder", {"d_out": D_OUT}),
    "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", {"d_out": D_OUT}),
}
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "trained_standard": ("StandardTrainingSAE", {}),
    "trained_gated": ("GatedTrainingSAE", {}),
    "trained_jumprelu": ("JumpReLUTrainingSAE", {}),
    "trained_topk": ("TopKTrainingSAE", {"k": 4}),
    "trained_batchtopk": ("BatchTopKTrainingSAE", {"k": 4}),
    "trained_matryoshka": ("MatryoshkaBatchTopKTrainingSAE", {"k": 4, "matryoshka_widths": [8, D_SAE]}),
}


def made(class_name: str, settings: dict[str, Any], **metadata: Any) -> Any:
    """Return an SAE of a class with random weights."""
    config_class = getattr(sae_lens, f"{class_name}Config")
    given = {"d_in": D_IN, "d_sae": D_SAE, **settings}
    config = config_class(**given, metadata=SAEMetadata(**metadata))
    sae = getattr(sae_lens, class_name)(config)
    scramble(sae)
    return sae


def write(root: Path, name: str, address: str, x: torch.Tensor, *, loaded: str = "", **expected: Any) -> None:
    """Write SAELens's results for a checkpoint that it has saved.

    Args:
        root: folder of all cases.
        name: the case.
        address: folder of the checkpoint.
        x: activations; with an axis of heads, which is flattened, where the SAE reads heads separately.
        loaded: the folder that SAELens loads instead, with the same SAE in a layout that it reads.
        **expected: fields of our configuration.
    """
    sae = sae_lens.SAE.load_from_disk(root / name / (loaded or f"repository/{address}"))
    latents, output = sae.encode(x), sae(x)
    if sae.cfg.reshape_activations == "hook_z":
        x, output = x.flatten(-2), output.flatten(-2)
    write_case(root, name, address, x, latents, output, **expected)


@torch.no_grad()
def main(root: Path) -> None:
    """Write every case."""
    write_versions(root, "sae-lens")
    torch.manual_seed(0)
    for name, (class_name, settings) in PLAN.items():
        is_transcoder = "d_out" in settings
        if is_transcoder:
            settings = {**settings, "apply_b_dec_to_input": False}
        metadata = TRANSCODER if is_transcoder else {**MODEL, "hook_name": HOOK}
        sae = made(class_name, settings, **metadata)
        if class_name == "MatchingPursuitSAE":  # it converges for unit rows only
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
        sae.save_model(root / name / "repository" / HOOK)
        # A transcoder reads the normalised stream: make activations that the base model's layer norm does not change.
        x = inputs()
        if is_transcoder:
            x = x - x.mean(-1, keepdim=True)
            x = x / x.square().mean(-1, keepdim=True).sqrt() * (1 - 1e-5) ** 0.5
        expected = {"site": "resid_mid.3", "site_out": "mlp_out.3", "d_out": D_OUT} if is_transcoder else PLACE
        write(root, name, HOOK, x, **expected)
    for name, (class_name, settings) in TRAINED.items():
        sae = made(class_name, settings, **MODEL, hook_name=HOOK)
        sae.save_inference_model(root / name / "repository" / "export")
        write(root, name, "export", inputs(), **PLACE)
        if name.endswith(("batchtopk", "matryoshka")):  # an intermediate save of training, which SAELens does not load
            case = name.replace("trained", "training")
            sae.save_model(root / case / "repository" / "checkpoint")
            sae.save_inference_model(root / case / "export")
            write(root, case, "checkpoint", inputs(), loaded="export", **PLACE)
    heads = made("StandardSAE", {"reshape_activations": "hook_z"}, **MODEL, hook_name="blocks.2.attn.hook_z")
    heads.save_model(root / "hook_z" / "repository" / "layer_2")
    write(root, "hook_z", "layer_2", inputs().reshape(TOKENS, 2, D_IN // 2), site="attn_z.2")
    temporal = {"n_heads": 2, "bottleneck_factor": 2, "kval_topk": 4, "activation_normalization_factor": 0.5}
    temporal |= {"normalize_activations": "constant_scalar_rescale"}
    made("TemporalSAE", temporal, **MODEL, hook_name=HOOK).save_model(root / "temporal" / "repository" / HOOK)
    write(root, "temporal", HOOK, inputs().reshape(2, TOKENS // 2, D_IN), **PLACE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
