"""Common to all subcommands: help, version, quiet, JSON, completion, and errors for bad input."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hf_gated_sae
from hf_gated_sae.catalog.index_search import SITES
from hf_gated_sae.cli import complete
from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.hub.index import releases
from hf_gated_sae.modeling import architectures
from hf_gated_sae.training.presets import presets
from tests.support.foreign import example_files

from .commands import COMMANDS, run

pytestmark = pytest.mark.slow

SECTIONS = ("Args:", "Attributes:", "Example:", "Raises:", "Returns:", "Yields:")
SAE = (str(bundled.SAES), "resid_post.1/gated")


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def options(command: str) -> set[str]:
    return {option for parameter in COMMANDS[command].params for option in parameter.opts}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- help and version


@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS)], ids=str)
def test_the_help_is_for_users_and_fits(words, monkeypatch, capsys):
    assert run(monkeypatch, *words, "--help") == 0
    text = capsys.readouterr().out
    assert not [section for section in SECTIONS if section in text]
    assert "``" not in text and "Usage: hf-gated-sae" in text
    assert max(map(len, text.splitlines())) <= 80
    assert run(monkeypatch, *words, "-h") == 0
    assert capsys.readouterr().out == text


def test_paragraphs_are_wrapped_to_the_terminal_and_not_as_in_the_source(monkeypatch, capsys):
    for name, command in COMMANDS.items():
        run(monkeypatch, name, "--help")
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        first = command.help.split("\n\n")[0]
        shown = lines[lines.index(next(line for line in lines if line and first.startswith(line))) :]
        assert " ".join(shown[: shown.index("")]) == first, name


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"hf-gated-sae {hf_gated_sae.__version__}\n"


@pytest.mark.parametrize("word", ["--version", "--help", "-h"])
def test_version_and_help_do_not_wait_for_torch(word):
    done = python(
        f"import sys; sys.argv = ['hf-gated-sae', {word!r}]\n"
        "from hf_gated_sae.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- quiet and JSON


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_quiet_on_request(name):
    assert {"--quiet", "-q", "--json"} <= options(name)


@pytest.fixture
def theirs(tmp_path) -> str:
    example_files("gemma_scope", tmp_path)
    return str(tmp_path / "google" / "gemma-scope-2b-pt-res")


ADDRESS = "layer_1/width_16k/average_l0_71"
DEMO = ("demo", "--tokens", "1024", "--latent", "484", "--strength", "2")
RUN = shlex.split(
    f"--output_dir {{tmp}}/run --model.name {bundled.MODEL} --model.hub_id none --data.files {{tmp}}/train.txt "
    "--data.context_length 32 --data.buffer_size 128 --sae.site resid_post.1 --sae.d_sae 48 --training.max_steps 4 "
    "--training.activation_batch_size 32 --training.recorded_activations 100 --training.use_cpu"
)
DOCUMENTS = {
    "search": (("search", "-m", "gpt2", "--no-live", "--limit", "2"), {"found", "saes"}),
    "info of an SAE": (("info", *SAE), {"architecture", "sites", "d_sae", "code", "license", "commit"}),
    "info of a set": (("info", SAE[0]), {"saes", "kinds", "addresses"}),
    "info of an unreachable repository": (
        ("info", "gpt2-small-res-jb", "blocks.5.hook_resid_pre"),
        {"source", "saes"},
    ),
    "info of a model": (("info", "--model", str(bundled.MODEL)), {"class", "sites"}),
    "convert": (("convert", "{theirs}", ADDRESS, "--out", "{tmp}/ours"), {"written", "layout", "license"}),
    "train, presets": (("train", "--presets"), {"gated-paper", "topk"}),
    "train, dry run": (("train", *RUN, "--dry-run"), {"tokens", "time", "total", "seconds"}),
    "train": (("train", *RUN), {"SAE"}),
    "demo": ((*DEMO, "--out", "{tmp}/out"), {"fidelity", "target", "ablation", "steering", "published"}),
}


def words_of(case: str, theirs: str, folder: Path) -> list[str]:
    (folder / "train.txt").write_text("\n".join(corpus.texts("training", 20_000)), encoding="utf-8")
    return [word.format(theirs=theirs, tmp=folder) for word in DOCUMENTS[case][0]]


def test_every_command_that_prints_a_table_is_here():
    assert {re.split(r"[ ,]", case)[0] for case in DOCUMENTS} == set(COMMANDS)


@pytest.mark.parametrize("case", DOCUMENTS)
def test_one_json_document_and_nothing_else_on_stdout(case, theirs, tmp_path, monkeypatch, capsys):
    keys, words = DOCUMENTS[case][1], words_of(case, theirs, tmp_path)
    assert run(monkeypatch, *words, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert keys <= set(found)


@pytest.mark.parametrize("case", DOCUMENTS)
def test_quiet_keeps_the_results_alone(case, theirs, tmp_path, monkeypatch, capfd):
    assert run(monkeypatch, *words_of(case, theirs, tmp_path), "-q") == 0
    said = capfd.readouterr()
    assert said.err == "" and said.out.strip()


def test_json_has_what_the_code_needs(monkeypatch, capsys):
    run(monkeypatch, *DOCUMENTS["search"][0], "--json")
    [first, _] = json.loads(capsys.readouterr().out)["saes"]
    assert first["base_model"] == "openai-community/gpt2" and first["d_sae"] > 0
    assert first["code"].startswith("SAEModel.from_pretrained(")


def test_nothing_found_is_an_empty_list_and_status_1(monkeypatch, capsys):
    assert run(monkeypatch, "search", "-m", "gpt2", "--layer", "44", "--no-live", "--json") == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {"found": 0, "saes": []} and "has SAEs at layers 0, 1" in said.err


def test_an_error_stays_one_line_on_stderr_with_json_too(monkeypatch, capsys):
    assert run(monkeypatch, "search", "-m", "gpt2x", "--no-live", "--json") == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "Did you mean 'openai-community/gpt2'" in said.err


def test_without_a_terminal_progress_is_lines_on_stderr(monkeypatch, capsys):
    assert run(monkeypatch, *DEMO) == 0
    said = capsys.readouterr().err
    for number, step in enumerate(("load model and SAE", "read text", "splice", "find the latent", "ablate", "steer")):
        assert re.search(rf"^ *\d+ s  {number + 1}/7 {step}$", said, flags=re.MULTILINE), step


# ---------------------------------------------------------------- completion


def test_completion_is_offered_for_the_shells(monkeypatch, capsys):
    run(monkeypatch, "--help")
    said = capsys.readouterr().out
    assert "--install-completion" in said and "--show-completion" in said


def test_names_are_completed_without_torch():
    done = python(
        "import sys; from hf_gated_sae.cli import complete\n"
        "assert 'resid_post' in complete.sites('resid') and 'jumprelu' in complete.architectures('j')\n"
        "assert 'gated-paper' in complete.presets('') and complete.releases('gemma-scope')\n"
        "assert complete.base_models('google/') and not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_completions_are_the_known_names():
    assert set(complete.architectures("")) == set(architectures)
    assert set(complete.presets("")) == set(presets)
    assert set(complete.sites("")) <= {*SITES, "attn_in"}
    assert set(complete.releases("")) == {*releases(), *(release.repo for release in releases().values())}


def test_a_shell_gets_completions(monkeypatch, capsys):
    monkeypatch.setenv("_HF_GATED_SAE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "hf-gated-sae search --site resid_p")
    monkeypatch.setenv("COMP_CWORD", "3")
    run(monkeypatch)
    assert capsys.readouterr().out.split() == ["resid_post", "resid_pre"]


# ---------------------------------------------------------------- bad input


BAD = [
    ("search --limit -1", "--limit is -1; expected 0 or more"),
    ("search --layer -2", "--layer is -2; expected 0 or more"),
    ("search --l0 nan", "--l0 is nan"),
    ("search --l0 -3", "--l0 is -3"),
    ("search --width wide", "width is 'wide'"),
    ("search -m google/gemma-2-2", "Did you mean 'google/gemma-2-2b'"),
    ("search -m gpt2x", "Did you mean 'openai-community/gpt2'"),
    ("search --architecture gatd", "Did you mean 'gated'"),
    ("search --site resid_pst.3", "Did you mean 'resid_post'"),
    ("search --site blocks.3.hook_resid_pst", "Did you mean 'blocks.L.hook_resid_post'"),
    ("info", "Given neither; expected a repository of SAEs"),
    ("info a/b --model c", "Given both, a/b and --model c; expected"),
    ("info ./none", "There is no folder './none'"),
    ("info nobody/nothing", "neither a folder 'nobody/nothing' nor a model repository"),
    (
        "info gemma-scope-2b-pt-res-canonical layer_12/width_16k/canonicl",
        "Did you mean 'layer_12/width_16k/canonical'",
    ),
    ("info {file}", "{file}"),
    ("info --model ./none", "there is no folder none"),
    ("convert {theirs} {address}", "neither of --out and --push"),
    ("convert {theirs} {address} --out {file}", "{file} is not a folder"),
    ("convert {theirs} {address} --out {file}/below", "{file} is not a folder"),
    ("convert {theirs} {address} --out /proc/nowhere", "--out /proc/nowhere cannot be written"),
    ("convert {theirs} {address} --out {tmp}/ours --dtype int8", "dtype is 'int8'"),
    ("convert {theirs} layer_9 --out {tmp}/ours", "layer_9"),
    ("convert ./none --out {tmp}/ours", "There is no folder './none'"),
    ("demo --tokens 0", "--tokens is 0; expected 512 or more"),
    ("demo --tokens -5", "--tokens is -5"),
    ("demo --strength nan", "--strength is nan; expected a number above 0"),
    ("demo --strength inf", "--strength is inf"),
    ("demo --strength -1", "--strength is -1"),
    ("demo --strength 0", "--strength is 0"),
    ("demo --latent -1", "--latent is -1"),
    ("demo --latent 1024", "this SAE has d_sae = 1024 latents"),
    ("demo --concept coment", "Did you mean 'comment'"),
    ("demo --concept comment --latent 3", "omit one of them"),
    ("demo --concept comment --text {file}", "needs Python source"),
    ("demo --text {tmp}/none.txt", "is not a file"),
    ("demo --model me/lm", "without --sae"),
    ("demo --sae ./none", "There is no folder './none'"),
    ("demo --subfolder resid_post.1/gatd", "resid_post.1/gated"),
    ("demo --out {file}/below", "{file} is not a folder"),
    ("demo --out /proc/nowhere", "--out /proc/nowhere cannot be written"),
    ("demo --plot {tmp}", "is a folder; expected a file"),
    ("demo --plot {file}/demo.png", "{file} is not a folder"),
]


@pytest.mark.parametrize(("words", "phrase"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_sentence_before_a_model_is_loaded(words, phrase, theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if "./none" not in words or "info" not in words:
        loaded = "transformers.AutoModelForCausalLM.from_pretrained"
        monkeypatch.setattr(loaded, lambda *_, **__: pytest.fail("a model is loaded"))
    file = tmp_path / "a_file.txt"
    file.write_text("nothing", encoding="utf-8")
    fill = {"theirs": theirs, "address": ADDRESS, "tmp": str(tmp_path), "file": str(file)}
    before = sorted(tmp_path.rglob("*"))
    live = ["--no-live"] if words.startswith("search") else []
    assert run(monkeypatch, *(word.format(**fill) for word in words.split()), *live) == 1
    said = capsys.readouterr()
    assert phrase.format(**fill) in said.err and said.out == ""
    last = [line for line in said.err.splitlines() if not re.match(r" *\d+ s  1/7 load", line)]
    assert len(last) == 1 and last[0].startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_system_error_is_one_sentence(monkeypatch, capsys):
    def full(*_, **__):
        Path("/dev/full").write_text("x" * 10_000)

    monkeypatch.setattr("hf_gated_sae.catalog.index_search.search", full)
    assert run(monkeypatch, "search", "-m", "gpt2") == 1
    assert capsys.readouterr().err == "error: No space left on device.\n"
