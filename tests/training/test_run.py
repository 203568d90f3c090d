"""A run: its parts, and how they are put together and carried out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.errors import (
    CheckpointError,
    InputError,
    MissingFileError,
    SiteError,
    TrainingError,
)
from hf_gated_sae.hooks.save_activations import save_activations
from hf_gated_sae.publishing.trained import save_trained
from hf_gated_sae.training.memory import TrainingMemory
from hf_gated_sae.training.run import Run, assemble, measured, read_run
from hf_gated_sae.training.run.base_model import with_dtype
from hf_gated_sae.training.run.run_parts import build
from hf_gated_sae.training.run.strict_yaml import merged, read_yaml
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.slow


def test_parts_are_built_as_the_run_describes_them(small: dict) -> None:
    small["sae"] |= {"expansion_factor": 2, "d_sae": None, "dtype": "bfloat16"}
    parts = build(assemble(small))
    [sae] = parts.saes.values()
    assert (sae.config.d_in, sae.config.d_sae, sae.dtype) == (128, 256, torch.bfloat16)
    assert (sae.config.base_model, sae.config.site) == ("me/python-lm", "resid_post.1")
    assert not any(each.requires_grad for each in parts.model.parameters())
    batch = next(iter(parts.stream.batches(16)))
    assert batch["resid_post.1"].shape == (16, 128)


def test_the_seed_decides_the_initial_weights(small: dict) -> None:
    first, same = (next(iter(build(assemble(small)).saes.values())).W_dec for _ in range(2))
    other = next(iter(build(assemble({**small, "seed": 1})).saes.values())).W_dec
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_path_of_a_local_model_is_not_recorded(small: dict) -> None:
    small["model"]["hub_id"] = "none"
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
    small["model"]["name"] = str(tmp_path / "lm")  # an empty folder: the text is checked first
    with pytest.raises(MissingFileError, match="data.files: there is no"):
        build(assemble(small))


def test_patterns_are_expanded_to_files(small: dict, tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("import os\n" * 200)
    small["data"] |= {"files": [str(tmp_path / "*.md")], "held_out_tokens": 0}
    assert len(build(assemble(small)).stream.tokens.text.files) == 2


def test_a_pattern_outside_a_list_is_explained(small: dict, tmp_path: Path) -> None:
    small["data"]["files"] = str(tmp_path / "*.txt")
    with pytest.raises(MissingFileError, match=r"expected a pattern in a list, \[.*\*.txt\]"):
        build(assemble(small))


def test_a_list_of_tables_is_read_by_rows(small: dict, tmp_path: Path) -> None:
    for number in range(3):
        lines = [json.dumps({"story": each, "id": 7}) for each in corpus.texts("training", 4000 * (number + 1))]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    for files in ([str(tmp_path / "0.jsonl"), str(tmp_path / "2.jsonl")], [str(tmp_path / "*.jsonl")]):
        data = {**small["data"], "files": files, "text_column": "story", "held_out_tokens": 0}
        run = {**small, "data": data}
        read = list(build(assemble(run)).stream.tokens.text.documents())
        assert len(read) > 2 and not any('"id"' in each for each in read)
    with pytest.raises(InputError, match="data.documents means nothing with data.files"):
        assemble({**small, "data": {**small["data"], "files": files, "documents": "line"}})
    with pytest.raises(InputError, match=r"train.txt is not of the same kind as .*0.jsonl, whose rows are documents"):
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
    with pytest.raises(InputError, match="already holds a run"):
        Run.prepare(assemble(small))


@pytest.mark.parametrize(
    "theirs",
    [
        *("checkpoint-1/weights.bin", "config.json", "model.safetensors", "a/config.json"),
        *("README.md", "training_args.json"),
    ],
)
def test_files_of_other_programs_are_not_touched(small: dict, theirs: str) -> None:
    file = Path(small["output_dir"], theirs)
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    small["saes"] = {"a": {}}
    small["model"]["name"] = "./nowhere"  # it is refused before the model is looked for
    with pytest.raises(InputError, match="no run.yaml: the file was not written by a run"):
        Run.prepare(assemble(small))
    assert file.read_text() == "mine"


def test_a_run_without_a_whole_checkpoint_is_not_started_over(small: dict) -> None:
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
            with pytest.raises(InputError, match="Another process is training in"):
                second.train()

    first.train([Meanwhile()])
    with pytest.raises(InputError, match="already holds a run"):
        second.train()
    assert not (folder / ".running").exists()


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/zzz"])
def test_a_folder_that_cannot_be_written_is_refused_first(small: dict, place: str) -> None:
    small["model"]["name"] = "./nowhere"
    with pytest.raises(InputError, match="cannot be written to"):
        Run.prepare(assemble({**small, "output_dir": place}))


def test_a_start_that_fails_leaves_no_folder(small: dict, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("import os")
    small["data"]["files"] = str(tmp_path / "short.txt")
    with pytest.raises(InputError):
        Run.prepare(assemble(small)).train()
    assert not Path(small["output_dir"]).exists()


def test_a_buffer_that_does_not_fit_is_named(small: dict) -> None:
    small["data"]["buffer_size"] = 10**15
    with pytest.raises(TrainingError, match="data.buffer_size=10{15}: 512 PB.* Reduce data.buffer_size"):
        Run.prepare(assemble(small))


def test_memory_advice_names_the_buffer_only_if_the_saes_would_fit() -> None:
    memory = TrainingMemory(weights=10, gradients=10, moments=20, per_activation=1)
    roomy, tight = memory.advice(64, 1000), memory.advice(64, 70)
    assert "buffer_size" in roomy and "activation_batch_size=32" in roomy
    assert "buffer_size" not in tight and "activation_batch_size=16" in tight
    assert "40 B" in roomy, "and not 0 GiB"


def test_held_out_text_is_cut_as_the_text_of_the_run(small: dict, tmp_path: Path) -> None:
    run = Run.prepare(assemble(small))
    (tmp_path / "other.txt").write_text("import os\n" * 400)
    assert next(iter(run.held_out(str(tmp_path / "other.txt"))))["input_ids"].shape == (4, 32)
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(InputError, match="empty|no text"):
        run.held_out(str(tmp_path / "other.txt"))


def test_held_out_text_is_split_into_documents_as_the_text_of_the_run(small: dict, tmp_path: Path) -> None:
    small["data"] |= {"documents": "line", "packing": False}
    (tmp_path / "other.txt").write_text("import os\nimport sys, re\n" * 3)
    [batch, rest] = Run.prepare(assemble(small)).held_out(str(tmp_path / "other.txt"))
    assert len(batch["input_ids"]) == 4 and len(rest["input_ids"]) == 2, "of six lines"
    assert batch["attention_mask"].sum(-1).unique().numel() == 2


def test_held_out_text_is_streamed_as_the_text_of_the_run(small: dict, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "import os\n" * 400}))
    for streaming in (True, False):
        small["data"]["streaming"] = streaming
        found = Run.prepare(assemble(small)).held_out(str(tmp_path / "other.jsonl"))
        assert found.text.streaming == streaming


def test_only_a_run_is_resumed(small: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run in .* to resume"):
        Run.prepare(assemble(small), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="which is a file"):
        Run.prepare(assemble({**small, "output_dir": str(tmp_path / "file")}))


def test_a_run_can_be_prolonged(small: dict, tmp_path: Path) -> None:
    small["training"] |= {"save_steps": 2, "max_steps": 8}
    whole = Run.prepare(assemble(small))
    whole.train()
    parts = {**small, "output_dir": str(tmp_path / "parts"), "training": {**small["training"], "max_steps": 4}}
    Run.prepare(assemble(parts)).train()
    parts["training"] |= {"max_steps": 8}
    longer = Run.prepare(assemble(parts), resume=True)
    longer.train()
    assert longer.checkpoint is not None and longer.checkpoint.name == "checkpoint-4"
    for name, tensor in whole.saes[""].state_dict().items():
        assert torch.equal(longer.saes[""].state_dict()[name], tensor), name
    assert read_yaml(tmp_path / "parts" / "run.yaml")["training"]["max_steps"] == 8

    falling = {**parts, "output_dir": str(tmp_path / "falling")}
    falling["training"] = {**parts["training"], "lr_scheduler_type": "cosine", "max_steps": 4}
    Run.prepare(assemble(falling)).train()
    falling["training"] |= {"max_steps": 8}
    with pytest.raises(InputError, match="has training.max_steps: 4, but 8 was given"):
        Run.prepare(assemble(falling), resume=True)
    falling["training"] |= {"max_steps": 4, "recorded_activations": 50}
    Run.prepare(assemble(falling), resume=True)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(small: dict, tmp_path: Path) -> None:
    whole = Run.prepare(assemble(small))
    whole.train()
    broken = {**small, "output_dir": str(tmp_path / "broken"), "training": {**small["training"], "save_steps": 2}}
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


def test_a_run_is_resumed_without_the_buffer_in_its_checkpoints(small: dict) -> None:
    small["data"]["save_buffer"] = False
    small["training"] |= {"save_steps": 2, "max_steps": 8}

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run.prepare(assemble(small)).train([Stop()])
    resumed = Run.prepare(assemble(small), resume=True)
    assert resumed.checkpoint.name == "checkpoint-4"
    assert resumed.train().global_step == 8


def test_a_run_is_resumed_only_with_its_own_settings(small: dict) -> None:
    Run.prepare(assemble(small)).train()
    with pytest.raises(InputError, match="sae.d_sae: 48, but 64 was given"):
        Run.prepare(assemble(merged(small, {"sae": {"d_sae": 64}})), resume=True)
    Run.prepare(assemble(merged(small, {"training": {"logging_steps": 1}})), resume=True)


def test_a_missing_hub_id_is_reported_before_anything_is_loaded(small: dict, monkeypatch) -> None:
    monkeypatch.setattr("hf_gated_sae.training.run.run_parts.load_model", lambda *_: pytest.fail("was loaded"))
    del small["model"]["hub_id"]
    for make in (build, measured):
        with pytest.raises(InputError, match=r"--model.hub_id none if there is no such id"):
            make(assemble(small))


class TestTheDtypeOfTheModel:
    @pytest.fixture
    def stored(self, small: dict, tmp_path: Path) -> Path:
        """The bundled model as bfloat16."""
        folder = tmp_path / "stored"
        AutoModelForCausalLM.from_pretrained(bundled.MODEL, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(bundled.MODEL).save_pretrained(folder)
        small["model"]["name"] = str(folder)
        return folder

    @pytest.mark.parametrize(("factor", "dtype"), [(8.0, torch.float32), (0.5, torch.bfloat16)])
    def test_auto_is_the_faster_lossless_dtype(
        self, small: dict, stored: Path, monkeypatch, factor: float, dtype: torch.dtype
    ) -> None:
        times = {torch.bfloat16: factor, torch.float32: 1.0}
        monkeypatch.setattr("hf_gated_sae.training.run.base_model._seconds", times.get)
        run = Run.prepare(assemble(small))
        assert run.parts.model.dtype == dtype
        assert ("stored in bfloat16, which takes 8.0x as long here" in run.facts()["model"]) == (factor > 1)
        run.train(quiet=True)
        small["training"]["max_steps"] = 6
        monkeypatch.setattr(
            "hf_gated_sae.training.run.base_model._seconds", lambda _: pytest.fail("was decided before")
        )
        assert Run.prepare(assemble(small), resume=True).parts.model.dtype == dtype

    def test_a_given_dtype_is_kept(self, small: dict, stored: Path) -> None:
        small["model"]["dtype"] = "bfloat16"
        assert build(assemble(small)).model.dtype == torch.bfloat16

    def test_float32_is_never_narrowed(self, small: dict, monkeypatch) -> None:
        monkeypatch.setattr("hf_gated_sae.training.run.base_model._seconds", lambda _: pytest.fail("was compared"))
        assert build(assemble(small)).model.dtype == torch.float32

    def test_a_model_that_would_not_fit_stays_as_it_is_stored(self, small: dict, stored: Path, monkeypatch) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2_000_000))
        settings = with_dtype(assemble(small).model, torch.device("cpu"))
        assert settings == (assemble(small).model, "")


def test_the_licence_of_a_run_is_in_the_card_in_the_hubs_spelling(small: dict) -> None:
    with pytest.raises(InputError, match="Did you mean 'mit'|not on the Hub's list"):
        assemble({**small, "license": "MITT"})
    with pytest.raises(InputError, match="license"):
        assemble({**small, "license": "other"})
    run = Run.prepare(assemble({**small, "license": "Apache 2.0"}))
    run.train(quiet=True)
    assert "license: apache-2.0" in (save_trained(run)[""] / "README.md").read_text(encoding="utf-8")
