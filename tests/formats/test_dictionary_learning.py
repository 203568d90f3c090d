"""Cases beyond the examples: invalid values, and names of sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gated_sae import SAEModel, SAESet
from hf_gated_sae.errors import CheckpointError, InputError
from hf_gated_sae.formats._dictionary_learning_sites import site_fields
from hf_gated_sae.formats.dictionary_learning import KINDS


def written(folder: Path, trainer: Any, *, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    state = {
        "b_dec": torch.randn(5),
        "encoder.weight": torch.randn(16, 5),
        "encoder.bias": torch.randn(16),
        "decoder.weight": torch.randn(5, 16),
        "k": torch.tensor(3, dtype=torch.int),
        "threshold": torch.tensor(0.5),
        **changes,
    }
    torch.save({name: value for name, value in state.items() if name not in drop}, folder / "ae.pt")
    if isinstance(trainer, dict):
        trainer = {"dict_class": "BatchTopKSAE", "layer": 3, "submodule_name": "resid_post_layer_3", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


def test_a_valid_checkpoint_loads(tmp_path: Path) -> None:
    sae = SAEModel.from_pretrained(written(tmp_path, {}))
    assert sae.config.site == "resid_post.3" and sae.config.base_model is None and sae.threshold == 0.5


def test_a_layer_that_is_written_as_a_text(tmp_path: Path) -> None:
    assert SAEModel.from_pretrained(written(tmp_path, {"layer": "3"})).config.site == "resid_post.3"
    with pytest.raises(CheckpointError, match="has layer = 4, but the activations' name is 'resid_post_layer_3'"):
        SAEModel.from_pretrained(written(tmp_path, {"layer": "4"}))


def test_an_invalid_sae_does_not_prevent_loading_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, layer in enumerate(("3", 3, "three")):
        (tmp_path / f"trainer_{number}").mkdir()
        written(tmp_path / f"trainer_{number}", {"layer": layer})
    saes = SAESet.from_pretrained(tmp_path)
    assert len(saes) == 3 and saes.sites == ["resid_post.3"]
    assert "trainer_2" in caplog.text and "layer = 'three'" in caplog.text
    assert len(SAESet.from_pretrained(tmp_path, sites="resid_post.3")) == 2
    with pytest.raises(CheckpointError, match="layer = 'three'; expected a whole number"):
        saes["trainer_2"]


@pytest.mark.parametrize(
    "trainer, message",
    [
        ({"dict_class": "IdentityDict"}, "dict_class 'IdentityDict'; expected one of AutoEncoder, "),
        ({"dict_class": 7}, "dict_class = 7; expected a text"),
        ({"dict_class": "AutoEncoder"}, "lacks bias and has an unknown b_dec, k, threshold"),
        ({"layer": "three"}, "layer = 'three'; expected a whole number"),
        ({"layer": 4}, "layer = 4, but the activations' name is 'resid_post_layer_3'"),
        ({"submodule_name": ["x"]}, "submodule_name"),
        ({"lm_name": {"a": 1}}, "lm_name"),
        ({"k": 4}, "have k = 3, 4; expected one number"),
        ({"k": "3"}, "k = '3'; expected a number"),
    ],
)
def test_an_invalid_configuration_is_refused(trainer: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        SAEModel.from_pretrained(written(tmp_path, trainer))


@pytest.mark.parametrize("trainer", [None, 3, [], "text"])
def test_without_a_trainer_it_is_not_of_this_layout(trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names a dict_class"):
        SAEModel.from_pretrained(written(tmp_path, trainer))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"drop": ("threshold",)}, "without a threshold.*Measure"),
        ({"drop": ("encoder.bias",)}, "lacks encoder.bias"),
        ({"k": torch.tensor([1, 2])}, "expected a number"),
        ({"k": torch.tensor(1.5)}, "expected a number"),
        ({"encoder.bias": "text"}, "encoder.bias = 'text'; expected a tensor"),
        ({"decoder.weight": torch.randn(16, 5)}, "rows, one per latent"),
        ({"threshold": torch.tensor([float("nan")] * 2)}, "threshold"),
        ({"threshold": torch.tensor(float("nan"))}, "NaN"),
    ],
)
def test_an_invalid_file_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, InputError), match=message):
        SAEModel.from_pretrained(written(tmp_path, {}, **changes))


@pytest.mark.parametrize("factor", ["2", float("nan"), 0, -1.0, float("inf"), [1]])
def test_a_backup_with_an_invalid_factor_is_refused(factor: Any, tmp_path: Path) -> None:
    content = torch.load(written(tmp_path, {}) / "ae.pt", weights_only=True)
    torch.save({"step": 3, "ae": content, "norm_factor": factor}, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="norm_factor"):
        SAEModel.from_pretrained(tmp_path)


def test_a_latent_without_a_decoder_row_stays_finite(tmp_path: Path) -> None:
    W_dec = torch.randn(5, 16)
    W_dec[:, 4] = 0
    state = {"bias": torch.randn(5), "encoder.weight": torch.randn(16, 5), "encoder.bias": torch.randn(16)}
    written(tmp_path, {"dict_class": "AutoEncoder"})
    torch.save({**state, "decoder.weight": W_dec}, tmp_path / "ae.pt")
    sae = SAEModel.from_pretrained(tmp_path)
    assert torch.equal(sae.W_enc_T[4], state["encoder.weight"][4]) and not sae.W_dec[4].any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1)[:4], torch.ones(4))


@pytest.mark.parametrize(
    "name, io, model, address, place",
    [
        ("resid_post_layer_8", "out", "google/gemma-2-2b", "", {"site": "resid_post.8"}),
        ("resid_out_layer3", "out", None, "", {"site": "resid_post.3"}),
        ("resid_post_layer_8", "in", None, "", {"site": "resid_pre.8"}),
        (None, "out", None, "run/resid_post_layer_8_checkpoints/trainer_1_step_10", {"site": "resid_post.8"}),
        (None, "out", None, "run/trainer_1", {}),
        ("mlp_out_layer_8", "out", "EleutherAI/pythia-70m", "", {"site": "mlp_out.8"}),
        ("mlp_out_layer_8", "out", "google/gemma-2-2b", "", {"site": "layers.8.mlp.output"}),
        ("mlp_layer_8", "in", "google/gemma-2-2b", "", {"site": "mlp_in.8"}),
        ("attn_layer_8", "in_and_out", "gpt2", "", {"site": "attn_in.8", "site_out": "attn_out.8"}),
        ("attention_out_layer_8", "out", "allenai/OLMo-2-1124-7B", "", {"site": "layers.8.self_attn.output"}),
        ("embed", "out", None, "", {"site": "embed"}),
        ("something_layer_8", "out", None, "resid_post_layer_8", {}),
        ("resid_post_layer_8", "sideways", None, "", {}),
    ],
)
def test_sites(name: str | None, io: str, model: str | None, address: str, place: dict[str, str]) -> None:
    assert site_fields({"submodule_name": name, "lm_name": model}, {"io": io}, address, "a file") == place


def test_every_class_of_the_library_is_read() -> None:
    assert len(KINDS) == 7
