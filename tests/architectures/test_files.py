"""Copies, files and Auto classes of every registered architecture; a new one needs no change here."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_gated_sae.modeling import SAEModel
from tests.support.example_saes import D_IN, D_SAE, ONE_SITE, assert_same, build, example, randomised, settings_of

pytestmark = pytest.mark.slow

every_architecture = pytest.mark.parametrize("architecture", ONE_SITE)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(7)).to(dtype)


@every_architecture
def test_copies_are_equal_and_independent(architecture: str) -> None:
    sae = example(architecture)
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert_same(sae, other)
        with torch.no_grad():
            other.W_dec += 1
        assert not torch.equal(sae.W_dec, other.W_dec)


@every_architecture
def test_every_tensor_is_contiguous(architecture: str) -> None:
    sae = example(architecture)
    assert all(tensor.is_contiguous() for tensor in sae.state_dict().values())
    rows = sae.state_dict()["W_dec" if sae.tied else "W_enc_T"]
    assert sae.W_enc.data_ptr() == rows.data_ptr()  # the other orientation costs no memory


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saving_and_loading_is_bit_exact(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = example(architecture, site="resid_post.3", base_model="acme/lm", base_model_revision="1" * 40)
    sae.save_pretrained(tmp_path / "first")
    sae = SAEModel.from_pretrained(tmp_path / "first", dtype=dtype)
    assert sae.W_dec.dtype == dtype and sae.b_dec.dtype == dtype
    sae.save_pretrained(tmp_path / "second")
    again = SAEModel.from_pretrained(tmp_path / "second")
    assert_same(sae, again)
    assert again.config.site == "resid_post.3" and not again.training
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == ["config.json", "model.safetensors"]


@every_architecture
def test_half_precision_keeps_what_needs_float32(architecture: str, tmp_path: Path) -> None:
    sae = example(architecture)
    sae.save_pretrained(tmp_path)
    half = SAEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.max_activation.dtype == torch.float32
    if "threshold" in half.state_dict():
        assert half.state_dict()["threshold"].dtype == torch.float32
    x = activations(64)
    latents = half.encode(x.bfloat16())
    assert latents.dtype == torch.bfloat16 and half.decode(latents, x.bfloat16()).dtype == torch.bfloat16
    both = (latents != 0) & (sae.encode(x) != 0)  # near its threshold a latent may fall on either side
    torch.testing.assert_close(latents.float()[both], sae.encode(x)[both], rtol=0.05, atol=0.05)


@every_architecture
def test_sharded(architecture: str, tmp_path: Path) -> None:
    sae = example(architecture)
    sae.save_pretrained(tmp_path, max_shard_size=200)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    assert_same(sae, SAEModel.from_pretrained(tmp_path))
    (tmp_path / "model-notes.safetensors").touch()  # not a shard of ours
    sae.save_pretrained(tmp_path)  # replaces the shards
    names = ["config.json", "model-notes.safetensors", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert_same(sae, SAEModel.from_pretrained(tmp_path))


@every_architecture
@pytest.mark.parametrize("device_map", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}])
def test_device_map(architecture: str, device_map: Any, tmp_path: Path) -> None:
    sae = example(architecture)
    sae.save_pretrained(tmp_path)
    loaded = SAEModel.from_pretrained(tmp_path, device_map=device_map)
    assert_same(sae, loaded)
    assert torch.equal(loaded.encode(activations(2)), sae.encode(activations(2)))


@every_architecture
def test_loading_by_its_own_class_and_from_a_state_dict(architecture: str, tmp_path: Path) -> None:
    sae = example(architecture)
    sae.save_pretrained(tmp_path / "inner" / "folder")
    assert_same(sae, type(sae).from_pretrained(tmp_path, "inner/folder"))
    assert_same(sae, SAEModel.from_pretrained(tmp_path, subfolder="inner/folder/"))
    loaded, info = SAEModel.from_pretrained(tmp_path / "inner" / "folder", output_loading_info=True)
    assert_same(sae, loaded)
    assert not info["missing_keys"]
    other = SAEModel.from_pretrained(None, config=sae.config, state_dict=sae.state_dict())
    assert_same(sae, other)


@every_architecture
def test_auto_classes(architecture: str, tmp_path: Path) -> None:
    sae = example(architecture, site="resid_post.3")
    sae.save_pretrained(tmp_path / "a")
    assert_same(sae, AutoModel.from_pretrained(tmp_path, subfolder="a"))
    config = AutoConfig.from_pretrained(tmp_path / "a")
    assert type(config) is type(sae.config) and config.to_dict().keys() == sae.config.to_dict().keys()
    assert type(AutoModel.from_config(config)) is type(sae)


@pytest.fixture(scope="module")
def loaded_in_a_fresh_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What AutoModel loads for every architecture in a process that has only imported the package."""
    folder = tmp_path_factory.mktemp("all")
    for name in ONE_SITE:
        example(name).save_pretrained(folder / name)
    code = (
        "import json, sys, torch\n"
        "import hf_gated_sae\n"
        "from transformers import AutoConfig, AutoModel\n"
        "found = {}\n"
        f"for name in {ONE_SITE!r}:\n"
        f"    folder = {str(folder)!r} + '/' + name\n"
        "    config = type(AutoConfig.from_pretrained(folder)).__name__\n"
        "    sae = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, device_map='cpu')\n"
        "    latents = sae.encode(torch.zeros(1, 6).bfloat16())[0].tolist()\n"
        "    found[name] = [config, type(sae).__name__, str(sae.dtype), latents]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@every_architecture
def test_auto_classes_in_a_fresh_process(architecture: str, loaded_in_a_fresh_process: dict[str, Any]) -> None:
    sae = example(architecture)
    config, model, dtype, latents = loaded_in_a_fresh_process[architecture]
    assert (config, model, dtype) == (type(sae.config).__name__, type(sae).__name__, "torch.bfloat16")
    assert len(latents) == D_SAE


@every_architecture
def test_a_failed_save_changes_nothing(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = example(architecture)
    sae.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = randomised(build(architecture), seed=5)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@every_architecture
def test_the_configuration_survives_json(architecture: str) -> None:
    config = example(architecture, site="mlp_out.1", apply_b_dec_to_input=False).config
    again = type(config).from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert settings_of(example(architecture))["model_type"] == f"{architecture}_sae"
