"""Broken checkpoints: each raises one of our errors, with a sentence that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_gated_sae import GatedSAE, SAEModel, StandardSAE, TopKSAEConfig
from hf_gated_sae.errors import CheckpointError, InputError, MissingFileError, SAEError
from tests.support.example_saes import assert_same, example

Corruption = Callable[[Path], None]


def config(change: Callable[[dict[str, Any]], Any]) -> Corruption:
    """Change config.json."""

    def corrupt(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return corrupt


def put(**values: Any) -> Corruption:
    return config(lambda content: content.update(values))


def drop(key: str) -> Corruption:
    return config(lambda content: content.pop(key))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Corruption:
    """Change the weights."""

    def corrupt(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path, metadata={"format": "pt"})

    return corrupt


def raw(name: str, change: Callable[[bytes], bytes]) -> Corruption:
    """Change the bytes of a file."""

    def corrupt(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return corrupt


def remove(name: str) -> Corruption:
    return lambda folder: (folder / name).unlink()


def _not_finite(value: float) -> Corruption:
    def change(content: dict[str, torch.Tensor]) -> None:
        content["W_dec"][2, 3] = value

    return tensors(change)


def _shards(change: Callable[[Path], None]) -> Corruption:
    """Write the SAE in shards, then change something."""

    def corrupt(folder: Path) -> None:
        SAEModel.from_pretrained(folder).save_pretrained(folder, max_shard_size=200)
        change(folder)

    return corrupt


def _pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def second_shard(folder: Path) -> Path:
    return next(folder.glob("model-00002-of-*.safetensors"))


def remove_second_shard(folder: Path) -> None:
    second_shard(folder).unlink()


def truncate_second_shard(folder: Path) -> None:
    second_shard(folder).write_bytes(second_shard(folder).read_bytes()[:-4])


CORRUPTIONS: dict[str, tuple[Corruption, type[SAEError], str]] = {
    # missing files
    "no configuration": (remove("config.json"), CheckpointError, "holds no SAE in a known format.*model.safetensors"),
    "no weights": (remove("model.safetensors"), MissingFileError, "no model.safetensors.*It has config.json.*save"),
    "a pickle instead": (_pickle_instead, MissingFileError, "no model.safetensors.*pytorch_model.bin.*safetensors"),
    "a shard is missing": (
        _shards(remove_second_shard), MissingFileError, "no model-00002-of-"
    ),
    "two sets of weights": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), CheckpointError, "holds both"
    ),
    # the configuration
    "configuration is empty": (raw("config.json", lambda data: b""), CheckpointError, "not valid JSON"),
    "configuration is truncated": (raw("config.json", lambda data: data[:50]), CheckpointError, "not valid JSON"),
    "configuration is binary": (raw("config.json", lambda data: b"\xff\x00" * 9), CheckpointError, "not valid JSON"),
    "configuration is a list": (raw("config.json", lambda data: b"[1]"), CheckpointError, "expected an object"),
    "configuration is too deep": (raw("config.json", lambda data: b"[" * 10**6), CheckpointError, "not valid JSON"),
    "mistyped architecture": (put(model_type="gatd_sae"), CheckpointError, "'gatd_sae'.*Did you mean 'gated_sae'"),
    "another kind of model": (put(model_type="llama"), CheckpointError, "'llama'.*another kind, not an SAE"),
    "unknown architecture": (put(model_type="zzz"), CheckpointError, "'zzz'.*Known: .*batch_topk_sae, .*gated_sae"),
    "no architecture": (drop("model_type"), CheckpointError, "no model_type; expected one of.*gated_sae"),
    "architecture is a number": (put(model_type=3), CheckpointError, "model_type 3, which is unknown"),
    "architecture is a list": (put(model_type=["gated_sae"]), CheckpointError, "which is unknown"),
    "unknown key": (put(d_saee=16), CheckpointError, "no key 'd_saee'.*Did you mean 'd_sae'"),
    "missing key": (drop("d_sae"), CheckpointError, "lacks d_sae"),
    "text for a number": (put(d_sae="16"), CheckpointError, r"d_sae is '16' \(str\), expected int"),
    "fraction for a whole number": (put(d_sae=16.0), CheckpointError, r"d_sae is 16.0 \(float\), expected int"),
    "number for a flag": (put(apply_b_dec_to_input=1), CheckpointError, "apply_b_dec_to_input is 1 .*expected bool"),
    "null for a number": (put(d_in=None), CheckpointError, r"d_in is None \(NoneType\), expected int"),
    "negative width": (put(d_sae=-16), CheckpointError, "d_sae is -16, expected a positive number"),
    "unknown dtype": (put(dtype=" float32"), CheckpointError, "dtype is ' float32', expected one of torch"),
    "a kernel to be downloaded": (put(attn_implementation="owner/kernel"), CheckpointError, "attn_implementation is"),
    "dtype that is a list": (put(dtype=["float32"]), CheckpointError, "dtype is .*which transformers never writes"),
    "labels that are none": (put(id2label="x"), CheckpointError, "id2label is 'x'"),
    "impossible matrix": (put(d_in=2**31 - 1, d_out=2**31 - 1, d_sae=2**31 - 1), CheckpointError, "matrices of at"),
    "wrong d_in": (put(d_in=7, d_out=7), CheckpointError, r"W_enc_T with shape \[16, 6\] where.*\[16, 7\]"),
    "wrong d_sae": (put(d_sae=15), CheckpointError, r"W_dec with shape \[16, 6\] where.*\[15, 6\]"),
    "enormous d_sae": (put(d_sae=2**31 - 1), CheckpointError, "W_dec with shape"),
    "impossible d_sae": (put(d_sae=10**30), CheckpointError, "expected a positive number up to 2147483647"),
    "wrong architecture": (
        put(model_type="standard_sae"), CheckpointError, "lacks b_enc; has b_gate, b_mag, r_mag, which"
    ),
    # the weights
    "weights are empty": (raw("model.safetensors", lambda data: b""), CheckpointError, "cannot be read"),
    "weights are truncated": (raw("model.safetensors", lambda data: data[:-20]), CheckpointError, "cannot be read"),
    "only the header": (raw("model.safetensors", lambda data: data[:100]), CheckpointError, "cannot be read"),
    "rubbish": (raw("model.safetensors", lambda data: b"rubbish!" * 99), CheckpointError, "cannot be read"),
    "huge header": (
        raw("model.safetensors", lambda data: b"\xff" * 8 + data[8:]), CheckpointError, "cannot be read"
    ),
    "missing tensor": (tensors(lambda t: t.pop("r_mag")), CheckpointError, "lacks r_mag.*Expected exactly.*b_gate"),
    "extra tensor": (
        tensors(lambda t: t.update(W_skip=torch.zeros(3))), CheckpointError, "has W_skip, which this architecture"
    ),
    "renamed tensor": (
        tensors(lambda t: t.update(b_gates=t.pop("b_gate"))), CheckpointError, "b_gates.*Did you mean 'b_gate'"
    ),
    "misshaped tensor": (
        tensors(lambda t: t.update(b_mag=torch.zeros(3))), CheckpointError, r"b_mag with shape \[3\] where.*\[16\]"
    ),
    "transposed tensor": (
        tensors(lambda t: t.update(W_dec=t["W_dec"].T.contiguous())), CheckpointError, r"W_dec with shape \[6, 16\]"
    ),
    "NaN": (_not_finite(float("nan")), CheckpointError, "1 NaN or infinite values in W_dec"),
    "infinity": (_not_finite(float("inf")), CheckpointError, "1 NaN or infinite values in W_dec"),
    "complex numbers": (
        tensors(lambda t: t.update(W_dec=t["W_dec"].to(torch.complex64))),
        CheckpointError, "W_dec.*C64.*not a tensor of a supported type",
    ),
    "whole numbers": (
        tensors(lambda t: t.update(W_dec=t["W_dec"].to(torch.int8))),
        CheckpointError, "W_dec as torch.int8; expected floating",
    ),
    "numbers of 8 bits": (
        tensors(lambda t: t.update(W_dec=t["W_dec"].to(torch.float8_e4m3fn))),
        CheckpointError, "W_dec as torch.float8_e4m3fn; expected floating-point numbers of 16",
    ),
    # the index of the shards
    "index is broken": (
        _shards(raw("model.safetensors.index.json", lambda data: data[:30])), CheckpointError, "not valid JSON"
    ),
    "index without a map": (
        _shards(raw("model.safetensors.index.json", lambda data: b'{"metadata": {}}')), CheckpointError, "weight_map"
    ),
    "index leaves the folder": (
        _shards(raw("model.safetensors.index.json", lambda d: d.replace(b"model-00002", b"../../model-00002"))),
        MissingFileError, "no ../../model-00002",
    ),
    "index lacks a tensor": (
        _shards(
            raw(
                "model.safetensors.index.json",
                lambda data: json.dumps({
                    "metadata": {"total_size": 1},
                    "weight_map": {k: v for k, v in json.loads(data)["weight_map"].items() if k != "r_mag"},
                }).encode(),
            )
        ),
        CheckpointError, "disagree about r_mag",
    ),
    "a shard is truncated": (
        _shards(truncate_second_shard), CheckpointError, "cannot be read"
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint of a Gated SAE."""
    example("gated", site="resid_post.1").save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_a_broken_checkpoint_is_refused(name: str, folder: Path) -> None:
    corrupt, error, phrase = CORRUPTIONS[name]
    corrupt(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=f"(?s){phrase}") as raised:
        SAEModel.from_pretrained(folder)
    assert str(folder) in str(raised.value) or folder.name in str(raised.value)
    assert len(str(raised.value)) < 900
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["text for a number", "unknown key", "missing key", "negative width"])
def test_the_auto_classes_refuse_bad_configurations_too(name: str, folder: Path) -> None:
    CORRUPTIONS[name][0](folder)
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(SAEError, match="d_sae"):
            load(folder)


@pytest.mark.parametrize("name", ["missing tensor", "NaN", "weights are truncated", "wrong d_sae"])
def test_auto_model_refuses_bad_weights_too(name: str, folder: Path) -> None:
    CORRUPTIONS[name][0](folder)
    with pytest.raises(CheckpointError):
        AutoModel.from_pretrained(folder)


def test_wrong_class(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a GatedSAE, not a StandardSAE.*GatedSAE.from_pretrained"):
        StandardSAE.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="is a GatedSAE, not a StandardSAE"):
        StandardSAE.from_pretrained(None, config=GatedSAE.from_pretrained(folder).config, state_dict={})


def test_a_configuration_of_another_class(folder: Path) -> None:
    with pytest.raises(InputError, match="config= is a TopKSAEConfig.*GatedSAEConfig"):
        SAEModel.from_pretrained(folder, config=TopKSAEConfig(d_in=6, d_sae=16, k=2))


def test_neither_folder_nor_configuration() -> None:
    with pytest.raises(InputError, match="neither a checkpoint nor config="):
        SAEModel.from_pretrained(None)


def test_folders_that_hold_no_sae(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="is empty; expected config.json"):
        SAEModel.from_pretrained(tmp_path / "empty")
    with pytest.raises(MissingFileError, match="itself holds no SAE.*subfolder= one of 'sae'"):
        SAEModel.from_pretrained(tmp_path)
    with pytest.raises(MissingFileError, match="no folder 'sea'. Did you mean 'sae'"):
        SAEModel.from_pretrained(tmp_path, "sea")
    with pytest.raises(InputError, match="expected a folder inside the repository"):
        SAEModel.from_pretrained(tmp_path, "../sae")
    with pytest.raises(InputError, match="is a file; expected the folder"):
        SAEModel.from_pretrained(folder / "config.json")


def test_saving_over_a_file(folder: Path) -> None:
    with pytest.raises(InputError, match="is a file; expected a folder"):
        example().save_pretrained(folder / "config.json")


def test_unknown_argument(folder: Path) -> None:
    with pytest.raises(InputError, match="no argument 'revison'.*Did you mean 'revision'"):
        SAEModel.from_pretrained(folder, revison="main")


def test_a_stored_value_can_be_replaced_while_loading(folder: Path) -> None:
    assert SAEModel.from_pretrained(folder, site="mlp_out.3").config.site == "mlp_out.3"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_refused_or_harmless(data: st.DataObject, folder: Path) -> None:
    """Flip, cut or insert bytes anywhere: our own error, or an SAE that is complete and finite."""
    damaged = folder.parent / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder, damaged)
    path = damaged / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    stop = start + data.draw(st.sampled_from([0, 1, 2, 8, 64]))
    content[start:stop] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    try:
        sae = SAEModel.from_pretrained(damaged)
    except SAEError as error:
        assert len(str(error)) < 1500
    else:
        assert all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())
        assert set(sae.state_dict()) == set(example().state_dict())


def test_a_sound_checkpoint_is_loaded(folder: Path) -> None:
    assert_same(example("gated", site="resid_post.1"), SAEModel.from_pretrained(folder))
