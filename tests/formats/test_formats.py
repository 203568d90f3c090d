"""One format claims a folder, or loading stops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError, MissingFileError
from hf_gated_sae.formats import CheckpointFormat, Example, formats, sae_addresses
from hf_gated_sae.hub import Location, locate
from hf_gated_sae.hub.base_model_norms import normalization_of
from hf_gated_sae.modeling.checkpoint import Checkpoint
from tests.support.example_saes import example


@pytest.fixture
def second_format() -> Iterator[str]:
    """A format that claims every folder with a file named ``claim``."""

    class Greedy(CheckpointFormat):
        """Claims."""

        name = "greedy"

        def addresses(self, location: Location) -> list[str]:
            """Return nothing."""
            return []

        def examples(self, root: Path) -> list[Example]:
            """Return nothing."""
            return []

        def claims(self, location: Location) -> bool:
            """Claim."""
            return "claim" in location

        def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
            """Fail."""
            raise AssertionError("opened")

    yield Greedy.name
    del formats._entries["greedy"]


def test_our_own_is_registered() -> None:
    assert formats["native"].name == "native"


def test_two_claims_are_an_error(second_format: str, tmp_path: Path) -> None:
    example().save_pretrained(tmp_path)
    SAEModel.from_pretrained(tmp_path)
    (tmp_path / "claim").touch()
    with pytest.raises(CheckpointError, match="could be any of the formats greedy, native: it has claim, config.json"):
        SAEModel.from_pretrained(tmp_path)


def test_no_claim_is_an_error_that_lists_what_was_seen(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"file_{index:02}.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"file_00.bin, .*file_11.bin, \.\.\. \(30 files\); known formats: .*native"
    ):
        SAEModel.from_pretrained(tmp_path)


def test_folders_with_an_sae_are_found_by_names_alone(tmp_path: Path) -> None:
    example().save_pretrained(tmp_path / "a" / "b", max_shard_size=200)
    example().save_pretrained(tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text("not read")
    assert sae_addresses(locate(str(tmp_path))) == ["a/b", "c"]
    assert sae_addresses(locate(str(tmp_path)).at("a")) == ["a/b"]
    example().save_pretrained(tmp_path)
    assert sae_addresses(locate(str(tmp_path))) == ["", "a/b", "c"]


def test_variant(tmp_path: Path) -> None:
    sae = example()
    sae.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.fp16.safetensors").exists()
    loaded = SAEModel.from_pretrained(tmp_path, variant="fp16")
    assert (loaded.W_dec == sae.W_dec).all()
    with pytest.raises(MissingFileError, match="no model.safetensors in"):
        SAEModel.from_pretrained(tmp_path)


def test_a_location_is_a_view_of_one_listing(tmp_path: Path) -> None:
    for name in ("a/x.json", "a/b/y.json", "ab/z.json", ".hidden/w.json", "top.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"name": name}))
    root = locate(str(tmp_path))
    assert root.files == ["a/b/y.json", "a/x.json", "ab/z.json", "top.json"]
    assert root.folders == ["a", "a/b", "ab"]
    inner = root.at("a")
    assert inner.files == ["b/y.json", "x.json"] and "x.json" in inner and "z.json" not in inner
    assert inner.read_json("b/y.json") == {"name": "a/b/y.json"}
    assert inner.at("ab").read_bytes("z.json") == b'{"name": "ab/z.json"}'
    assert str(inner) == f"{tmp_path}/a" and inner.revision is None
    with pytest.raises(MissingFileError, match="no x.jsn in .*Did you mean 'x.json'"):
        inner.read_json("x.jsn")


@pytest.mark.parametrize("name", ["../top.json", "/etc/passwd", "b/../../top.json"])
def test_names_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "top.json").write_text("{}")
    (tmp_path / "a" / "x.json").write_text("{}")
    with pytest.raises(MissingFileError):
        locate(str(tmp_path)).at("a").read_json(name)


# ---------------------------------------------------------------- what layouts share


def test_the_norm_of_the_base_model_is_known_or_loading_stops() -> None:
    assert normalization_of("center", None, "hook_resid_post", "cfg.json") == {"normalization": "center"}
    for model, wanted in (
        ("google/gemma-2-2b", ("rms_norm", 1e-6)),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", ("rms_norm", 1e-5)),
        ("EleutherAI/pythia-70m", ("standardize", 1e-5)),
    ):
        found = normalization_of("rms_norm", model, "ln2.hook_normalized", "cfg.json")
        assert (found["normalization"], found["normalization_eps"]) == wanted
    with pytest.raises(CheckpointError, match=r"acme/own\) has an RMS norm or a layer norm there"):
        normalization_of("rms_norm", "acme/own", "ln2.hook_normalized", "cfg.json")


def test_a_file_of_layers_alone_is_not_claimed(tmp_path: Path) -> None:
    [*_, crosscoder] = formats["gemma_scope_2_cross_layer"].examples(tmp_path)
    folder = tmp_path / crosscoder.repo / crosscoder.address
    (folder / "params_layer_0.safetensors").unlink()
    location = locate(str(tmp_path / crosscoder.repo)).at(crosscoder.address)
    assert [name for name, layout in formats.items() if layout.claims(location)] == []


def test_an_embedding_sae_is_recognised_by_its_folder_alone(tmp_path: Path) -> None:
    formats["gemma_scope"].examples(tmp_path)
    address = "embedding/width_4k/average_l0_6"
    there = SAEModel.from_pretrained(tmp_path / "google/gemma-scope-2b-pt-res", address)
    (tmp_path / "google/gemma-scope-2b-pt-res").rename(tmp_path / "mine")
    here = SAEModel.from_pretrained(tmp_path / "mine", address)
    assert (here.config.site, here.config.base_model) == ("embed", None)
    assert (here.W_enc_T == there.W_enc_T).all() and (here.b_dec == there.b_dec).all()


def test_goodfire_s_file_name_says_which_kind_it_is(tmp_path: Path) -> None:
    *_, with_k, _ = formats["goodfire"].examples(tmp_path)
    [file] = (tmp_path / with_k.repo).glob("*.pt")
    file.rename(file.with_name("gpt-oss-20b-SAE-l7.pt"))
    with pytest.raises(CheckpointError, match="expected decoder_linear.weight of an SAE with a ReLU"):
        SAEModel.from_pretrained(tmp_path / with_k.repo)
