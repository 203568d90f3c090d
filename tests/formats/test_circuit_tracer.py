"""Pointer sets, single layers of cross-layer transcoders, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_gated_sae import SAEModel, SAESet
from hf_gated_sae.errors import CheckpointError, MissingFileError, SAEError
from hf_gated_sae.formats import formats, sae_addresses
from hf_gated_sae.hub import locate
from tests.support.example_saes import assert_same
from tests.support.mini_hub import MiniHub

SET, POINTED = "mntss/gemma-scope-transcoders", "google/gemma-scope-2b-pt-transcoders"
CLT = "mntss/clt-llama-3.2-1b-524k"


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """Write the examples of a format and return the folder of their repositories."""

    def write(name: str) -> Path:
        formats[name].examples(tmp_path / name)
        return tmp_path / name

    return write


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def change(file: Path, **values: Any) -> None:
    config = {**yaml.safe_load(file.read_text()), **values}
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))


# ---------------------------------------------------------------- pointers


@pytest.mark.parametrize("uri", ["hf://{repo}@{at}/{path}", "hf://{repo}/{path}?revision={at}"])
def test_a_pointer_is_pinned(
    uri: str, written: Callable[[str], Path], hub: MiniHub, cache_dir: str, repo_id: str
) -> None:
    root = written("circuit_tracer_pointers")
    pointed = files_of(root / POINTED)
    path = "layer_0/width_16k/average_l0_76/params.npz"
    old = hub.seed(repo_id + "-p", pointed)
    newer = hub.seed(repo_id + "-p", {**pointed, path: pointed["layer_1/width_16k/average_l0_65/params.npz"]})
    newest = f"hf://{repo_id}-p/{path}"
    config = yaml.safe_load((root / SET / "config.yaml").read_text())
    config["transcoders"] = [uri.format(repo=repo_id + "-p", path=path, at=old), newest]
    hub.seed(repo_id, {"config.yaml": yaml.safe_dump(config)})
    first, second = (SAEModel.from_pretrained(repo_id, f"layer_{layer}", cache_dir=cache_dir) for layer in (0, 1))
    assert not torch.equal(first.W_dec, second.W_dec)
    for sae, commit in ((first, old), (second, newer)):
        assert sae.checkpoint.files == ("config.yaml", f"hf://{repo_id}-p@{commit}/{path}")
        assert sae.checkpoint.revision == hub.repo(repo_id).at("main").id and sae.checkpoint.repo == repo_id
    offline = SAEModel.from_pretrained(repo_id, "layer_1", cache_dir=cache_dir, local_files_only=True)
    assert_same(offline, second)


def test_a_set_of_pointers_is_a_set(written: Callable[[str], Path]) -> None:
    found = SAESet.from_pretrained(written("circuit_tracer_pointers") / SET)
    assert found.addresses == ["layer_0", "layer_1"]
    assert found["layer_1"].config.site == "resid_mid.1"


def test_the_set_states_the_sites_of_its_transcoders(written: Callable[[str], Path]) -> None:
    folder = written("circuit_tracer_pointers") / SET
    change(folder / "config.yaml", feature_input_hook="mlp.hook_in", model_name="gemma-2-2b-it")
    config = SAEModel.from_pretrained(folder, "layer_0").config
    assert (config.site, config.normalization, config.base_model) == ("mlp_in.0", "none", "google/gemma-2-2b-it")
    change(folder / "config.yaml", feature_output_hook="mlp.hook_out")  # before Gemma's norm after the MLP
    assert SAEModel.from_pretrained(folder, "layer_0").config.site_out == "layers.0.mlp.output"
    change(folder / "config.yaml", feature_input_hook=None)  # a configuration for another tool, without this key
    assert SAEModel.from_pretrained(folder, "layer_0").config.site == "resid_mid.0"


def test_missing_targets_of_pointers_are_refused(written: Callable[[str], Path], hub: MiniHub, cache_dir: str) -> None:
    root = written("circuit_tracer_pointers")
    with pytest.raises(MissingFileError, match=r"no folder 'layer_2'.*'layer_0', 'layer_1'"):
        SAEModel.from_pretrained(root / SET, "layer_2")
    with pytest.raises(MissingFileError, match="pass subfolder= one of 'layer_0', 'layer_1'"):
        SAEModel.from_pretrained(root / SET)
    (root / POINTED / "layer_0/width_16k/average_l0_76/params.npz").unlink()
    with pytest.raises(MissingFileError, match="no layer_0/width_16k/average_l0_76/params.npz in .*points to"):
        SAEModel.from_pretrained(root / SET, "layer_0")
    shutil.rmtree(root / POINTED)
    change(root / SET / "config.yaml", transcoders=["hf://acme/gone/params.npz"])
    with pytest.raises(MissingFileError, match="acme/gone"):
        SAEModel.from_pretrained(root / SET, "layer_0", cache_dir=cache_dir)


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "hf://google/x/params.npz/../../y",
            "http://google/x/params.npz",
            "hf://google/params.npz",
            "hf://a/b/c.bin",
        ),
        *("params.npz", 7, None, ["hf://a/b/c.npz"], "hf:///b/c.npz", "hf://a/b/" + "c" * 2000 + ".npz", ""),
        *("hf://a/b/../../../etc/x.npz", "hf://google/gemma-scope-2b-pt-transcoders/layer_9/params.npz"),
    ],
)
def test_invalid_pointers_are_refused(uri: Any, written: Callable[[str], Path], cache_dir: str) -> None:
    folder = written("circuit_tracer_pointers") / SET
    change(folder / "config.yaml", transcoders=[uri])
    with pytest.raises(SAEError):
        SAEModel.from_pretrained(folder, "layer_0", cache_dir=cache_dir)
    sae_addresses(locate(str(folder)))


def test_a_cross_layer_set_points_to_one_folder_with_one_transcoder(written: Callable[[str], Path]) -> None:
    root = written("circuit_tracer_pointers")
    folder = root / "mwhanna/gemma-scope-2-1b-pt/clt/width_262k_l0_medium"
    uris = yaml.safe_load((folder / "config.yaml").read_text())["transcoders"]
    change(folder / "config.yaml", transcoders=[*uris[:2], uris[2].replace("262k", "524k")])
    with pytest.raises(CheckpointError, match="several folders; expected one"):
        SAEModel.from_pretrained(folder.parents[1], "clt/width_262k_l0_medium")
    single = f"hf://{POINTED}/layer_0/width_16k/average_l0_76/params.npz"
    change(folder / "config.yaml", transcoders=[single])
    with pytest.raises(CheckpointError, match="has model_kind cross_layer_transcoder, but points to"):
        SAEModel.from_pretrained(folder.parents[1], "clt/width_262k_l0_medium")


# ---------------------------------------------------------------- cross-layer transcoders


def test_a_layer_may_be_named_by_number_and_the_layers_add_up(written: Callable[[str], Path]) -> None:
    repo = written("circuit_tracer_clt") / CLT
    whole = SAEModel.from_pretrained(repo).double()
    x = torch.randn(9, *whole.input_shape, dtype=torch.float64)
    total = torch.zeros_like(whole(x).reconstruction)
    for layer in range(3):
        one = SAEModel.from_pretrained(repo, f"layer_{layer}").double()
        assert_same(one, SAEModel.from_pretrained(repo, f"W_enc_{layer}.safetensors").double())
        assert one.config.sites_read == [f"resid_mid.{layer}"]
        total[:, layer:] += one(x[:, layer : layer + 1]).reconstruction
    torch.testing.assert_close(total, whole(x).reconstruction)
    assert sae_addresses(locate(str(repo))) == ["", *(f"W_enc_{layer}.safetensors" for layer in range(3))]
    with pytest.raises(MissingFileError, match="layer_3"):
        SAEModel.from_pretrained(repo, "layer_3")


def test_one_layer_reads_its_own_files(written: Callable[[str], Path]) -> None:
    repo = written("circuit_tracer_clt") / CLT
    size = sum((repo / f"W_{part}_2.safetensors").stat().st_size for part in ("enc", "dec"))
    sae = SAEModel.from_pretrained(repo, "layer_2")
    assert 0 < sae.checkpoint.bytes_read < 3 * size  # headers are read apart from the values
    assert sae.checkpoint.files == ("config.yaml", "W_enc_2.safetensors", "W_dec_2.safetensors")


def rewrite(file: Path, **tensors: torch.Tensor | None) -> None:
    content = {**load_file(file), **{name: value for name, value in tensors.items() if value is not None}}
    save_file({name: value for name, value in content.items() if tensors.get(name, 0) is not None}, file)


def test_transcoders_whose_layers_do_not_fit(written: Callable[[str], Path]) -> None:
    repo = written("circuit_tracer_clt") / CLT
    rewrite(repo / "W_enc_1.safetensors", threshold_1=torch.full((11,), -0.5))
    with pytest.raises(CheckpointError, match=r"a threshold of -0\.5; expected none below 0"):
        SAEModel.from_pretrained(repo)
    rewrite(repo / "W_enc_1.safetensors", threshold_1=None)
    with pytest.raises(CheckpointError, match=r"Layer 1 of .* has no threshold, which the others have"):
        SAEModel.from_pretrained(repo)
    rewrite(repo / "W_enc_1.safetensors", threshold_1=torch.ones(11))
    planes = load_file(repo / "W_dec_1.safetensors")["W_dec_1"]
    rewrite(repo / "W_dec_1.safetensors", W_dec_1=torch.cat([planes, planes], 1))
    with pytest.raises(CheckpointError, match=r"decoders\.1 with shape \[11, 4, 8\]"):
        SAEModel.from_pretrained(repo)
    (repo / "W_dec_1.safetensors").unlink()
    with pytest.raises(MissingFileError, match="none of layer 1"):
        SAEModel.from_pretrained(repo)


def test_gemma_scope_2_is_recognised_by_its_folder(written: Callable[[str], Path]) -> None:
    repo = written("gemma_scope_2_cross_layer") / "google/gemma-scope-2-1b-pt"
    shutil.copytree(repo / "clt", repo / "mine")
    with pytest.raises(CheckpointError, match="read from the name of its folder; expected 'clt/width_"):
        SAEModel.from_pretrained(repo, "mine/width_262k_l0_medium")
    shutil.copytree(repo / "clt/width_262k_l0_medium", repo / "crosscoder/layer_1_2_width_1m_l0_big")
    with pytest.raises(CheckpointError, match="names 2 layers and has 3 files"):
        SAEModel.from_pretrained(repo, "crosscoder/layer_1_2_width_1m_l0_big")
    folder = repo / "clt/width_262k_l0_medium"
    (folder / "config.json").write_text('{"hf_hook_point_in": "model.layers.0.mlp.down_proj.input"}')
    with pytest.raises(CheckpointError, match="hf_hook_point_in = .*, but its folder's name implies mlp_in"):
        SAEModel.from_pretrained(repo, "clt/width_262k_l0_medium")
    (folder / "config.json").write_text('{"architecture": "relu"}')
    with pytest.raises(CheckpointError, match="architecture 'relu'; expected 'jump_relu'"):
        SAEModel.from_pretrained(repo, "clt/width_262k_l0_medium")


# ---------------------------------------------------------------- sets of files


@pytest.mark.parametrize(
    "repo, changes, message",
    [
        ("acme/topk-transcoders/run/7", {"k": None}, "has no k; expected a whole number"),
        ("acme/topk-transcoders/run/7", {"k": 3.5}, r"k = 3\.5; expected a whole number"),
        ("acme/topk-transcoders/run/7", {"k": 17}, r"k is 17, expected 1 \.\. d_sae = 16"),
        ("acme/topk-transcoders/run/7", {"activation": "gelu"}, "expected one of relu, topk"),
        ("acme/topk-transcoders/run/7", {"activation": "jump_relu"}, "has activation 'jump_relu', and there is no"),
        ("acme/gemma-transcoders", {"activation": "relu"}, "has activation 'relu', and there is a threshold"),
        ("acme/gemma-transcoders", {"feature_input_hook": "hook_mlp"}, "the hook point 'hook_mlp', which is unknown"),
        ("acme/gemma-transcoders", {"feature_output_hook": "ln2.hook_normalized"}, "is not added to the stream"),
        ("acme/gemma-transcoders", {"feature_output_hook": None}, "has no feature_output_hook"),
        ("acme/gemma-transcoders", {"model_name": 3}, "model_name = 3; expected a text"),
        ("acme/gemma-transcoders", {"model_name": "acme/own"}, "unknown whether the base model"),
    ],
)
def test_incomplete_and_contradictory_configurations_are_refused(
    repo: str, changes: dict[str, Any], message: str, written: Callable[[str], Path]
) -> None:
    folder = written("circuit_tracer") / repo
    change(folder / "config.yaml", **changes)
    with pytest.raises(SAEError, match=message):
        SAEModel.from_pretrained(folder, "layer_0.safetensors")


def test_only_known_sets_may_lack_the_configuration(written: Callable[[str], Path]) -> None:
    root = written("circuit_tracer")
    folder = root / "acme/mine"
    shutil.copytree(root / "mwhanna/qwen3-14b-transcoders", folder)
    with pytest.raises(CheckpointError, match="has no config.yaml, which names the base model"):
        SAEModel.from_pretrained(folder, "layer_0.safetensors")


def test_a_square_decoder_has_an_unknown_orientation(tmp_path: Path) -> None:
    square, vector = torch.randn(4, 4), torch.randn(4)
    tensors = {"W_enc": square, "W_dec": square.clone(), "b_enc": vector, "b_dec": vector.clone()}
    save_file(tensors, tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_text(
        "model_name: gpt2\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )
    with pytest.raises(CheckpointError, match="it is unknown whether W_dec is stored transposed"):
        SAEModel.from_pretrained(tmp_path)
    save_file({**tensors, "b_dec": torch.randn(3)}, tmp_path / "layer_0.safetensors")
    with pytest.raises(CheckpointError, match=r"W_dec \[4, 4\].*b_dec \[3\]"):
        SAEModel.from_pretrained(tmp_path)
