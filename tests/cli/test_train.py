"""`hf-gated-sae train`."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from transformers.utils import logging

from hf_gated_sae import SAEModel, SAESet
from hf_gated_sae.cli import main
from hf_gated_sae.cli.training.live_progress import SHORT, LiveProgress, table
from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.publishing import read_facts
from hf_gated_sae.training.presets import presets

pytestmark = pytest.mark.slow

RUN = {
    "output_dir": "out",
    "model": {"name": str(bundled.MODEL), "hub_id": "none"},
    "data": {"files": "train.txt", "context_length": 32, "sequences_per_batch": 4, "buffer_size": 128},
    "preset": "gated-paper",
    "sae": {"site": "resid_post.1", "d_sae": 48},
    "training": {
        **{"max_steps": 4, "activation_batch_size": 32, "statistics_activations": 100, "recorded_activations": 100},
        **{"use_cpu": True, "logging_steps": 2, "save_steps": 2},
    },
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a run and its text; the terminal has 80 columns."""
    (tmp_path / "train.txt").write_text("\n".join(corpus.texts("training", 20_000)), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command as a shell would and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["hf-gated-sae", "train", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_run_leaves_an_sae_with_its_facts(here: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--config", "run.yaml", "--sae.d_sae", "64", "--sae.objective.learn_r_mag=false") == 0
    said = "".join(capsys.readouterr())
    assert "GatedSAE at resid_post.1, 128 wide, 64 latents" in said and "SAE in out" in said
    assert "step 2: loss " in said and "gamma" in said and "dead" in said
    sae = SAEModel.from_pretrained("out")
    assert sae.config.d_sae == 64 and sae.config.recorded_tokens > 0
    facts = read_facts("out")
    assert facts.training["steps"] == 4 and facts.training["preset"] == "gated-paper"
    assert facts.training["objective: learn_r_mag"] is False and not sae.r_mag.any()
    assert facts.provenance["data"] == "train.txt"
    assert json.loads((here / "out" / "training_args.json").read_text())["max_steps"] == 4
    assert "gated-paper" in (here / "out" / "README.md").read_text()
    assert not [path for path in (here / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(here: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--config", "run.yaml") == 0
    assert run(monkeypatch, "--config", "run.yaml", "--output_dir", "other") == 0
    for file in (here / "other" / "checkpoint-4").iterdir():
        file.unlink()
    assert run(monkeypatch, "--config", "other/run.yaml", "--resume") == 0
    assert "from checkpoint-2" in capsys.readouterr().err
    first, second = (SAEModel.from_pretrained(name).state_dict() for name in ("out", "other"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_saes_of_one_stream(here: Path, monkeypatch, capsys) -> None:
    saes = "{a: {d_sae: 16}, b: {site: mlp_out.2, d_sae: 32, sparsity_coefficient: 0.5}}"
    assert run(monkeypatch, "--config", "run.yaml", "--saes", saes) == 0
    said = "".join(capsys.readouterr())
    assert "step 4 a: loss " in said and "step 4 all: loss " in said
    found = SAESet.from_pretrained("out")
    assert {name: found[name].config.site for name in ("a", "b")} == {"a": "resid_post.1", "b": "mlp_out.2"}
    assert read_facts("out/b").training["sparsity_coefficient"] == 0.5


def test_a_dry_run_says_what_it_costs_and_writes_nothing(here: Path, monkeypatch, capsys) -> None:
    before = sorted(here.rglob("*"))
    for words in ((), ("--no-measure",)):
        assert run(monkeypatch, "--config", "run.yaml", "--dry-run", *words) == 0
        said = capsys.readouterr().out
        for phrase in ("parameters", "12,560", "Adam's moments", "base model", "FLOP", "a step", "tokens", "128"):
            assert phrase in said, phrase
        assert ("estimated" if words else "measured") in said
        assert max(map(len, said.splitlines())) <= 80
    assert sorted(here.rglob("*")) == before


def test_help_lists_every_setting(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    for flag in ("--config", "--resume", "--dry-run", "--model.name", "--sae.d_sae", "--data.context_length"):
        assert flag in said, flag
    for flag in ("--training.learning_rate", "--training.resample_steps", "--training.auxk_latents", "--seed"):
        assert flag in said, flag
    assert max(map(len, said.splitlines())) <= 80


def test_help_wraps_text_at_the_terminal_and_breaks_no_flag(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert "--training.gradient_accumulation_steps " in said
    assert "--training.learning_rate     \n 1e-4. Flags override the file" in said, "lines end where the terminal does"


def test_an_interrupted_run_says_how_to_resume(here: Path, monkeypatch, capsys) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        if (here / "out" / "checkpoint-2").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(LiveProgress, "on_step_end", interrupt)
    assert run(monkeypatch, "--config", "run.yaml", "--training.save_steps", "1") == 130
    said = capsys.readouterr()
    assert "Resume from the latest checkpoint with --resume." in said.err and "Traceback" not in said.err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run(monkeypatch, "--config", "out/run.yaml", "--resume") == 0


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_run_that_is_interrupted_before_training_says_so(monkeypatch, capsys, words: tuple[str, ...]) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_gated_sae.training.run.run_parts.load_model", interrupt)
    assert run(monkeypatch, "--config", "run.yaml", *words) == 130
    said = capsys.readouterr().err
    assert "Interrupted." in said and "Traceback" not in said and ("no checkpoint yet" in said) == (not words)

    def disguised(*args: object, **kwargs: object) -> None:
        try:
            interrupt()
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import") from error

    for each in (interrupt, disguised):
        monkeypatch.setattr(importlib, "import_module", each)
        assert run(monkeypatch, "--config", "run.yaml") == 130
        assert capsys.readouterr().err == "Interrupted.\n"


def test_a_tracker_that_is_not_installed_is_named_at_once(monkeypatch, capsys) -> None:
    known = "hf_gated_sae.training.supported.get_available_reporting_integrations"
    monkeypatch.setattr(known, lambda: ["trackio"])
    assert run(monkeypatch, "--config", "run.yaml", "--training.report_to", "tensorboard", "--model.name", "none") == 1
    said = capsys.readouterr().err
    assert "report_to is 'tensorboard', which is not installed here: pip install tensorboard." in said


def test_no_progress_bar_of_transformers_is_shown(monkeypatch, capsys) -> None:
    monkeypatch.setattr(logging, "_tqdm_active", True)
    assert run(monkeypatch, "--config", "run.yaml") == 0
    assert logging.is_progress_bar_enabled()
    said = capsys.readouterr()
    assert "Loading weights" not in said.out + said.err


def test_the_numbers_of_several_saes_fit_a_terminal(capsys) -> None:
    row = dict.fromkeys(("loss", "reconstruction", "sparsity", "auxiliary", "L0", "FVU", "gamma", "dead"), "0.123")
    Console(width=80).print(table({"resid_post.12/l1_2": row, "resid_post.13/l1_2": row}))
    said = capsys.readouterr().out
    assert all(SHORT.get(title, title) in said for title in row) and "resid_post.12/l1_2" in said


def test_presets_are_described(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--presets") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in presets)
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(
    "words, phrase",
    [
        ((), "Nothing to train"),
        (("--config", "none.yaml"), "There is no file none.yaml"),
        (("--config", "run.yaml", "--no-measure"), "pass both"),
        (("--config", "run.yaml", "--data.contxt_length", "3"), "Did you mean 'context_length'"),
        (("--config", "run.yaml", "--sae.site", "resid_post.9"), "resid_post.9"),
        (("--config", "run.yaml", "--sae.k", "3"), "sae.k is a setting of"),
        (("--config", "run.yaml", "--data.files", "nowhere.txt"), "nowhere.txt"),
        (("--config", "run.yaml", "--data.files", "empty.txt"), "empty"),
        (("--config", "run.yaml", "--data.buffer_size", "33"), "buffer_size is 33"),
        (("--config", "run.yaml", "--resume"), "There is no run in out to resume"),
        (("--config", "run.yaml", "word"), "Given 'word'; expected a flag"),
        (("--config", "run.yaml", "--dryrun"), "Unknown option --dryrun. Did you mean '--dry-run'?"),
        (("--config", "run.yaml", "--resum"), "Did you mean '--resume'"),
        (("--config", "run.yaml", "--sae.d_sae", "2000000000"), "The SAEs do not fit into memory"),
        (("--config", "run.yaml", "--sae.d_sae", "2000000000", "--dry-run"), "The SAEs do not fit into memory"),
        (("--config", "run.yaml", "--output_dir", "/dev/null/x"), "/dev/null cannot be written to"),
    ],
)
def test_wrong_inputs_are_one_line(here: Path, monkeypatch, capsys, words: tuple[str, ...], phrase: str) -> None:
    (here / "empty.txt").write_text("")
    assert run(monkeypatch, *words) == 1
    said = capsys.readouterr().err
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert phrase in line and "Traceback" not in said
    assert not [path for path in here.glob("out/**/*") if path.is_file()], (
        "no file is left that the next attempt would find"
    )


def test_other_commands_do_not_wait_for_the_trainer() -> None:
    code = (
        "import sys; sys.argv = ['hf-gated-sae', '--help']\n"
        "from hf_gated_sae.cli import main\n"
        "try: main()\nexcept SystemExit: assert 'hf_gated_sae.training' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_flag_of_the_architecture_is_a_number_in_the_run_that_is_written(here: Path, monkeypatch) -> None:
    words = ("--preset", "topk", "--sae.architecture", "topk", "--sae.k", "5", "--sae.d_sae", "48")
    given = yaml.safe_load((here / "run.yaml").read_text())
    del given["preset"]
    (here / "run.yaml").write_text(yaml.safe_dump(given))
    assert run(monkeypatch, "--config", "run.yaml", *words) == 0
    assert yaml.safe_load((here / "out" / "run.yaml").read_text())["sae"]["k"] == 5


def test_a_warning_names_a_text_that_is_too_short_for_held_out_tokens(here: Path, monkeypatch, capsys) -> None:
    for words, phrase in (
        ((), "nothing: the text is too short"),
        (("--data.held_out_tokens", "64"), "64 tokens, the"),
    ):
        assert run(monkeypatch, "--config", "run.yaml", "--output_dir", f"out{len(words)}", *words) == 0
        assert phrase in capsys.readouterr().err


def test_the_json_of_a_run_has_its_folder_and_its_curve(here: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--config", "run.yaml", "--data.held_out_tokens", "64", "--json") == 0
    [(name, found)] = json.loads(capsys.readouterr().out).items()
    assert (name, found["folder"]) == ("SAE", "out") and found["metrics"]["l0"] > 0 and len(found["curve"]) == 4
