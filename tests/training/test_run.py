"""A run as a YAML file: what it says, what it refuses, its parts, and its cost."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from hf_gated_sae.architectures import architectures
from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.errors import (
    CheckpointError,
    InputError,
    MissingFileError,
    SAEError,
    SiteError,
    TrainingError,
    UnknownNameError,
)
from hf_gated_sae.hooks.saving import save_activations
from hf_gated_sae.training.memory import TrainingMemory, in_bytes
from hf_gated_sae.training.run import Run, assemble, estimate, measured, plain, read_flags, read_run
from hf_gated_sae.training.run.assembly import arguments
from hf_gated_sae.training.run.estimate import in_time
from hf_gated_sae.training.run.parts import build
from hf_gated_sae.training.run.reading import leaves, merged
from tests.support.mini_hub import MiniHub
from tests.support.tiny_models import tiny_model

SMALL = {
    **{"max_steps": 4, "activation_batch_size": 32, "statistics_activations": 100, "recorded_activations": 100},
    **{"use_cpu": True, "disable_tqdm": True, "warmup_steps": 0, "logging_steps": 2},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("\n".join(corpus.texts("training", 40_000)), encoding="utf-8")
    return path


@pytest.fixture
def small(text: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that takes a second."""
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"name": str(bundled.MODEL), "hub_id": "me/python-lm"},
        "data": {"files": str(text), "context_length": 32, "sequences_per_batch": 4, "buffer_size": 128},
        "sae": {"site": "resid_post.1", "d_sae": 48},
        "training": dict(SMALL),
    }


# ---------------------------------------------------------------------- what is read


def test_flags_come_before_the_file_and_the_file_before_its_preset(small: dict, tmp_path: Path) -> None:
    small["preset"] = "gated-paper"
    small["training"] |= {"learning_rate": 2e-4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small))
    flags = read_flags(["--training.max_steps", "7", "--sae.d_sae=96", "--seed", "3", "--training.bf16"])
    config = read_run(tmp_path / "run.yaml", flags)
    args = arguments(config)
    assert (args.max_steps, config.sae.d_sae, config.seed, args.seed, args.bf16) == (7, 96, 3, 3, True)
    assert args.learning_rate == 2e-4
    assert args.activation_scale == "none", "the preset's, where nothing else is said"


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


def test_a_flag_of_one_sae_lies_over_its_own_section(small: dict) -> None:
    small["saes"] = {"low": {"expansion_factor": 2}, "high": {"sparsity_coefficient": 8}}
    config = assemble(small, read_flags(["--saes.low.d_sae", "16"]))
    assert [(sae.d_sae, sae.expansion_factor) for sae in config.named.values()] == [(16, None), (48, None)]
    with pytest.raises(UnknownNameError, match="'lo'.*Did you mean 'low'"):
        assemble(small, read_flags(["--saes.lo.sparsity_coefficient", "1"]))
    with pytest.raises(InputError, match="Given both saes.low.d_sae and saes.low.expansion_factor"):
        assemble(small, read_flags(["--saes.low.d_sae", "16", "--saes.low.expansion_factor", "3"]))


@pytest.mark.parametrize("several", [False, True])
def test_a_preset_says_nothing_to_another_architecture_that_it_cannot_know(small: dict, several: bool) -> None:
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
    with pytest.raises(InputError, match="has no 'frozen_decoder'"):  # what is said in the run itself has to fit
        assemble({**small, "saes": {}, "sae": mine})


def test_a_number_that_yaml_takes_for_text_is_a_number(small: dict) -> None:
    assert yaml.safe_load("1e-4") == "1e-4"
    small["training"] |= {"learning_rate": "1e-4", "max_steps": "1e1"}
    args = arguments(assemble(small))
    assert (args.learning_rate, args.max_steps) == (1e-4, 10)


def test_the_text_of_a_flag_is_read_as_its_setting_wants_it(small: dict) -> None:
    config = assemble(merged(small, read_flags(["--model.revision", "1234567", "--data.bos", "none"])))
    assert config.model.revision == "1234567" and config.data.bos == "none"
    whole = assemble(merged(small, read_flags(["--saes", "{a: {d_sae: 16}, b: }"])))
    assert [sae.d_sae for sae in whole.named.values()] == [16, 48]


def test_several_saes_share_what_sae_says(small: dict) -> None:
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


# ---------------------------------------------------------------------- what is refused


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
        (f"--data.dataset {__file__} --data.files null", "test_run.py, a file here, and no id of the Hub: give it as"),
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
        ('--saes {"":{},"a":{}}', "The SAE's name '' cannot be the folder"),
        ('--saes {"../esc":{}}', "The SAE's name '../esc' cannot be the folder"),
        ('--saes {"a":{"d_sae":3,"expansion_factor":2}}', "both saes.a.d_sae and saes.a.expansion_factor"),
        ('--saes {"a":{"d_sae":3,"d_sae":4}}', "the key 'd_sae' is given twice"),
        ("--sae.site_out resid_post.1", "sae.site_out is resid_post.1, where it reads"),
        ("--sae.dtype float64", "sae.dtype is 'float64'; expected float32 or bfloat16"),
        ("--sae.dtype float16", "sae.dtype is 'float16'; expected float32 or bfloat16"),
        ("--sae.sparsity_coefficient -1", "sparsity_coefficient is -1; expected 0 or a positive number"),
        ("--sae.d_sae 2000000000", "The SAEs do not fit into memory"),
        ("--model.revision main", "model.revision means nothing with"),
        ("--data.text_column text", "data.text_column means nothing with data.files"),
        ("--data.context_length 0", "context_length is 0"),
        ("--data.files a.jsonl --data.documents line", "data.documents means nothing with data.files: a.jsonl"),
        ("--output_dir=", "output_dir is empty"),
        ("--data.buffer_size 63", "data.buffer_size is 63; expected at least two batches, 64"),
        ("--seed -1", "seed is -1"),
        ("--seed 4294967296", "seed is 4294967296"),
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
        ("--training.save_strategy best", "need a data set to evaluate"),
        ("--training.eval_strategy steps", "need a data set to evaluate"),
        ("--training.warmup_steps 150%", "training.warmup_steps is 150% of the 4 steps of training"),
        ("--training.dataloader_num_workers 2", "dataloader_num_workers is 2; expected 0"),
        ("--training.fp16", "fp16=True means nothing on a CPU"),
        ("--training.report_to foo", "foo is not supported"),
        (
            "--training.lr_scheduler_type warmup_stable_decay",
            "'warmup_stable_decay' with lr_scheduler_kwargs {} cannot",
        ),
    ],
)
def test_wrong_settings_are_named(small: dict, flags: str, phrase: str) -> None:
    with pytest.raises(SAEError) as refused:
        run = assemble(merged(small, read_flags(flags.split())))
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


def test_a_flag_that_is_a_whole_section_lies_over_that_of_the_file(small: dict, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small))
    config = read_run(tmp_path / "run.yaml", read_flags(["--training", "{max_steps: 3}"]))
    assert config.training["max_steps"] == 3 and config.training["activation_batch_size"] == 32


def test_a_section_s_own_size_replaces_the_common_one(small: dict) -> None:
    small["saes"] = {"wide": {"expansion_factor": 2}}
    [wide] = build(assemble(small)).saes.values()
    assert wide.config.d_sae == 2 * 128


@pytest.mark.parametrize("given", [["topk"], {"a": "topk"}])
def test_an_architecture_that_is_no_name(small: dict, given: Any) -> None:
    small["sae"]["architecture"] = given
    with pytest.raises(InputError, match=r"sae.architecture is .*topk.*; expected text"):
        assemble({**small, "preset": "gated-modern"})


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nsae: {d_sae: 3}\nsae: {site: resid_post.1}\n")
    with pytest.raises(InputError, match="key 'sae' is given twice.*line 3"):
        read_run(tmp_path / "run.yaml")


def test_home_is_one_folder(small: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    small |= {"output_dir": "~/out", "model": {"name": "~/lm"}, "data": {"files": "~/a.txt"}}
    config = assemble(small)
    assert (config.output_dir, config.model.name, config.data.files) == tuple(
        str(tmp_path / name) for name in ("out", "lm", "a.txt")
    )
    small["model"]["name"] = "./lm"
    assert assemble(small).model.name == "./lm", "which is no id of the Hub"


def test_rows_of_a_table_are_written_and_read_back(small: dict) -> None:
    small["data"]["files"] = "a.jsonl"
    written = plain(assemble(small))
    assert "documents" not in written["data"] and plain(assemble(written)) == written


def test_files_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no file"):
        read_run(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is no YAML"):
        read_run(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(InputError, match="expected a mapping"):
        read_run(tmp_path / "list.yaml")


@pytest.mark.parametrize("words", [["learning_rate"], ["--seed", "1", "--seed", "2"], ["--a", "1", "--a.b", "2"]])
def test_words_that_are_no_flags(words: list[str]) -> None:
    with pytest.raises(InputError):
        read_flags(words)


@pytest.mark.parametrize("architecture", architectures)
def test_a_setting_of_every_architecture_is_known_and_typed(small: dict, architecture: str) -> None:
    small["sae"] |= {"architecture": architecture, "apply_b_dec_to_input": "true"}
    if architectures[architecture].one_site and architectures[architecture].per_token:
        [sae] = build(assemble(merged(small, read_flags(["--sae.apply_b_dec_to_input", "false"])))).saes.values()
        assert sae.config.apply_b_dec_to_input is False
        assert sae.config.architecture == architecture


# ---------------------------------------------------------------------- its parts


def test_the_parts_are_what_the_run_says(small: dict) -> None:
    small["sae"] |= {"expansion_factor": 2, "d_sae": None, "dtype": "bfloat16"}
    parts = build(assemble(small))
    [sae] = parts.saes.values()
    assert (sae.config.d_in, sae.config.d_sae, sae.dtype) == (128, 256, torch.bfloat16)
    assert (sae.config.base_model, sae.config.site) == ("me/python-lm", "resid_post.1")
    assert not any(each.requires_grad for each in parts.model.parameters())
    batch = next(iter(parts.stream.batches(16)))
    assert batch["resid_post.1"].shape == (16, 128)


def test_the_seed_decides_the_first_weights(small: dict) -> None:
    first, same = (next(iter(build(assemble(small)).saes.values())).W_dec for _ in range(2))
    other = next(iter(build(assemble({**small, "seed": 1})).saes.values())).W_dec
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_folder_s_path_is_not_recorded(small: dict) -> None:
    del small["model"]["hub_id"]
    [sae] = build(assemble(small)).saes.values()
    assert sae.config.base_model is None


def test_a_transcoder_is_as_wide_as_its_two_sites(small: dict) -> None:
    small["sae"] |= {"site": "mlp_in.1", "site_out": "mlp_out.1"}
    parts = build(assemble(small))
    [sae] = parts.saes.values()
    assert sae.config.is_transcoder and sae.config.apply_b_dec_to_input is False
    assert parts.stream.sites == ("mlp_in.1", "mlp_out.1")
    small["sae"] |= {"skip_connection": True}
    run = Run.prepare(assemble(small))
    run.train()
    assert run.saes[""].W_skip.any()


def test_a_site_that_the_model_lacks(small: dict) -> None:
    small["sae"]["site"] = "resid_post.17"
    with pytest.raises(SiteError, match="resid_post.17"):
        build(assemble(small))


def test_a_model_that_is_not_there(small: dict) -> None:
    small["model"]["name"] = "./nowhere"
    with pytest.raises(MissingFileError, match="no such folder"):
        build(assemble(small))
    small["model"]["name"] = "alice/nowhere"
    with pytest.raises(InputError, match="model.name 'alice/nowhere' cannot be opened on the Hub"):
        build(assemble(small))


def test_text_that_is_not_there(small: dict, tmp_path: Path) -> None:
    small["data"]["files"] = [str(tmp_path / "*.md")]
    (tmp_path / "lm").mkdir()
    small["model"]["name"] = str(tmp_path / "lm")  # of which nothing can be loaded
    with pytest.raises(MissingFileError, match="data.files: there is no"):
        build(assemble(small))


def test_patterns_stand_for_files(small: dict, tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("import os\n" * 200)
    small["data"]["files"] = [str(tmp_path / "*.md")]
    assert len(build(assemble(small)).stream.tokens.text.files) == 2


def test_a_pattern_alone_is_told_to_stand_in_a_list(small: dict, tmp_path: Path) -> None:
    small["data"]["files"] = str(tmp_path / "*.txt")
    with pytest.raises(MissingFileError, match=r"expected a pattern in a list, \[.*\*.txt\]"):
        build(assemble(small))


def test_a_list_of_tables_is_read_by_rows(small: dict, tmp_path: Path) -> None:
    for number in range(3):
        lines = [json.dumps({"story": each, "id": 7}) for each in corpus.texts("training", 4000 * (number + 1))]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    for files in ([str(tmp_path / "0.jsonl"), str(tmp_path / "2.jsonl")], [str(tmp_path / "*.jsonl")]):
        run = {**small, "data": {**small["data"], "files": files, "text_column": "story"}}
        read = list(build(assemble(run)).stream.tokens.text.documents())
        assert len(read) > 2 and not any('"id"' in each for each in read)
    with pytest.raises(InputError, match="data.documents means nothing with data.files"):
        assemble({**small, "data": {**small["data"], "files": files, "documents": "line"}})
    with pytest.raises(InputError, match=r"train.txt is not of the kind of .*0.jsonl, whose rows are documents"):
        build(
            assemble(
                {**small, "data": {**small["data"], "files": [str(tmp_path / "0.jsonl"), small["data"]["files"]]}}
            )
        )


def test_activations_on_disk_need_no_model(small: dict, tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_activations(tmp_path / "shards", model, ["resid_post.0"], [torch.randint(5, 90, (8, 32)) for _ in range(4)])
    del small["model"]
    small["data"] = {"shards": str(tmp_path / "shards")}
    small["sae"]["site"] = "resid_post.0"
    run = Run.prepare(assemble(small))
    run.train()
    assert run.saes[""].config.recorded_tokens > 0


# ---------------------------------------------------------------------- carrying it out


def test_a_run_can_be_repeated_from_what_it_writes(small: dict, tmp_path: Path) -> None:
    first = Run.prepare(assemble(small))
    first.train()
    written = read_run(Path(small["output_dir"]) / "run.yaml", {"output_dir": str(tmp_path / "again")})
    second = Run.prepare(written)
    second.train()
    for name, value in first.saes[""].state_dict().items():
        assert torch.equal(value, second.saes[""].state_dict()[name]), name


def test_an_earlier_run_is_not_overwritten(small: dict) -> None:
    Run.prepare(assemble(small)).train()
    with pytest.raises(InputError, match="holds a run already"):
        Run.prepare(assemble(small))


@pytest.mark.parametrize(
    "theirs",
    [
        *("checkpoint-1/weights.bin", "config.json", "model.safetensors", "a/config.json"),
        *("README.md", "training_args.json"),
    ],
)
def test_what_is_of_something_else_is_not_touched(small: dict, theirs: str) -> None:
    file = Path(small["output_dir"], theirs)
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    small["saes"] = {"a": {}}
    small["model"]["name"] = "./nowhere"  # it is refused before the model is looked for
    with pytest.raises(InputError, match="no run.yaml: it is of something else"):
        Run.prepare(assemble(small))
    assert file.read_text() == "mine"


def test_a_run_without_a_whole_checkpoint_is_not_begun_again(small: dict) -> None:
    Run.prepare(assemble(small)).train()
    folder = Path(small["output_dir"])
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "manifest.json").write_text("{}")
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match="None of the checkpoints in .* is whole"):
        Run.prepare(assemble(small), resume=True)
    assert sorted(folder.rglob("*")) == before


def test_two_runs_do_not_share_a_folder(small: dict) -> None:
    folder = Path(small["output_dir"])
    first, second = (Run.prepare(assemble(small)) for _ in range(2))

    class Meanwhile(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            with pytest.raises(InputError, match="Another process is carrying out a run"):
                second.train()

    first.train([Meanwhile()])
    with pytest.raises(InputError, match="holds a run already"):
        second.train()
    assert not (folder / ".running").exists()


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/zzz"])
def test_a_folder_that_cannot_be_written_is_refused_first(small: dict, place: str) -> None:
    small["model"]["name"] = "./nowhere"
    with pytest.raises(InputError, match="nothing can be written to"):
        Run.prepare(assemble({**small, "output_dir": place}))


def test_a_start_that_fails_leaves_no_folder(small: dict, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("import os")
    small["data"]["files"] = str(tmp_path / "short.txt")
    with pytest.raises(InputError):
        Run.prepare(assemble(small)).train()
    assert not Path(small["output_dir"]).exists()


def test_a_buffer_that_does_not_fit_is_named(small: dict) -> None:
    small["data"]["buffer_size"] = 10**15
    with pytest.raises(TrainingError, match="data.buffer_size=10{15}: 512 PB.* Make data.buffer_size smaller"):
        Run.prepare(assemble(small))


def test_where_the_saes_would_fit_the_rest_is_named() -> None:
    memory = TrainingMemory(weights=10, gradients=10, moments=20, per_activation=1)
    roomy, tight = memory.advice(64, 1000), memory.advice(64, 70)
    assert "buffer_size" in roomy and "activation_batch_size=32" in roomy
    assert "buffer_size" not in tight and "activation_batch_size=16" in tight
    assert "40 B" in roomy, "and not 0 GiB"


def test_other_text_is_cut_as_the_run_s_own(small: dict, tmp_path: Path) -> None:
    run = Run.prepare(assemble(small))
    (tmp_path / "other.txt").write_text("import os\n" * 400)
    assert next(iter(run.held_out(str(tmp_path / "other.txt"))))["input_ids"].shape == (4, 32)
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(InputError, match="empty|no text"):
        run.held_out(str(tmp_path / "other.txt"))


def test_only_a_run_is_resumed(small: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run in .* to resume"):
        Run.prepare(assemble(small), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="which is a file"):
        Run.prepare(assemble({**small, "output_dir": str(tmp_path / "file")}))


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(small: dict, tmp_path: Path) -> None:
    whole = Run.prepare(assemble(small))
    whole.train()
    broken = {**small, "output_dir": str(tmp_path / "broken"), "training": {**SMALL, "save_steps": 2}}
    Run.prepare(assemble(broken)).train()
    [*_, last] = sorted((tmp_path / "broken").glob("checkpoint-*"))
    assert last.name == "checkpoint-4"
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    last.rmdir()
    resumed = Run.prepare(assemble(broken), resume=True)
    assert resumed.checkpoint.name == "checkpoint-2"
    resumed.train()
    for name, value in whole.saes[""].state_dict().items():
        assert torch.equal(value, resumed.saes[""].state_dict()[name]), name


def test_a_run_is_resumed_as_it_was_begun(small: dict) -> None:
    Run.prepare(assemble(small)).train()
    with pytest.raises(InputError, match="sae.d_sae: 48, and it is to go on with 64"):
        Run.prepare(assemble(merged(small, {"sae": {"d_sae": 64}})), resume=True)
    Run.prepare(assemble(merged(small, {"training": {"logging_steps": 1}})), resume=True)


# ---------------------------------------------------------------------- its cost


def test_the_cost_is_measured_on_real_steps(small: dict) -> None:
    found = measured(assemble(small))
    assert found.measured and not Path(small["output_dir"]).exists()
    assert found.parameters == {"": 2 * 48 * 128 + 128 + 3 * 48}
    assert found.buffer == 128 * 128 * 4
    assert found.training.seconds > 0 and found.reading.seconds > 0
    assert found.training.operations == 6 * 32 * 2 * 48 * 128
    layers = sum(each.numel() for each in _model().parameters()) - 1024 * 128
    assert found.reading.operations == pytest.approx(2 * layers * 32 * found.tokens / 32 * 2 / 4), "2 of 4 layers"
    assert found.tokens == pytest.approx(32 * 32 / 31, rel=0.1), "of 32 tokens, the BOS is not learned"
    assert found.steps == 4 and found.batch == 32
    assert 0 < found.activations < 10**7


def test_the_cost_of_an_annealed_run_is_measured(small: dict) -> None:
    small["training"] |= {"max_steps": 20, "sparsity_power_end": 0.5, "sparsity_power_steps": [10, 18]}
    found = measured(assemble(small))
    assert found.steps == 20 and found.training.seconds > 0


def test_the_size_of_a_checkpoint_is_told(small: dict) -> None:
    whole = estimate(assemble(small))
    small["data"]["save_buffer"] = False
    lean = estimate(assemble(small))
    assert whole.checkpoint - lean.checkpoint == whole.buffer == 128 * 128 * 4
    assert lean.checkpoint == 3 * 4 * lean.parameters[""]


def test_the_cost_is_estimated_without_the_weights(small: dict, tmp_path: Path) -> None:
    lean = tmp_path / "lean"
    lean.mkdir()
    (lean / "config.json").write_bytes((bundled.MODEL / "config.json").read_bytes())
    small["model"]["name"] = str(lean)
    small["data"]["files"] = "nowhere.txt"
    found, real = estimate(assemble(small)), sum(each.numel() for each in _model().parameters())
    assert not found.measured
    assert found.parameters == {"": 2 * 48 * 128 + 128 + 3 * 48}
    assert found.model == 4 * real
    small["sae"]["site"] = "mlp_neurons.1"
    with pytest.raises(InputError, match="only the model can tell"):
        estimate(assemble(small))


def _model() -> Any:
    from hf_gated_sae.demo.language_model import load_language_model

    return load_language_model(bundled.MODEL)[0]


def test_numbers_for_people() -> None:
    assert [in_bytes(size) for size in (12, 1_500, 999_600, 12_345_678_900)] == ["12 B", "1.5 kB", "1 MB", "12.3 GB"]
    assert [in_time(time) for time in (0.5, 90, 7200, 259_200)] == ["500.0 ms", "1.5 min", "2.0 h", "3.0 d"]


# ---------------------------------------------------------------------- what it was resolved to


@pytest.fixture
def on_the_hub(hub: MiniHub, repo_id: str, small: dict) -> dict[str, Any]:
    """The small run with model and data set on the Hub."""
    documents = "\n".join(json.dumps({"text": text}) for text in corpus.texts("training", 20_000))
    hub.seed(repo_id, {"data/train.jsonl": documents}, type="datasets")
    hub.seed(f"{repo_id}-lm", {path.name: path.read_bytes() for path in bundled.MODEL.iterdir()})
    small["model"] = {"name": f"{repo_id}-lm"}
    small["data"] = {"dataset": repo_id, "context_length": 32, "sequences_per_batch": 4, "buffer_size": 128}
    return small


def test_commits_are_recorded_and_read_again(hub: MiniHub, repo_id: str, on_the_hub: dict, tmp_path: Path) -> None:
    first = Run.prepare(assemble(on_the_hub))
    first.train()
    written = yaml.safe_load((Path(on_the_hub["output_dir"]) / "run.yaml").read_text())
    model, data = (hub.repo(name, type=kind).at("main").id for name, kind in _places(repo_id))
    assert (written["model"]["revision"], written["data"]["revision"]) == (model, data)
    config = first.saes[""].config
    assert (config.base_model, config.base_model_revision) == (f"{repo_id}-lm", model)
    hub.seed(repo_id, {"data/train.jsonl": json.dumps({"text": "changed since"})}, type="datasets")
    second = Run.prepare(assemble({**written, "output_dir": str(tmp_path / "again")}))
    second.train()
    assert torch.equal(first.saes[""].W_dec, second.saes[""].W_dec)


def test_a_resumed_run_stays_at_its_commits(hub: MiniHub, repo_id: str, on_the_hub: dict) -> None:
    Run.prepare(assemble(on_the_hub)).train()
    before = hub.repo(repo_id, type="datasets").at("main").id
    hub.seed(repo_id, {"data/train.jsonl": json.dumps({"text": "changed since"})}, type="datasets")
    assert Run.prepare(assemble(on_the_hub), resume=True).config.data.revision == before


@pytest.mark.parametrize("section, name", [("model", "name"), ("data", "dataset")])
def test_what_is_not_on_the_hub_is_named(on_the_hub: dict, section: str, name: str) -> None:
    on_the_hub[section][name] = "alice/nowhere"
    with pytest.raises(InputError, match=f"{section}.{name} 'alice/nowhere' cannot be opened on the Hub"):
        build(assemble(on_the_hub))
    on_the_hub[section][name] = "no such name!"
    with pytest.raises(InputError, match=f"{section}.{name} 'no such name!'"):
        build(assemble(on_the_hub))


def _places(repo_id: str) -> list[tuple[str, str]]:
    return [(f"{repo_id}-lm", "models"), (repo_id, "datasets")]
