"""Arguments of `from_pretrained`: what it refuses, and what it leaves unchanged."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from hf_gated_sae import SAEModel, SAESet
from hf_gated_sae.errors import CheckpointError, InputError, LatentIndexError, MissingFileError
from tests.support.example_saes import D_SAE, assert_same, example

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    example("gated").save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_working_directory(name: str, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for load in (SAEModel.from_pretrained, SAESet.from_pretrained):
        with pytest.raises(InputError, match="expected 'owner/name' or a folder"):
            load(name)
    assert SAEModel.from_pretrained(".").checkpoint.repo == "."


@pytest.mark.parametrize("latent", [-1, D_SAE])
def test_latents_that_do_not_exist(folder: Path, latent: int) -> None:
    with pytest.raises(LatentIndexError, match=rf"Latent {latent} does not exist: .* 0 \.\. {D_SAE - 1}"):
        SAEModel.from_pretrained(folder, latents=[1, latent])


def test_a_latent_named_twice(folder: Path) -> None:
    with pytest.raises(InputError, match="latents= names latent 3 more than once"):
        SAEModel.from_pretrained(folder, latents=[1, 3, 3])


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"latents": [3]}])
def test_the_given_configuration_stays_as_it_is(folder: Path, options: dict) -> None:
    config = type(example("gated").config)(d_in=6, d_sae=D_SAE, site="resid_post.7")
    before = config.to_dict()
    sae = SAEModel.from_pretrained(folder, config=config, **options)
    assert sae.config.site == "resid_post.7" and sae.config is not config
    assert config.to_dict() == before


def test_threads_leave_the_verbosity_of_transformers_as_it_was(folder: Path) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with ThreadPoolExecutor(6) as pool:
        for _ in pool.map(lambda _: SAEModel.from_pretrained(folder, device_map="cpu"), range(30)):
            pass
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("options", ["", ", device_map='cpu'"])
def test_threads_from_a_cold_start_leave_nothing_behind(folder: Path, options: str) -> None:
    """The registries fill once, and what transformers builds afterwards has its weights."""
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "from hf_gated_sae import SAEModel\n"
        "from hf_gated_sae.demo import bundled\n"
        "with ThreadPoolExecutor(6) as pool:\n"
        f"    list(pool.map(lambda _: SAEModel.from_pretrained({str(folder)!r}{options}), range(30)))\n"
        "first, second = (AutoModelForCausalLM.from_pretrained(bundled.MODEL).state_dict() for _ in range(2))\n"
        "assert not any(tensor.is_meta for tensor in first.values())\n"
        "assert all(torch.equal(first[name], second[name]) for name in first)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_training_changes_neither_the_file_nor_another_loaded_copy(folder: Path) -> None:
    weights = folder / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).digest()
    trained, twin, original = (SAEModel.from_pretrained(folder) for _ in range(3))
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained.training_loss(torch.randn(8, 6), sparsity_coefficient=0.1).total.backward()
    optimizer.step()
    assert not torch.equal(trained.W_dec, original.W_dec)
    assert_same(twin, original)
    assert hashlib.sha256(weights.read_bytes()).digest() == before
    weights.unlink()
    assert torch.equal(twin(torch.ones(2, 6)).latents, original(torch.ones(2, 6)).latents)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_of_an_sae_names_its_folder(folder: Path, file: str) -> None:
    with pytest.raises(MissingFileError, match="omit subfolder="):
        SAEModel.from_pretrained(folder, file)
    with pytest.raises(MissingFileError, match="pass subfolder='sae'"):
        SAEModel.from_pretrained(folder.parent, f"sae/{file}")


def test_a_configuration_and_tensors_without_statistics() -> None:
    original = example("gated")
    held = {name: tensor for name, tensor in original.state_dict().items() if "activation" not in name}
    sae = SAEModel.from_pretrained(None, config=original.config, state_dict=held)
    assert torch.equal(sae.W_enc_T, original.W_enc_T) and not sae.max_activation.any()
    with pytest.raises(CheckpointError, match="lacks b_gate"):
        SAEModel.from_pretrained(
            None, config=original.config, state_dict={name: held[name] for name in held if name != "b_gate"}
        )
    with pytest.raises(InputError, match="both config= and architecture="):
        SAEModel.from_pretrained(None, config=original.config, architecture="gated", state_dict=held)
