"""Write dictionaries with dictionary_learning's own training loop. Usage: write_dictionary_learning.py FOLDER"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from cases import D_IN, TOKENS, inputs, scramble, write_case, write_versions
from dictionary_learning import trainers
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

D_SAE = 32
STEPS = 6
MODEL = "EleutherAI/pythia-70m-deduped"
PLACE = "resid_post_layer_3"
K = {"k": 4}
PLAN: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard.StandardTrainer", {}),
    "standard_april": ("standard.StandardTrainerAprilUpdate", {}),
    "p_anneal": ("p_anneal.PAnnealTrainer", {"anneal_start": 2}),
    "gated": ("gdm.GatedSAETrainer", {}),
    "gated_anneal": ("gated_anneal.GatedAnnealTrainer", {"anneal_start": 2}),
    "topk": ("top_k.TopKTrainer", {**K, "threshold_start_step": 1}),
    "batch_topk": ("batch_top_k.BatchTopKTrainer", {**K, "threshold_start_step": 1}),
    "batch_topk_unset": ("batch_top_k.BatchTopKTrainer", {**K, "threshold_start_step": 1000}),
    "matryoshka": (
        "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
        {**K, "threshold_start_step": 1, "group_fractions": [0.25, 0.75]},
    ),
    "jumprelu": ("jumprelu.JumpReluTrainer", {}),
}


class Batches(list[torch.Tensor]):
    """Activations, with the configuration that the library's buffers have."""

    config = {"d_submodule": D_IN, "io": "out", "n_ctxs": 8, "ctx_len": 16, "device": "cpu"}


def batches() -> Batches:
    """Return a few batches."""
    return Batches(inputs(seed) for seed in range(STEPS + 1))


def trainer_class(path: str) -> type:
    """Return a trainer by module and name."""
    module, _, name = path.partition(".")
    return getattr(__import__(f"{trainers.__name__}.{module}", fromlist=[name]), name)


def settings(name: str, path: str, more: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a trainer."""
    given = {"steps": STEPS, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": MODEL, "device": "cpu"}
    schedule = {"warmup_steps": 1}
    if "k" not in more:
        schedule["sparsity_warmup_steps"] = 1
    place = {} if name == "gated_anneal" else {"submodule_name": PLACE}
    return {"trainer": trainer_class(path), **given, **schedule, **place, **more}


def train(folder: Path, name: str, path: str, more: dict[str, Any], *, normalised: bool) -> None:
    """Train with the library, which also saves intermediate steps."""
    trainSAE(
        data=batches(),
        trainer_configs=[settings(name, path, more)],
        steps=STEPS,
        save_steps=[STEPS // 2],
        save_dir=str(folder),
        normalize_activations=normalised,
        device="cpu",
    )


@torch.no_grad()
def write(root: Path, name: str, address: str, *, noisy: bool) -> None:
    """Write the library's results for an input, with the saved weights as they are or with noise added."""
    file = root / name / "repository" / address
    home = file if file.is_dir() else file.parent.parent
    place = home
    if file.is_file():  # the library loads folders only
        place = root / name / "copy"
        place.mkdir(parents=True)
        shutil.copy(home / "config.json", place / "config.json")
        shutil.copy(file, place / "ae.pt")
    if noisy:
        saved = torch.load(place / "ae.pt", weights_only=True)
        holder = torch.nn.Module()
        for key, value in saved.items():
            holder.register_buffer(key.replace(".", "/"), value)
        scramble(holder, size=0.3)
        if saved.get("threshold", torch.tensor(0.0)).ndim == 0 and name.endswith("unset"):
            holder.threshold.fill_(-1.0)
        torch.save({key.replace("/", "."): value for key, value in holder.state_dict().items()}, place / "ae.pt")
    dictionary, config = load_dictionary(str(place), "cpu")
    x = inputs(9)
    latents = dictionary.encode(x)
    assert latents.shape == (TOKENS, D_SAE), config
    write_case(root, name, address, x, latents, dictionary.decode(latents), base_model=MODEL, site="resid_post.3")


def main(root: Path) -> None:
    """Write every case."""
    write_versions(root, "dictionary-learning")
    torch.manual_seed(0)
    final = f"run/{PLACE}/trainer_0"
    for name, (path, more) in PLAN.items():
        for kind in ("final", "noisy", "step", "scaled"):
            case = f"{kind}_{name}"
            folder = root / case / "repository" / final
            train(folder.parent, name, path, dict(more), normalised=kind == "scaled")
            address = f"{final}/checkpoints/ae_{STEPS // 2}.pt" if kind == "step" else final
            write(root, case, address, noisy=kind == "noisy")
    new = root / "noisy_new" / "repository" / final
    new.mkdir(parents=True)
    torch.save(AutoEncoderNew(D_IN, D_SAE).state_dict(), new / "ae.pt")
    about = {"dict_class": "AutoEncoderNew", "layer": 3, "lm_name": MODEL, "submodule_name": PLACE}
    (new / "config.json").write_text(json.dumps({"trainer": about, "buffer": Batches.config}))
    write(root, "noisy_new", final, noisy=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
