"""Runs as YAML files and flags: settings that are read, and settings that are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_gated_sae.architectures import architectures
from hf_gated_sae.errors import (
    InputError,
    MissingFileError,
    SAEError,
    UnknownNameError,
)
from hf_gated_sae.training.run import assemble, plain, read_flags, read_run
from hf_gated_sae.training.run.assembly import arguments
from hf_gated_sae.training.run.run_parts import build
from hf_gated_sae.training.run.strict_yaml import leaves, merged


def test_flags_override_the_file_and_the_file_its_preset(small: dict, tmp_path: Path) -> None:
    small["preset"] = "gated-paper"
    small["training"] |= {"learning_rate": 2e-4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small))
    flags = read_flags(["--training.max_steps", "7", "--sae.d_sae=96", "--seed", "3", "--training.bf16"])
    config = read_run(tmp_path / "run.yaml", flags)
    args = arguments(config)
    assert (args.max_steps, config.sae.d_sae, config.seed, args.seed, args.bf16) == (7, 96, 3, 3, True)
    assert args.learning_rate == 2e-4
    assert args.activation_scale == "none", "from the preset: neither flags nor file set it"


@pytest.mark.parametrize("flags", [["--sae.d_sae", "96"], ["--sae", "{d_sae: 96}"], ["--saes", "{a: {d_sae: 96}}"]])
def test_a_flag_replaces_the_alternative_of_the_file(small: dict, flags: list[str]) -> None:
    small["sae"] = {"site": "resid_post.1", "expansion_factor": 4}
    for preset in (None, "gated-modern"):
        [sae] = assemble({**small, "preset": preset}, read_flags(flags)).named.values()
        assert (sae.d_sae, sae.expansion_factor) == (96, None)
    with pytest.raises(InputError, match="Given both sae.d_sae and sae.expansion_factor"):
        assemble(small, read_flags(["--sae.d_sae", "96", "--sae.expansion_factor", "2"]))
    with pytest.raises(InputError, match="sae.d_sae is 'abc'; expected a whole number"):
        assemble(small, read_flags(["--sae.d_sae", "abc"]))


def test_a_flag_of_one_sae_overrides_its_section(small: dict) -> None:
    small["saes"] = {"low": {"expansion_factor": 2}, "high": {"sparsity_coefficient": 8}}
    config = assemble(small, read_flags(["--saes.low.d_sae", "16"]))
    assert [(sae.d_sae, sae.expansion_factor) for sae in config.named.values()] == [(16, None), (48, None)]
    with pytest.raises(UnknownNameError, match="'lo'.*Did you mean 'low'"):
        assemble(small, read_flags(["--saes.lo.sparsity_coefficient", "1"]))
    with pytest.raises(InputError, match="Given both saes.low.d_sae and saes.low.expansion_factor"):
        assemble(small, read_flags(["--saes.low.d_sae", "16", "--saes.low.expansion_factor", "3"]))


@pytest.mark.parametrize("several", [False, True])
def test_settings_of_a_preset_that_another_architecture_lacks_are_dropped(small: dict, several: bool) -> None:
    small["preset"], topk = "gated-modern", {"architecture": "topk", "k": 8}
    if several:
        small["saes"] = {"g": {}, "t": topk, "s": {"architecture": "standard"}}
    else:
        small["sae"] |= topk
    config = assemble(small)
    sae = config.named["t" if several else ""]
    assert (sae.sparsity_coefficient, sae.objective) == (None, {})
    if several:
        assert config.named["g"].objective == {"frozen_decoder": True, "weighted_by_decoder_norm": True}
        assert config.named["s"].objective == {"weighted_by_decoder_norm": True}
        assert [each.sparsity_coefficient for each in config.named.values()] == [2.0, None, 2.0]
    assert plain(assemble(yaml.safe_load(yaml.safe_dump(plain(config))))) == plain(config)
    mine = {**small["sae"], "architecture": "topk", "objective": {"frozen_decoder": True}}
    with pytest.raises(InputError, match="has no 'frozen_decoder'"):  # the run's own settings are not dropped
        assemble({**small, "saes": {}, "sae": mine})


def test_a_number_that_yaml_reads_as_text_is_a_number(small: dict) -> None:
    assert yaml.safe_load("1e-4") == "1e-4"
    small["training"] |= {"learning_rate": "1e-4", "max_steps": "1e1"}
    args = arguments(assemble(small))
    assert (args.learning_rate, args.max_steps) == (1e-4, 10)


def test_a_flag_is_read_as_the_type_of_its_setting(small: dict) -> None:
    config = assemble(merged(small, read_flags(["--model.revision", "1234567", "--data.bos", "none"])))
    assert config.model.revision == "1234567" and config.data.bos == "none"
    whole = assemble(merged(small, read_flags(["--saes", "{a: {d_sae: 16}, b: }"])))
    assert [sae.d_sae for sae in whole.named.values()] == [16, 48]


def test_several_saes_share_the_settings_of_sae(small: dict) -> None:
    small["sae"] |= {"site": "resid_post.0", "sparsity_coefficient": 2.0}
    small["saes"] = {"narrow": {"d_sae": 16}, "wide": {"site": "mlp_out.1", "sparsity_coefficient": 0.5}}
    config = assemble(small)
    assert [(name, sae.site, sae.d_sae) for name, sae in config.named.items()] == [
        ("narrow", "resid_post.0", 16),
        ("wide", "mlp_out.1", 48),
    ]
    assert arguments(config).sparsity_coefficient == {"narrow": 2.0, "wide": 0.5}


@pytest.mark.parametrize("change", [{}, {"saes": {"a": {}, "b": {"d_sae": 32}}}, {"preset": "gated-modern"}])
def test_what_is_written_is_read_back(small: dict, change: dict) -> None:
    written = plain(assemble({**small, **change}))
    again = yaml.safe_load(yaml.safe_dump(written))
    assert plain(assemble(again)) == written


NESTED = st.dictionaries(
    st.sampled_from("abc"), st.integers() | st.dictionaries(st.sampled_from("xyz"), st.integers(), min_size=1)
)


@given(NESTED, NESTED)
def test_merging_replaces_what_is_given_and_nothing_else(base: dict, over: dict) -> None:
    before, below, above = copy.deepcopy(base), dict(leaves(base)), dict(leaves(over))
    result = dict(leaves(merged(base, over)))
    assert base == before
    assert result.items() >= above.items()
    hidden = {place for place in below if any(f"{place}.".startswith(f"{other}.") for other in above)}
    hidden |= {place for place in below if any(other.startswith(f"{place}.") for other in above)}
    assert {place: value for place, value in result.items() if place not in above} == {
        place: value for place, value in below.items() if place not in hidden
    }


@pytest.mark.parametrize(
    "flags, phrase",
    [
        ("--data.contxt_length 3", "Unknown key data.contxt_length: data has no 'contxt_length'. Did you mean"),
        ("--trainng.max_steps 3", "Did you mean 'training'"),
        ("--training.learnin_rate 3", "Did you mean 'learning_rate'"),
        ("--training.learning_rate fast", "training.learning_rate is 'fast'; expected a number"),
        ("--training.max_steps 1.5", "training.max_steps is 1.5; expected a whole number"),
        ("--training.bf16 maybe", "expected true or false"),
        ("--data.bos always", "data.bos is 'always'; expected one of document, sequence, none"),
        ("--preset gatd-paper", "Did you mean 'gated-paper'"),
        ("--sae.architecture gatd", "Unknown sae.architecture 'gatd'. Did you mean 'gated'"),
        ("--sae.objective.frozen_decodr false", "Did you mean 'frozen_decoder'"),
        ("--sae.kk 3", "Unknown key sae.kk"),
        ("--sae.k 3", "sae.k is a setting of abs_topk, batch_topk"),
        ("--sae.d_in 3", "sae.d_in follows from the rest of the run"),
        ("--sae.architecture topk --sae.sparsity_coefficient 2", "means nothing to a topk SAE"),
        ("--sae.architecture topk --sae.k 100", "k is 100, expected 1 .. d_sae = 48"),
        ("--sae.expansion_factor 4", "both sae.d_sae and sae.expansion_factor"),
        ("--model.device cpu --model.device_map auto", "both model.device and model.device_map"),
        ("--data.dataset wikitext", "data.dataset and data.files"),
        ("--data.shards there", "data.files and data.shards"),
        ("--data.split test", "data.split means nothing with data.files"),
        (f"--data.dataset {__file__} --data.files null", "_file.py, a file and not a Hub id: give it as"),
        ("--training.seed 3", "training.seed is given as seed, beside training"),
        ("--training.sparsity_coefficient 3", "is given as sae.sparsity_coefficient"),
        ("--training.per_device_train_batch_size 3", "is given as training.activation_batch_size"),
        ("--training.dead_latent_remedy auxk --training.resample_steps [3]", "training.resample_steps belongs to"),
        ("--training.auxk_coefficient 0.1", "training.auxk_coefficient belongs to training.dead_latent_remedy: auxk"),
        ("--training.dead_latent_remedy resampl", "Did you mean 'resample'"),
        ("--training.push_to_hub", "push_to_hub=True would publish"),
        ("--training.max_steps 0", "max_steps is 0; expected a positive number"),
        ("--model gpt2", "model is 'gpt2'; expected a mapping"),
        ("--saes.wide 3", "saes.wide is '3'; expected a mapping"),
        ('--saes {"":{},"a":{}}', "The SAE's name '' cannot be used as the folder"),
        ('--saes {"../esc":{}}', "The SAE's name '../esc' cannot be used as the folder"),
        ('--saes {"a":{"d_sae":3,"expansion_factor":2}}', "both saes.a.d_sae and saes.a.expansion_factor"),
        ('--saes {"a":{"d_sae":3,"d_sae":4}}', "the key 'd_sae' is given twice"),
        ("--sae.site_out resid_post.1", "sae.site_out is resid_post.1, the site that it reads: remove it"),
        ("--sae.dtype float64", "sae.dtype is 'float64'; expected float32 or bfloat16"),
        ("--sae.dtype float16", "sae.dtype is 'float16'; expected float32 or bfloat16"),
        ("--sae.sparsity_coefficient -1", "sparsity_coefficient is -1; expected 0 or a positive number"),
        ("--sae.d_sae 2000000000", "The SAEs do not fit into memory"),
        ("--model.revision main", "model.revision does not apply to"),
        ("--data.text_column text", "data.text_column means nothing with data.files"),
        ("--data.context_length 0", "context_length is 0"),
        ("--data.files a.jsonl --data.documents line", "data.documents means nothing with data.files: a.jsonl"),
        ("--output_dir=", "output_dir is empty"),
        ("--data.buffer_size 63", "data.buffer_size is 63; expected at least two batches, 64"),
        ("--seed -1", "seed is -1"),
        ("--seed 4294967296", "seed is 4294967296"),
        (f"--seed 1{'0' * 400}", "expected a whole number"),
        ("--training.hub_token secret", "training.hub_token means nothing"),
        ("--training.learning_rate -1", "learning_rate is -1; expected 0 or a positive number"),
        ("--training.learning_rate .nan", "learning_rate is nan; expected"),
        ("--training.adam_beta2 2", "adam_beta2 is 2; expected a number from 0 to 1"),
        ("--training.adam_epsilon -1", "adam_epsilon is -1"),
        ("--training.weight_decay -1", "weight_decay is -1"),
        ("--training.max_grad_norm -1", "max_grad_norm is -1"),
        ("--training.gradient_accumulation_steps 0", "gradient_accumulation_steps is 0"),
        ("--training.recorded_activations -1", "recorded_activations is -1"),
        ("--training.sparsity_warmup_steps -5", "sparsity_warmup_steps is -5"),
        ("--training.lr_dip -1", "lr_dip is -1"),
        ("--training.lr_dip_steps -1", "lr_dip_steps is -1"),
        ("--training.resample_steps [-5]", "resample_steps is [-5]"),
        ("--training.resample_inputs 0", "resample_inputs is 0"),
        ("--training.save_total_limit -1", "save_total_limit is -1"),
        ("--training.save_steps 0", "save_steps is 0"),
        ("--training.save_strategy best", "needs an evaluation data set"),
        ("--training.eval_strategy steps", "needs an evaluation data set"),
        ("--training.warmup_steps 150%", "training.warmup_steps is 150% of the 4 steps of training"),
        ("--training.dataloader_num_workers 2", "dataloader_num_workers=2 must be 0"),
        ("--training.fp16", "fp16=True is not supported on a CPU"),
        ("--training.log_level loud", "Unknown log_level 'loud'"),
        ("--training.save_strategy epoch", "save_strategy='epoch' counts epochs"),
        ("--training.lr_scheduler_kwargs {a: 1}", "'constant_with_warmup' takes none"),
        ("--sae.architecture cross_layer", "sae.architecture is 'cross_layer', which reads several sites"),
        (
            "--sae.architecture temporal",
            "sae.architecture is 'temporal', which reads several sites, or several tokens",
        ),
        ("--training.report_to foo", "foo is not supported"),
        (
            "--training.lr_scheduler_type warmup_stable_decay",
            "'warmup_stable_decay' with lr_scheduler_kwargs {} cannot",
        ),
    ],
)
def test_wrong_settings_are_named(small: dict, flags: str, phrase: str) -> None:
    with pytest.raises(SAEError) as refused:
        run = assemble(merged(small, read_flags(flags.split(maxsplit=1) if "{" in flags else flags.split())))
        build(run)
    assert phrase in str(refused.value), str(refused.value)
    assert not Path(small["output_dir"]).exists()


@pytest.mark.parametrize(
    "missing, phrase",
    [
        ("model", "model.name is missing"),
        ("data", "data is missing"),
        ("output_dir", "output_dir is missing"),
        ("sae", "sae.site is missing"),
    ],
)
def test_missing_sections_are_named(small: dict, missing: str, phrase: str) -> None:
    del small[missing]
    with pytest.raises(InputError, match=phrase):
        assemble(small)


def test_a_flag_with_a_whole_section_is_merged_over_that_of_the_file(small: dict, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small))
    config = read_run(tmp_path / "run.yaml", read_flags(["--training", "{max_steps: 3}"]))
    assert config.training["max_steps"] == 3 and config.training["activation_batch_size"] == 32


def test_the_size_in_an_saes_own_section_replaces_the_common_one(small: dict) -> None:
    small["saes"] = {"wide": {"expansion_factor": 2}}
    [wide] = build(assemble(small)).saes.values()
    assert wide.config.d_sae == 2 * 128


@pytest.mark.parametrize("given", [["topk"], {"a": "topk"}])
def test_an_architecture_that_is_not_a_name_is_refused(small: dict, given: Any) -> None:
    small["sae"]["architecture"] = given
    with pytest.raises(InputError, match=r"sae.architecture is .*topk.*; expected text"):
        assemble({**small, "preset": "gated-modern"})


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nsae: {d_sae: 3}\nsae: {site: resid_post.1}\n")
    with pytest.raises(InputError, match="key 'sae' is given twice.*line 3"):
        read_run(tmp_path / "run.yaml")


def test_a_tilde_is_the_home_folder(small: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    small |= {"output_dir": "~/out", "model": {"name": "~/lm"}, "data": {"files": "~/a.txt"}}
    config = assemble(small)
    assert (config.output_dir, config.model.name, config.data.files) == tuple(
        str(tmp_path / name) for name in ("out", "lm", "a.txt")
    )
    small["model"]["name"] = "./lm"
    assert assemble(small).model.name == "./lm", "not a Hub id"


def test_rows_of_a_table_are_written_and_read_back(small: dict) -> None:
    small["data"]["files"] = "a.jsonl"
    written = plain(assemble(small))
    assert "documents" not in written["data"] and plain(assemble(written)) == written


def test_files_that_are_not_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no file"):
        read_run(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not valid YAML"):
        read_run(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(InputError, match="expected a mapping"):
        read_run(tmp_path / "list.yaml")


@pytest.mark.parametrize("words", [["learning_rate"], ["--seed", "1", "--seed", "2"], ["--a", "1", "--a.b", "2"]])
def test_words_that_are_not_flags_are_refused(words: list[str]) -> None:
    with pytest.raises(InputError):
        read_flags(words)


@pytest.mark.parametrize("architecture", architectures)
def test_a_setting_of_every_architecture_is_known_and_typed(small: dict, architecture: str) -> None:
    small["sae"] |= {"architecture": architecture, "apply_b_dec_to_input": "true"}
    if architectures[architecture].one_site and architectures[architecture].per_token:
        [sae] = build(assemble(merged(small, read_flags(["--sae.apply_b_dec_to_input", "false"])))).saes.values()
        assert sae.config.apply_b_dec_to_input is False
        assert sae.config.architecture == architecture


def test_the_strategy_no_is_not_read_as_false(small: dict, tmp_path: Path) -> None:
    """YAML reads a bare `no` as false."""
    (tmp_path / "run.yaml").write_text("training: {save_strategy: no}")
    config = read_run(tmp_path / "run.yaml", merged(small, read_flags(["--training.logging_strategy", "no"])))
    args = arguments(config)
    assert args.save_strategy == "no" and args.logging_strategy == "no"
