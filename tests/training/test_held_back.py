"""Measuring SAEs on held-out text while they are trained."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hf_gated_sae import evaluate
from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.errors import InputError, MissingFileError
from hf_gated_sae.publishing import read_facts
from hf_gated_sae.publishing.trained import save_trained
from hf_gated_sae.training import SAETrainer
from hf_gated_sae.training.run import Run, assemble
from hf_gated_sae.training.run.run_text import with_held_out
from hf_gated_sae.training.streams import GivenTokens, HeldBack, ModelActivations, TextTokens
from hf_gated_sae.training.streams.held_back import can_hold_back

from ..support.tiny_models import tiny_model
from .test_trainer import quiet
from .worlds import D_IN, activations, build

pytestmark = pytest.mark.slow

BATCHES = [torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(10)]


def rows(batches: Any) -> torch.Tensor:
    return torch.cat(list(batches))


@pytest.mark.parametrize("sequences", [1, 3, 4, 6, 8])
def test_held_out_text_and_the_rest_are_the_whole_text(sequences: int) -> None:
    tokens = HeldBack(GivenTokens(BATCHES), sequences)
    held, rest = rows(tokens.held_out()), rows(tokens)
    assert len(held) == sequences
    assert torch.equal(torch.cat([held, rest]), rows(BATCHES))


def test_the_rest_resumes_from_any_position() -> None:
    tokens = HeldBack(GivenTokens(BATCHES), 6)
    whole = rows(tokens)
    for count in range(8):
        cursor = tokens.open()
        first = [next(cursor) for _ in range(count)]
        assert torch.equal(rows(chain(first, tokens.open(cursor.state_dict()))), whole)


def test_given_held_out_text_replaces_what_would_be_held_back() -> None:
    tokens = HeldBack(GivenTokens(BATCHES[:5]), 5, GivenTokens(BATCHES[5:]))
    assert torch.equal(rows(tokens), rows(BATCHES[:5])) and torch.equal(rows(tokens.held_out()), rows(BATCHES[5:])[:5])


def test_each_process_holds_back_a_part_of_its_own_text() -> None:
    parts = [HeldBack(GivenTokens(BATCHES), 3).shard(rank, 2) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert torch.equal(torch.cat([rows(part.held_out()), rows(part)]), rows(BATCHES[rank::2]))


def test_nothing_is_held_back_from_a_short_text() -> None:
    assert can_hold_back(GivenTokens(BATCHES), 4) and not can_hold_back(GivenTokens(BATCHES), 5)


def test_padded_text_is_held_back_by_sequences() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    text = TextTokens([f"import {name}" for name in "abcdefgh"], tokenizer, sequences_per_batch=3, packing=False)
    tokens = HeldBack(text, 4)
    ids = [each["input_ids"] for each in tokens.held_out()]
    assert sum(map(len, ids)) == 4 and sum(len(each["input_ids"]) for each in tokens) == 4


class TestInTheTrainer:
    def made(self, arguments: Any, names: tuple[str, ...] = ("gated",), **changes: Any) -> SAETrainer:
        model = tiny_model("gpt2")
        torch.manual_seed(0)
        saes = {name: build(name, 32, site="resid_post.1") for name in names}
        stream = ModelActivations(model, "resid_post.1", BATCHES, buffer_size=256)
        settings = {"max_steps": 10, "evaluations": 3, **changes.pop("settings", {})}
        given = saes if len(saes) > 1 else saes[names[0]]
        return quiet(SAETrainer(given, arguments(**settings), stream, **changes))

    def test_the_last_measurement_is_that_of_the_finished_sae(self, arguments: Any) -> None:
        trainer = self.made(arguments, eval_dataset=BATCHES[:2])
        trainer.train()
        lines = [line for line in trainer.state.log_history if "eval_loss_recovered" in line]
        assert [line["step"] for line in lines] == [4, 7, 10]
        sae = trainer.trainees[""].sae
        found = evaluate(trainer.stream.model, sae, BATCHES[:2])
        assert lines[-1]["eval_fvu"] == pytest.approx(found.metrics.fvu, rel=1e-4)
        assert lines[-1]["eval_loss_spliced"] == pytest.approx(found.loss_spliced, rel=1e-5)
        assert lines[-1]["eval_loss_clean"] == lines[0]["eval_loss_clean"]
        assert lines[-1]["eval_fvu"] < lines[0]["eval_fvu"]

    @pytest.mark.parametrize("names", [("gated",), ("batch_topk",), ("jumprelu", "gated")])
    def test_measuring_does_not_change_what_is_learned(self, arguments: Any, names: tuple[str, ...]) -> None:
        weights = []
        for dataset in (None, BATCHES[:2]):
            trainer = self.made(arguments, names, eval_dataset=dataset)
            trainer.train()
            weights.append([each.sae.state_dict() for each in trainer.trainees.values()])
            assert all(each.sae.training is False for each in trainer.trainees.values())
        for before, after in zip(*weights, strict=True):
            assert all(torch.equal(before[name], after[name]) for name in before)

    def test_each_of_several_saes_is_measured_under_its_name(self, arguments: Any) -> None:
        trainer = self.made(arguments, ("jumprelu", "gated"), eval_dataset=BATCHES[:1])
        trainer.train()
        last = trainer.state.log_history[-2]
        assert {"eval_gated/fvu", "eval_jumprelu/loss_recovered"} <= {*last}

    def test_evaluate_can_be_called_at_any_time(self, arguments: Any) -> None:
        trainer = self.made(arguments)
        with pytest.raises(InputError, match="pass eval_dataset="):
            trainer.evaluate()
        found = trainer.evaluate(BATCHES[:1])
        assert {"eval_loss_recovered", "eval_gamma", "eval_l0"} <= {*found}

    def test_text_without_a_model_is_refused(self, arguments: Any) -> None:
        with pytest.raises(InputError, match="Held-out text needs the model that reads it"):
            SAETrainer(build("gated", D_IN), arguments(), activations(500, seed=0), eval_dataset=BATCHES)

    def test_a_transcoder_is_refused_by_name(self, arguments: Any) -> None:
        sae = build("standard", 32, site="mlp_in.1", site_out="mlp_out.1", d_out=32, apply_b_dec_to_input=False)
        stream = ModelActivations(tiny_model("gpt2"), ["mlp_in.1", "mlp_out.1"], BATCHES, buffer_size=256)
        with pytest.raises(InputError, match="is a transcoder"):
            SAETrainer(sae, arguments(), stream, eval_dataset=BATCHES)


class TestInARun:
    def test_the_curve_is_in_the_card(self, small: dict[str, Any]) -> None:
        run = Run.prepare(assemble(small))
        run.train(quiet=True)
        folder = save_trained(run)[""]
        curve = read_facts(folder).curve
        assert [row["step"] for row in curve] == [1, 2, 3, 4]
        assert all(0 < row["loss_clean"] < 20 for row in curve)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "### On held-out text" in card and "| held-out tokens | 1,024 |" in card
        [line] = [line for line in card.splitlines() if line.startswith("| 4 | 128 |")]
        assert f"{curve[-1]['loss_recovered']:.4g}" in line

    def test_held_out_text_is_not_learned(self, small: dict[str, Any]) -> None:
        tokens = Run.prepare(assemble(small)).parts.stream.tokens
        held = {tuple(row) for batch in tokens.held_out() for row in batch["input_ids"].tolist()}
        learned = {tuple(row) for batch in tokens for row in batch["input_ids"].tolist()}
        assert len(held) == 32 and not held & learned

    def test_nothing_is_held_back_if_a_process_would_lack_text(self, small: dict[str, Any]) -> None:
        parts = Run.prepare(assemble(small)).parts
        tokens = parts.stream.tokens
        for processes, held_back in ((1, True), (64, False)):
            again = with_held_out(parts.config.data, tokens.tokens, parts.tokenizer, parts.model, processes)
            assert isinstance(again, HeldBack) is held_back

    def test_held_out_text_can_be_given(self, small: dict[str, Any], tmp_path: Path) -> None:
        other = tmp_path / "other.txt"
        other.write_text("\n".join(corpus.texts("held_out", 5_000)), encoding="utf-8")
        small["data"] |= {"held_out": str(other), "held_out_tokens": 64}
        run = Run.prepare(assemble(small))
        run.train(quiet=True)
        card = (save_trained(run)[""] / "README.md").read_text(encoding="utf-8")
        assert "| held-out text | other.txt |" in card and str(tmp_path) not in card
        facts = json.loads((run.folder("") / "sae_metrics.json").read_text())
        assert len(facts["curve"]) == 4
        small["data"]["held_out"] = str(tmp_path / "nowhere.txt")
        with pytest.raises(MissingFileError, match="nowhere.txt"):
            Run.prepare(assemble({**small, "output_dir": str(tmp_path / "again")}))

    def test_a_transcoder_is_trained_without_a_curve(self, small: dict[str, Any]) -> None:
        small["sae"] |= {"site": "mlp_in.1", "site_out": "mlp_out.1"}
        run = Run.prepare(assemble(small))
        run.train(quiet=True)
        assert not read_facts(save_trained(run)[""]).curve

    def test_invalid_settings_are_refused(self, small: dict[str, Any]) -> None:
        for given, said in (
            ({"held_out_tokens": -1}, "data.held_out_tokens is -1; expected at least 0"),
            ({"held_out": "x.txt", "held_out_tokens": 0}, "remove one of them"),
            ({"sequences_per_batch": 0}, "data.sequences_per_batch is 0; expected at least 1"),
        ):
            with pytest.raises(InputError, match=said):
                assemble({**small, "data": {**small["data"], **given}})
