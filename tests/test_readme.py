"""The README's code runs, in order, in one process; the Hub in it is the loopback one."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from hf_gated_sae.cli import main
from hf_gated_sae.demo import bundled, corpus

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_code_runs_and_says_what_its_comments_say(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(BLOCKS):
        code = block.replace("me/my-saes", "alice/my-saes")
        path = tmp_path / f"block_{number}.py"
        path.write_text(code, encoding="utf-8")  # nnsight reads the source of a with-block
        exec(compile(code, str(path), "exec"), names)
    config = names["sae"].config
    assert (config.site, config.d_in, config.d_sae) == ("resid_post.1", 128, 1024)
    assert names["latents"].shape == (*names["x"].shape[:2], 1024)
    assert names["reconstruction"].shape == names["x"].shape
    assert all((names["again"].state_dict()[key] == value).all() for key, value in names["sae"].state_dict().items())
    assert 0.5 < names["report"].loss_recovered <= 1.05
    clamped, scaled = names["handle"].report().interventions
    assert sum(map(len, clamped.positions.values())) >= 3 and sum(map(len, scaled.positions.values())) > 10
    sae, model, batch = names["sae"], names["model"], names["batch"]
    clean = model(**batch).logits
    for intervention in (names["Ablate"](sae, [293, 327]), names["Scale"](sae, {397: 0.5})):
        with names["attach"](model, intervention):
            assert not (model(**batch).logits == clean).all()
    assert str(names["read_name"]("model.layers.1")) == "resid_post.1"


def test_the_training_run_trains_and_is_resumed(tmp_path, monkeypatch, capsys):
    [run] = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    commands = [
        shlex.split(line, comments=True) for line in README.splitlines() if line.startswith("hf-gated-sae train")
    ]
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(run.replace("openai-community/gpt2", str(bundled.MODEL)), encoding="utf-8")
    (tmp_path / "book.txt").write_text("\n".join(corpus.texts("held_out", 30_000)), encoding="utf-8")
    small = (
        "--sae.site resid_post.1 --sae.expansion_factor 1 --data.buffer_size 256 --training.activation_batch_size 64"
    )
    small += " --model.hub_id openai-community/gpt2"  # which a folder does not tell
    small += " --training.max_steps 4 --training.save_steps 2 --training.recorded_activations 100 --training.use_cpu"
    for command in commands:
        monkeypatch.setattr(sys, "argv", [*command, *small.split(), "--training.statistics_activations", "100"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
        for file in (tmp_path / "gpt2-sae" / "checkpoint-4").glob("*"):
            file.unlink()  # as if it had crashed
    said = "".join(capsys.readouterr())
    assert "tokens per second" in said and "from the beginning" in said and "from checkpoint-2" in said
    assert (tmp_path / "gpt2-sae" / "README.md").is_file()


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_the_named_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", README):
        assert f"\n{target}:" in makefile, target
    for path in re.findall(r"`((?:hf_gated_sae|hub_scripts|model_cards)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path
