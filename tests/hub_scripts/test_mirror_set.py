"""Converting a whole repository, one commit per SAE, with interruptions."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hf_gated_sae import SAEModel, SAESet
from hf_gated_sae.errors import InputError, PublishError, SAEError
from hf_gated_sae.publishing import Mirror, convert, push_to_hub
from hub_scripts.convert_and_publish import main as convert_and_publish
from hub_scripts.mirror_set import main as mirror_set
from tests.support.example_saes import assert_same, example
from tests.support.foreign import CARD, example_files, seed_gemma_scope
from tests.support.hub_state import commits, files
from tests.support.mini_hub import MiniHub

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "hub_scripts"


@pytest.fixture
def theirs(hub: MiniHub, repo_id: str, tmp_path: Path) -> str:
    """Five SAEs."""
    name = repo_id.replace("alice/", "google-mirror-") + "/gemma-scope-2b-pt-res"
    seed_gemma_scope(hub, name, tmp_path / "theirs", layers=2)
    hub.requests.clear()
    return name


def run(script: Callable[..., None], *words: str) -> tuple[int, str]:
    """Run a script in this process and return its exit status and output, including an error of ours."""
    app = typer.Typer()
    app.command()(script)
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, (SystemExit, SAEError)):
        raise result.exception
    told = f"error: {result.exception}" if isinstance(result.exception, SAEError) else ""
    return result.exit_code, result.output + told


def states(source: str, target: str, **options: object) -> dict[str, str]:
    return {step.address: step.state for step in Mirror(SAESet.from_pretrained(source), target, **options).plan()}


def uploads(hub: MiniHub) -> int:
    return sum(method == "POST" and "/commit/" in path for method, path, *_ in hub.requests)


def mirror_steps(source: str, target: str, most: int | None = None, **options: object) -> None:
    mirror = Mirror(SAESet.from_pretrained(source), target, **options)
    for step in [step for step in mirror.plan() if step.state != "done"][:most]:
        mirror.publish(step)


def test_killed_half_way_and_resumed(hub: MiniHub, theirs: str, repo_id: str, cache_dir: str) -> None:
    command = [sys.executable, str(SCRIPTS / "mirror_set.py"), theirs, repo_id]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 600
        while ("models", repo_id) not in hub.repos or not hub.repo(repo_id).branches or not commits(hub, repo_id):
            assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
            time.sleep(0.005)
    finally:
        process.kill()
        process.communicate()
    before = commits(hub, repo_id)
    assert 1 <= len(before) < 5, "killed half way"
    for folder in SAESet.from_pretrained(repo_id):
        SAEModel.from_pretrained(repo_id, folder, cache_dir=cache_dir)  # no SAE is incomplete
    hub.requests.clear()
    code, said = run(mirror_set, theirs, repo_id)
    assert code == 0, said
    assert f"{len(before)} done, {5 - len(before)} missing" in said
    assert uploads(hub) == 5 - len(before) and len(commits(hub, repo_id)) == 5
    originals = SAESet.from_pretrained(theirs, cache_dir=cache_dir)
    mirrored = SAESet.from_pretrained(repo_id, cache_dir=cache_dir)
    assert list(mirrored) == list(originals)
    for address, sae in originals.items():
        assert_same(mirrored[address], sae)
    index = json.loads(files(hub, repo_id)["sae_set.json"])["saes"]
    assert {entry["conversion"]["converted from"] for entry in index.values()} == {f"{theirs}@{originals.revision}"}
    hub.requests.clear()
    code, said = run(mirror_set, theirs, repo_id)
    assert code == 0 and "5 done" in said and not uploads(hub)


def test_dry_run_and_limit(hub: MiniHub, theirs: str, repo_id: str) -> None:
    code, said = run(mirror_set, theirs, repo_id, "--dry-run", "--addresses", "layer_*", "--folder", "gemma")
    assert code == 0 and "4 missing" in said
    assert f"-> {repo_id}/gemma/layer_0/width_16k/average_l0_12" in said
    assert ("models", repo_id) not in hub.repos
    code, said = run(mirror_set, theirs, repo_id, "--limit", "2", "--sites", "resid_post.1")
    assert code == 0, said
    assert len(commits(hub, repo_id)) == 2 and all("layer_1" in title for title in commits(hub, repo_id))


def test_a_broken_upload_is_resumed(hub: MiniHub, theirs: str, repo_id: str) -> None:
    mirror_steps(theirs, repo_id, 2)
    hub.fail("POST .*/commit/.*", "status", times=1, status=503)
    hub.fail("POST .*/commit/.*", "status", times=1, status=400)
    with pytest.raises(PublishError, match="nothing was committed"):
        mirror_steps(theirs, repo_id)
    hub.faults.clear()
    assert sorted(states(theirs, repo_id).values()) == ["done", "done", "missing", "missing", "missing"]
    mirror_steps(theirs, repo_id)
    assert set(states(theirs, repo_id).values()) == {"done"} and len(commits(hub, repo_id)) == 5


def test_a_changed_source_is_converted_again(hub: MiniHub, theirs: str, repo_id: str) -> None:
    mirror_steps(theirs, repo_id, 3)
    assert sorted(states(theirs, repo_id).values()) == ["done"] * 3 + ["missing"] * 2
    hub.seed(theirs, {"README.md": CARD + "\nA new commit.\n"})
    assert sorted(states(theirs, repo_id).values()) == ["missing"] * 2 + ["outdated"] * 3
    mirror_steps(theirs, repo_id)
    assert set(states(theirs, repo_id).values()) == {"done"}
    assert set(states(theirs, repo_id, dtype="float32").values()) == {"done"}
    assert set(states(theirs, repo_id, dtype="bfloat16").values()) == {"outdated"}


def test_converted_saes_are_recognised_without_the_index(hub: MiniHub, theirs: str, repo_id: str) -> None:
    mirror_steps(theirs, repo_id, 2)
    hub.seed(repo_id, {"sae_set.json": json.dumps({"schema": 1, "saes": {}})})
    assert sorted(states(theirs, repo_id).values()) == ["done"] * 2 + ["missing"] * 3
    mirror_steps(theirs, repo_id, 1)
    index = json.loads(files(hub, repo_id)["sae_set.json"])["saes"]
    assert len(index) == 3 and all("conversion" in entry for entry in index.values())


def test_somebodys_own_sae_is_not_overwritten(hub: MiniHub, theirs: str, repo_id: str) -> None:
    push_to_hub(example(), repo_id, subfolder="embedding/width_4k/average_l0_6")
    convert(theirs, "layer_1/width_16k/average_l0_71").push(repo_id, subfolder="layer_0/width_16k/average_l0_12")
    assert sorted(states(theirs, repo_id).values()) == ["missing"] * 3 + ["taken"] * 2
    code, said = run(mirror_set, theirs, repo_id)
    assert code == 1 and said.count("has another SAE in") == 2 and "2 of 5 could not" in said
    assert len(commits(hub, repo_id)) == 5


def test_one_broken_sae_does_not_stop_the_others(hub: MiniHub, theirs: str, repo_id: str) -> None:
    hub.seed(theirs, {"layer_0/width_16k/average_l0_71/params.npz": b"not an archive"})
    code, said = run(mirror_set, theirs, repo_id)
    assert code == 1 and "failed   layer_0/width_16k/average_l0_71" in said.replace("\n", "")
    assert len(commits(hub, repo_id)) == 4


def test_a_source_that_may_not_be_published_stops_at_once(hub: MiniHub, theirs: str, repo_id: str) -> None:
    hub.seed(theirs, {"README.md": "# no licence"})
    code, said = run(mirror_set, theirs, repo_id)
    assert code == 1 and said.count("licence of") == 1 and "Traceback" not in said
    assert ("models", repo_id) not in hub.repos
    hub.repo(theirs).gated = "auto"
    code, said = run(mirror_set, theirs, repo_id)
    assert code == 1 and "gated: accept its conditions" in said and said.count("gated") == 1


def test_impossible_mirrors(hub: MiniHub, theirs: str, tmp_path: Path) -> None:
    example_files("gemma_scope", tmp_path)
    local = SAESet.from_pretrained(tmp_path / "google" / "gemma-scope-2b-pt-res")
    with pytest.raises(InputError, match="not pinned to a commit"):
        Mirror(local, "alice/x")
    with pytest.raises(InputError, match="Source and target are both"):
        Mirror(SAESet.from_pretrained(theirs), theirs)


def test_one_sae_by_the_other_script(hub: MiniHub, theirs: str, repo_id: str) -> None:
    address = "layer_1/width_16k/average_l0_71"
    code, said = run(convert_and_publish, theirs, address, repo_id, "--dtype", "bfloat16")
    assert code == 0, said
    assert f"published as {repo_id}@{hub.repo(repo_id).at('main').id[:12]}" in said


@pytest.mark.parametrize(
    "script, more", [("convert_and_publish.py", ["layer_0", "alice/target"]), ("mirror_set.py", ["alice/target"])]
)
def test_a_mistake_is_one_sentence(script: str, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script, "alice/there-is-none", *more])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: There is neither a folder 'alice/there-is-none'")
