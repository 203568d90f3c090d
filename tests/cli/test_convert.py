"""`hf-gated-sae convert`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import torch

from hf_gated_sae import SAEModel
from hf_gated_sae.cli import main
from tests.support.example_saes import assert_same
from tests.support.foreign import example_files, seed_gemma_scope
from tests.support.hub_state import files
from tests.support.mini_hub import MiniHub

ADDRESS = "layer_0/width_16k/average_l0_71"


@pytest.fixture
def theirs(hub: MiniHub, repo_id: str, tmp_path: Path) -> str:
    name = repo_id.replace("alice/", "google-cli-") + "/gemma-scope-2b-pt-res"
    seed_gemma_scope(hub, name, tmp_path / "theirs")
    return name


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command as a shell would and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["hf-gated-sae", "convert", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_into_a_folder(theirs: str, tmp_path: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, theirs, ADDRESS, "--out", str(tmp_path / "ours"), "--dtype", "bfloat16") == 0
    said = capsys.readouterr().out
    assert "JumpReLUSAE at resid_post.0" in said and "cc-by-4.0" in said and "gemma_scope" in said
    assert SAEModel.from_pretrained(tmp_path / "ours").checkpoint.format == "native"


def test_the_printed_command_runs(theirs: str, tmp_path: Path, monkeypatch) -> None:
    run(monkeypatch, theirs, ADDRESS, "--out", str(tmp_path / "ours"))
    card = (tmp_path / "ours" / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("hf-gated-sae convert")).split()
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *command[2:]) == 0
    for name in ("model.safetensors", "README.md", "config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_to_the_hub(hub: MiniHub, theirs: str, repo_id: str, monkeypatch, cache_dir: str) -> None:
    assert run(monkeypatch, theirs, ADDRESS, "--push", repo_id, "--subfolder", "layer_0") == 0
    pushed = SAEModel.from_pretrained(repo_id, "layer_0", cache_dir=cache_dir)
    assert_same(pushed, SAEModel.from_pretrained(theirs, ADDRESS, cache_dir=cache_dir))
    assert run(monkeypatch, theirs, ADDRESS, "--push", repo_id, "--create-pr") == 0
    assert len(hub.repo(repo_id).discussions) == 1 and "config.json" not in files(hub, repo_id)
    assert run(monkeypatch, theirs, ADDRESS, "--push", repo_id + "-2", "--private") == 0
    assert hub.repo(repo_id + "-2").private


@pytest.mark.parametrize(
    "words, phrase",
    [
        ((), "neither of --out and --push"),
        (("--out", "x", "--push", "alice/x"), "both of --out and --push"),
        (("--out", "x", "--private"), "pass them with --push"),
        (("--out", "x", "--dtype", "int8"), "dtype is 'int8'"),
        (("--out", "x", "--revision", "v9"), "no revision 'v9'"),
        (("--out", "x", "--license", "mit"), "published under 'cc-by-4.0'"),
        (("--out", "x", "--license", "apche-2.0"), "Did you mean 'apache-2.0'"),
        (("--out", "x", "--license", "other", "--license-name", "mine"), "license_link="),
        (("--push", "no such name!"), "expected 'owner/name'"),
    ],
)
def test_wrong_inputs_are_one_line(theirs: str, monkeypatch, capsys, tmp_path, words, phrase: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, theirs, ADDRESS, *words) == 1
    said = capsys.readouterr().err
    assert phrase in said and "Traceback" not in said and said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_nothing_to_convert(tmp_path: Path, monkeypatch, capsys) -> None:
    example_files("gemma_scope", tmp_path)
    folder = tmp_path / "google" / "gemma-scope-2b-pt-res"
    assert run(monkeypatch, str(folder), "--out", str(tmp_path / "x")) == 1
    assert "folders or files in it do" in capsys.readouterr().err
    assert run(monkeypatch, str(folder), "layer_1", "--push", "alice/x") == 1
    assert "folders or files in it do" in capsys.readouterr().err


def test_a_site_that_is_not_stated(hub: MiniHub, repo_id: str, tmp_path: Path, monkeypatch, capsys) -> None:
    name = repo_id.replace("alice/", "alice-cli-") + "/renamed"
    seed_gemma_scope(hub, name, tmp_path / "theirs")
    assert run(monkeypatch, name, ADDRESS, "--out", str(tmp_path / "ours")) == 0
    assert "JumpReLUSAE at a site that is not stated" in capsys.readouterr().out


# ---------------------------------------------------------------- home-made checkpoints


@pytest.fixture
def home_made(hub: MiniHub, repo_id: str, tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    held = {"left": torch.randn(16, 6), "up": torch.randn(16), "right": torch.randn(6, 16), "noise": torch.randn(2)}
    torch.save({"net": held}, tmp_path / "mine.pt")
    name = repo_id.replace("alice/", "alice-home-") + "/mine"
    hub.seed(name, {"mine.pt": (tmp_path / "mine.pt").read_bytes(), "README.md": "---\nlicense: mit\n---\n"})
    return name, held


DESCRIBED = (
    *("--architecture", "topk", "--name", "W_enc=left", "--name", "b_enc=up", "--name", "W_dec=net.right"),
    *("--name", "b_dec=", "--ignore", "noise", "--option", "k=3", "--option", "apply_b_dec_to_input=false"),
    *("--site", "resid_post.3", "--base-model", "me/model"),
)


def test_a_home_made_checkpoint(home_made, tmp_path: Path, monkeypatch, capsys) -> None:
    name, held = home_made
    assert run(monkeypatch, name, "--out", str(tmp_path / "ours"), *DESCRIBED) == 0
    assert "TopKSAE at resid_post.3, 6 to 16" in capsys.readouterr().out
    sae = SAEModel.from_pretrained(tmp_path / "ours")
    assert (sae.config.k, sae.config.site, sae.config.base_model) == (3, "resid_post.3", "me/model")
    x = torch.randn(4, 6)
    pre_latents = torch.relu(x @ held["left"].T + held["up"])
    kept = pre_latents >= pre_latents.topk(3).values[:, -1:]
    torch.testing.assert_close(sae(x).reconstruction, (pre_latents * kept) @ held["right"].T)


def test_the_printed_command_for_a_home_made_checkpoint_runs(home_made, tmp_path: Path, monkeypatch) -> None:
    assert run(monkeypatch, home_made[0], "--out", str(tmp_path / "ours"), *DESCRIBED) == 0
    card = (tmp_path / "ours" / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("hf-gated-sae convert"))
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *shlex.split(command)[2:]) == 0
    for name in ("model.safetensors", "README.md", "config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


@pytest.mark.parametrize(
    "words, phrase",
    [
        ((), "nearest to architecture"),
        (("--architecture", "standart"), "Did you mean 'standard'"),
        (("--architecture", "standard", "--name", "W_enc"), "--name has 'W_enc'; expected each key once"),
        (
            ("--architecture", "standard", "--name", "W_enc=a", "--name", "W_enc=b"),
            "--name has two values of W_enc",
        ),
        (("--architecture", "standard", "--name", "W_enc=lefd"), "Did you mean"),
        (("--name", "W_enc=left"), "without architecture="),
        ((*DESCRIBED, "--option", "sitee=x"), "Unknown option 'sitee'"),
    ],
)
def test_wrong_descriptions_are_one_line(home_made, monkeypatch, capsys, tmp_path, words, phrase: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, home_made[0], "--out", "x", *words) == 1
    said = capsys.readouterr().err
    assert phrase in said and "Traceback" not in said and said.count("\n") == 1
    assert not (tmp_path / "x").exists()
