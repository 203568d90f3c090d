"""SAELens's files where they say too little, too much, or nonsense."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError, InputError, SAEError
from hf_gated_sae.formats import formats

Change = Callable[..., Path]
SITE = {"metadata": {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post"}}
WEIGHTS = "sae_weights.safetensors"


@pytest.fixture
def saelens(tmp_path: Path) -> Change:
    """Return a function that writes the example of a format, with changes to its cfg.json and other files."""

    def write(address: str, name: str = "saelens", repo: str = "acme/saelens-saes", **changes: Any) -> Path:
        formats[name].examples(tmp_path)
        folder = tmp_path / repo / address
        cfg = json.loads((folder / "cfg.json").read_text())
        metadata = {**cfg.get("metadata", {}), **changes.pop("metadata", {})}
        cfg |= {"metadata": metadata} if metadata else {}
        cfg |= changes
        (folder / "cfg.json").write_text(json.dumps({key: cfg[key] for key in cfg if cfg[key] != "absent"}))
        return folder

    return write


# ---------------------------------------------------------------- scales that no file holds


def test_an_unknown_scale_is_not_guessed(saelens: Change) -> None:
    folder = saelens("blocks.3.hook_resid_post", normalize_activations="expected_average_only_in")
    with pytest.raises(
        CheckpointError, match=r"trained on c \* x.*fold_activation_norm_scaling_factor.*activation_sc"
    ):
        SAEModel.from_pretrained(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": null, "has_whitening": true}')
    with pytest.raises(CheckpointError, match=r"trained on c \* x"):
        SAEModel.from_pretrained(folder)


def test_a_scale_is_taken_from_where_the_message_says(saelens: Change) -> None:
    folder = saelens("blocks.3.hook_resid_post")
    sae = SAEModel.from_pretrained(folder).double()
    saelens("blocks.3.hook_resid_post", normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    scaled = SAEModel.from_pretrained(folder).double()
    x = torch.randn(20, sae.config.d_in, dtype=torch.float64)
    torch.testing.assert_close(scaled(x).latents, sae(x / 4).latents)
    torch.testing.assert_close(scaled(x).reconstruction, sae(x / 4).reconstruction * 4)


def test_known_facts_fill_in(saelens: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def known(repo_id: str, address: str) -> dict[str, Any]:
        asked.append((repo_id, address))
        return {"input_scale": 0.5, "normalization": "center", "base_model": "acme/other"}

    monkeypatch.setattr("hf_gated_sae.hub.index.known_facts", known)
    folder = saelens("blocks.3.hook_resid_post", normalize_activations="expected_average_only_in")
    sae = SAEModel.from_pretrained(folder.parents[0], "blocks.3.hook_resid_post")
    raw = load_file(folder / WEIGHTS)
    torch.testing.assert_close(sae.W_dec, raw["W_dec"] * 2)
    torch.testing.assert_close(sae.W_enc, raw["W_enc"] / 2)
    assert sae.config.normalization == "center" and sae.config.base_model == "google/gemma-2-2b"
    assert asked[0] == ("acme/saelens-saes", "blocks.3.hook_resid_post")
    # If the file names no normalisation, the scale is already folded in.
    saelens("blocks.3.hook_resid_post", normalize_activations="none")
    torch.testing.assert_close(SAEModel.from_pretrained(folder).W_dec, raw["W_dec"])


def test_a_normalisation_of_the_index_replaces_that_of_the_file(
    saelens: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_gated_sae.hub.index.known_facts", lambda *_: {"normalization": "unit_norm"})
    folder = saelens("blocks.3.hook_resid_post", normalize_activations="expected_average_only_in")
    assert SAEModel.from_pretrained(folder).config.normalization == "unit_norm"
    with pytest.raises(CheckpointError, match="normalised twice \\(rms_norm, unit_norm\\)"):
        SAEModel.from_pretrained(saelens("tc/jump_skip"))


# ---------------------------------------------------------------- sites


@pytest.mark.parametrize(
    "metadata, wanted",
    [
        ({"hook_name": "blocks.7.hook_mlp_out"}, ("mlp_out.7", "none")),
        (
            {"hook_name": "transformer.h.3.mlp", "model_class_name": "AutoModelForCausalLM"},
            ("transformer.h.3.mlp.output", "none"),
        ),
        ({"hook_name": None}, (None, "none")),
        ({"model_name": "gpt2", "hook_name": "blocks.3.ln2.hook_normalized"}, ("resid_mid.3", "standardize")),
        ({"model_name": "gpt2", "hook_name": "ln_final.hook_normalized"}, (None, "none")),
        (
            {"model_name": "gpt2", "model_from_pretrained_kwargs": {"center_writing_weights": True}},
            ("resid_post.3", "center"),
        ),
        (
            {"model_name": "google/gemma-2-2b", "model_from_pretrained_kwargs": {"center_writing_weights": True}},
            ("resid_post.3", "none"),
        ),
        (
            {
                "model_name": "gpt2",
                "hook_name": "blocks.3.attn.hook_z",
                "model_from_pretrained_kwargs": {"center_writing_weights": True},
            },
            ("attn_z.3", "none"),
        ),
    ],
)
def test_sites(saelens: Change, metadata: dict[str, Any], wanted: tuple[str | None, str]) -> None:
    config = SAEModel.from_pretrained(saelens("blocks.3.hook_resid_post", metadata=metadata)).config
    assert (config.site, config.normalization) == wanted


@pytest.mark.parametrize(
    "metadata, wanted",
    [
        ({"prepend_bos": True}, True),
        ({"prepend_bos": True, "exclude_special_tokens": False, "seqpos_slice": [None]}, True),
        ({"prepend_bos": True, "exclude_special_tokens": True}, False),
        ({"prepend_bos": True, "exclude_special_tokens": [1, 2]}, None),
        ({"prepend_bos": True, "seqpos_slice": [5, None]}, None),
        ({"prepend_bos": False}, None),  # a BOS may still separate documents
        ({"prepend_bos": False, "exclude_special_tokens": True}, False),
        ({"prepend_bos": "yes"}, None),
    ],
)
def test_bos(saelens: Change, metadata: dict[str, Any], wanted: bool | None) -> None:
    assert (
        SAEModel.from_pretrained(saelens("blocks.3.hook_resid_post", metadata=metadata)).config.trained_on_bos
        is wanted
    )


def test_an_unknown_site_does_not_prevent_loading(saelens: Change, caplog: pytest.LogCaptureFixture) -> None:
    folder = saelens("blocks.3.hook_resid_post", metadata={"hook_name": "blocks.2.attn.hook_nonsense"})
    sae = SAEModel.from_pretrained(folder)
    assert sae.config.site is None
    assert "'blocks.2.attn.hook_nonsense', which is unknown" in caplog.text


# ---------------------------------------------------------------- refused in a sentence


@pytest.mark.parametrize(
    "address, changes, message",
    [
        ("gated/layer_2", {"metadata": {"hook_head_index": 3}}, "one head of 'blocks.2.hook_resid_pre'"),
        ("gated/layer_2", {"architecture": "gatd"}, "expected one of standard, gated"),
        ("gated/layer_2", {"architecture": ["gated"]}, "expected one of"),
        ("gated/layer_2", {"normalize_activations": "covariance_whitening"}, "fold the whitening"),
        ("gated/layer_2", {"normalize_activations": "batch_norm"}, "expected one of none"),
        ("gated/layer_2", {"d_in": 9}, "has d_in = 9, and the tensors beside it have 8"),
        ("gated/layer_2", {"d_sae": "16"}, "d_sae = '16'; expected a whole number"),
        ("gated/layer_2", {"apply_b_dec_to_input": 1}, "expected true or false"),
        ("gated/layer_2", {"architecture": "standard"}, "lacks b_enc and has an unknown b_gate"),
        ("tc/relu", {"metadata": {"hook_name_out": None}}, "hook_name_out = None; expected the hook point"),
        ("tc/relu", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ("tc/relu", {"metadata": {"hook_name_out": None}}, "or pass site_out=, such as site_out='mlp_out.5'"),
        ("tc/skip", {"normalize_activations": "layer_norm"}, "skip connection reads the unnormalised input"),
        ("tc/skip", {"normalize_activations": "layer_norm"}, "A skip connection with another input"),
        ("gated/layer_2", {"metadata": {"hook_head_index": 3}}, "a site here is all heads concatenated"),
        ("topk.rescaled", {"k": "absent"}, "has no k"),
        ("topk.rescaled", {"k": 17}, "k is 17"),
        ("topk.rescaled", {"k": float("nan")}, "k = .?nan"),
        ("pursuit", {"residual_threshold": -1}, "residual_threshold is"),
        ("pursuit", {"max_iterations": 0}, "max_iterations is 0"),
        ("pursuit", {"residual_threshold": "absent"}, "has no residual_threshold"),
        ("temporal/tied", {"n_attn_layers": 10**9}, "expected 0 .. 64"),
        ("temporal/tied", {"n_heads": 0}, "heads is 0"),
        ("temporal/tied", {"bottleneck_factor": 5}, "divides"),
        ("temporal/tied", {"tied_weights": False}, "lacks W_enc"),
        ("temporal/untied", {"activation_normalization_factor": 0}, "expected a positive number"),
        ("temporal/untied", {"activation_normalization_factor": 1e400}, "expected a finite number"),
    ],
)
def test_invalid_configurations_are_refused(
    saelens: Change, address: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((CheckpointError, InputError), match=message):
        SAEModel.from_pretrained(saelens(address, **changes))


@pytest.mark.parametrize(
    "address, changes, message",
    [
        ("gated", {"activation_fn_str": "tanh-relu"}, "'gated' with the activation 'tanh-relu'"),
        ("gated", {"architecture": "jumprelu", "activation_fn_str": "topk"}, "with the activation 'topk'"),
        ("gated", {"hook_head_index": 0}, "one head"),
        ("gated", {"normalize_activations": True}, r"trained on c \* x"),
        ("gated", {"metadata": {"x": 1}}, "has no architecture|lacks b_enc|unknown"),
    ],
)
def test_invalid_old_configurations_are_refused(
    saelens: Change, address: str, changes: dict[str, Any], message: str
) -> None:
    folder = saelens(address, "saelens_legacy", "acme/saelens-saes-4", **changes)
    if "metadata" in changes:
        (folder / "cfg.json").write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match=message):
        SAEModel.from_pretrained(folder)


NONSENSE = [True, -1, 10**30, 1.5, float("nan"), "x", [1], {"a": 1}]
KEYS = """
    d_in d_sae d_out architecture apply_b_dec_to_input normalize_activations k n_heads n_attn_layers kval_topk
    bottleneck_factor sae_diff_type tied_weights residual_threshold max_iterations scaling_factor
    rescale_acts_by_decoder_norm activation_fn_str activation_fn_kwargs hook_layer hook_name
""".split()


@pytest.mark.parametrize(
    "address, name, repo",
    [
        ("topk.rescaled", "saelens", "acme/saelens-saes"),
        ("temporal/tied", "saelens", "acme/saelens-saes"),
        ("pursuit", "saelens", "acme/saelens-saes"),
        ("tc/skip", "saelens", "acme/saelens-saes"),
        ("topk", "saelens_legacy", "acme/saelens-saes-5"),
    ],
)
def test_nonsense_is_refused_or_harmless(saelens: Change, address: str, name: str, repo: str) -> None:
    """Any error other than ours fails the test."""
    folder = saelens(address, name, repo)
    good = json.loads((folder / "cfg.json").read_text())
    metadata = [f"metadata.{key}" for key in good.get("metadata", {})]
    for key in [*KEYS, *metadata]:
        for value in NONSENSE:
            cfg = json.loads(json.dumps(good))
            (cfg["metadata"] if key in metadata else cfg)[key.removeprefix("metadata.")] = value
            (folder / "cfg.json").write_text(json.dumps(cfg))
            try:
                SAEModel.from_pretrained(folder)
            except SAEError as error:
                assert len(str(error)) < 2000


@pytest.mark.parametrize("address", ["tc/relu", "tc/skip", "tc/jump"])
def test_a_transcoder_writes_where_the_user_says(saelens: Change, address: str) -> None:
    said = SAEModel.from_pretrained(saelens(address)).float()
    folder = saelens(address, metadata={"hook_name_out": None})
    with pytest.raises(CheckpointError, match="pass site_out="):
        SAEModel.from_pretrained(folder)
    sae = SAEModel.from_pretrained(folder, site_out="mlp_out.4").float()
    assert sae.config.site_out == "mlp_out.4" and sae.config.is_transcoder
    x = torch.randn(5, sae.config.d_in)
    torch.testing.assert_close(sae(x).reconstruction, said(x).reconstruction)
    other = type(sae.config).from_dict({**sae.config.to_dict(), "site_out": None})
    with pytest.raises(CheckpointError, match="pass site_out="):
        SAEModel.from_pretrained(folder, config=other)


def test_the_sae_of_a_head_can_be_described(saelens: Change) -> None:
    folder = saelens("gated/layer_2", metadata={"hook_head_index": 3})
    sae = SAEModel.from_pretrained(
        folder, WEIGHTS, architecture="gated", format="home_made", apply_b_dec_to_input=False, dtype=torch.float32
    )
    raw = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    x = torch.randn(5, sae.config.d_in)
    on = x @ raw["W_enc"] + raw["b_gate"] > 0
    torch.testing.assert_close(sae.encode(x), on * torch.relu(x @ (raw["W_enc"] * raw["r_mag"].exp()) + raw["b_mag"]))


def test_factors_of_fine_tuning_in_version_6(saelens: Change) -> None:
    plain = SAEModel.from_pretrained(saelens("gated/layer_2"), dtype=torch.float32)
    folder = saelens("gated/layer_2", finetuning_scaling_factor=True)
    raw = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    factors = 0.5 + torch.rand(len(raw["W_dec"]))
    save_file({**raw, "scaling_factor": factors}, folder / WEIGHTS)
    tuned, x = SAEModel.from_pretrained(folder), torch.randn(5, plain.config.d_in)
    latents = plain.encode(x)
    torch.testing.assert_close(tuned.encode(x), latents)
    torch.testing.assert_close(tuned(x).reconstruction, (latents * factors) @ raw["W_dec"] + raw["b_dec"])
    saelens("gated/layer_2", finetuning_scaling_factor="absent")
    save_file({**raw, "scaling_factor": factors}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="fine-tuning factors .scaling_factor., but .* in cfg.json is not true"):
        SAEModel.from_pretrained(folder)
    save_file({**raw, "scaling_factor": torch.ones_like(factors)}, folder / WEIGHTS)
    torch.testing.assert_close(SAEModel.from_pretrained(folder).W_dec, plain.W_dec)


def test_factors_of_fine_tuning_that_are_missing(saelens: Change) -> None:
    folder = saelens("gated", "saelens_legacy", "acme/saelens-saes-4", finetuning_scaling_factor=True)
    with pytest.raises(CheckpointError, match="has no scaling_factor: the SAE needs those factors"):
        SAEModel.from_pretrained(folder)


def test_factors_of_fine_tuning_that_the_configuration_denies(saelens: Change) -> None:
    folder = saelens("tuned", "saelens_legacy", "acme/saelens-saes-3", finetuning_scaling_factor=False)
    with pytest.raises(CheckpointError, match="fine-tuning factors .scaling_factor., but .* in cfg.json is not true"):
        SAEModel.from_pretrained(folder)


def test_a_half_precision_batch_topk_keeps_its_threshold(saelens: Change) -> None:
    folder = saelens("checkpoints/matryoshka", normalize_activations="none")
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value.half() if value.ndim else value for name, value in tensors.items()}, folder / WEIGHTS)
    sae = SAEModel.from_pretrained(folder)
    assert sae.dtype == torch.float16 and sae.threshold.dtype == torch.float32
    assert (sae.threshold == torch.tensor(1.3)).all()


@pytest.mark.parametrize(
    "name", ["final_sparse_autoencoder_gpt2-small_blocks.8.hook_resid_pre_24576.pt", "sae_group_gpt2.pkl.gz"]
)
def test_pickles_of_version_1_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not opened")
    for address in ("", name):
        with pytest.raises(CheckpointError, match="SAELens 1 or older.*could run any code.*Reformatted"):
            SAEModel.from_pretrained(tmp_path, address)
