"""Time and memory of loading 1.2 GB checkpoints of 2,304 x 65,536, each load in its own process, in turns.

The peers run in the environment that `make test-peers` makes; without it only their rows are skipped.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_gated_sae import JumpReLUSAE, JumpReLUSAEConfig
from tests.benchmarks.loading import D_IN, D_SAE
from tests.benchmarks.measure import show

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("loading.py")
PEERS = Path(os.environ.get("HF_GATED_SAE_PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))
ROUNDS = 5

needs_peers = pytest.mark.skipif(not PEERS.exists(), reason="no peers' environment: run `make test-peers` once")

Result = dict[str, float]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "W_enc": torch.randn(D_IN, D_SAE, generator=generator) * 0.02,
        "W_dec": torch.randn(D_SAE, D_IN, generator=generator) * 0.02,
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(D_IN),
        "threshold": torch.full((D_SAE,), 0.5),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the large files while these tests run."""
    return tmp_path_factory.mktemp("large")


def gemma_scope(folder: Path) -> Path:
    path = folder / "google" / "gemma-scope-2b-pt-res" / "layer_12" / "width_65k" / "average_l0_72" / "params.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors().items()})
    return path


def saelens(folder: Path) -> Path:
    path = folder / "saelens" / "sae_weights.safetensors"
    path.parent.mkdir()
    save_file(tensors(), path)
    config = {
        "architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.12.hook_resid_post", "model_name": "gemma-2-2b", "sae_lens_version": "6.54"},
    }  # fmt: skip
    path.with_name("cfg.json").write_text(json.dumps(config))
    return path


def dictionary_learning(folder: Path) -> Path:
    path = folder / "run" / "resid_post_layer_12" / "trainer_0" / "ae.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors(), path)
    trainer = {
        "dict_class": "JumpReluAutoEncoder", "trainer_class": "JumpReluTrainer", "activation_dim": D_IN,
        "dict_size": D_SAE, "layer": 12, "lm_name": "google/gemma-2-2b", "submodule_name": "resid_post_layer_12",
    }  # fmt: skip
    path.with_name("config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    return path


def native(folder: Path) -> Path:
    path = folder / "ours"
    values = tensors()
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, site="resid_post.12", apply_b_dec_to_input=False))
    with torch.no_grad():
        sae.W_enc_T.copy_(values.pop("W_enc").T)
        for name, tensor in values.items():
            getattr(sae, name).copy_(tensor)
    sae.save_pretrained(path, max_shard_size="5GB")
    return path / "model.safetensors"


def measured(python: str | Path, what: str, path: Path, *latents: str) -> Result:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT) if python == sys.executable else ""}
    done = subprocess.run(
        [str(python), str(SCRIPT), what, str(path), *latents], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: Result = json.loads(done.stdout.split("RESULT ")[-1])
    return result


def in_turns(*runs: Callable[[], Result]) -> list[Result]:
    """Medians of every run's figures, measured in turns after one warm-up each."""
    for run in runs:
        run()
    rounds = [[run() for run in (runs if turn % 2 else runs[::-1])] for turn in range(ROUNDS)]
    ordered = [results if turn % 2 else results[::-1] for turn, results in enumerate(rounds)]
    return [
        {name: statistics.median(results[index][name] for results in ordered) for name in ordered[0][index]}
        for index in range(len(runs))
    ]


@needs_peers
@pytest.mark.parametrize(
    "make, peer, limit, whole",
    [
        (gemma_scope, "saelens_npz", 0.15, 0.6),
        (dictionary_learning, "dictionary_learning", 0.15, float("nan")),
        (saelens, "saelens", 1.0, float("nan")),
    ],
    ids=["Gemma Scope npz", "dictionary_learning pt", "SAELens safetensors"],
)
def test_load_to_first_encode(
    make: Callable[[Path], Path], peer: str, limit: float, whole: float, folder: Path
) -> None:
    path = make(folder)
    us, them, floor = in_turns(
        lambda: measured(sys.executable, "ours", path),
        lambda: measured(PEERS, peer, path),
        lambda: measured(sys.executable, "bytes", path),
    )
    weights = path.stat().st_size
    rows = [
        (f"load + first encode, CPU time / {peer}", us["encode"] / them["encode"], limit),
        ("whole process, CPU time / peer", us["process"] / them["process"], whole),
        ("load alone / reading the bytes once", us["load"] / floor["load"], float("nan")),
        ("peer's load alone / reading the bytes once", them["load"] / floor["load"], float("nan")),
        ("anonymous memory / size of the file", us["memory"] / weights, 1.1),
    ]
    path.unlink()
    show(f"{path.name}, 1.2 GB", rows)
    assert rows[0][1] <= limit and not rows[1][1] > whole and rows[4][1] <= 1.1


def test_four_latents(folder: Path) -> None:
    """A slice of our own layout and of Gemma Scope's, from a warm disk cache, after import."""
    rows = []
    for path in (native(folder), gemma_scope(folder)):
        runs = [measured(sys.executable, "ours", path, "5,1000,40000,65535") for _ in range(ROUNDS)]
        milliseconds = 1000 * statistics.median(run["load_wall"] for run in runs)
        rows.append((f"{path.name}: ms to load", milliseconds, 10.0))
        rows.append((f"{path.name}: KiB read", runs[0]["bytes_read"] / 1024, float("nan")))
        path.unlink()
    show("4 latents of 1.2 GB", rows)
    assert rows[0][1] <= 10 and rows[2][1] <= 10
