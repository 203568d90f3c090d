"""Outliers, activations of enormous norm, are counted, but neither learned nor recorded."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from hf_gated_sae.errors import CheckpointError, InputError, TrainingError
from hf_gated_sae.evaluation import evaluate
from hf_gated_sae.functional.outliers import OUTLIER_MULTIPLE, is_outlier, largest_share, norm_limit
from hf_gated_sae.hooks import save_activations
from hf_gated_sae.modeling import SAEModel
from hf_gated_sae.publishing.trained import save_trained
from hf_gated_sae.training import ModelActivations, SAETrainer, ShardActivations, TensorActivations
from hf_gated_sae.training.run import Run, assemble
from hf_gated_sae.training.statistics import measure
from tests.support.tiny_models import tiny_model

from .runs import log, trainer, weights
from .test_resume import StopAt
from .test_trainer import quiet
from .worlds import D_IN, activations, build

pytestmark = pytest.mark.slow

SINK = 5000.0


def with_sinks(count: int = 700, every: int = 100, scale: float = 3.0) -> torch.Tensor:
    """Return activations; one in `every` has about a thousand times the norm of the others, in one direction."""
    x = activations(count, seed=0, scale=scale)
    x[::every] = 0
    x[::every, 0] = SINK * scale
    return x


def test_the_norm_limit():
    x = with_sinks()
    limit = norm_limit(x)
    assert limit == pytest.approx(OUTLIER_MULTIPLE * float(x.norm(dim=-1).median()))
    assert is_outlier(x, limit).nonzero().flatten().tolist() == list(range(0, 700, 100))
    assert not is_outlier(x, None).any() and norm_limit(torch.zeros(5, 3)) is None
    assert largest_share(x) > 0.98 and largest_share(activations(700, seed=0)) < 0.2


def test_statistics_leave_outliers_out():
    x = with_sinks()
    ordinary = x[~is_outlier(x, norm_limit(x))]
    found, expected = measure(x.split(64), outlier_multiple=10.0), measure([ordinary])
    assert (found.count, found.norm_limit) == (693, norm_limit(x)) and expected.norm_limit is None
    assert found.mean_square_norm == pytest.approx(expected.mean_square_norm)
    assert torch.allclose(found.centre, expected.centre)


def test_outliers_are_neither_learned_nor_recorded_but_counted(arguments, tmp_path):
    x = with_sinks()
    sae = build("gated", D_IN)
    quiet(SAETrainer(sae, arguments(), x)).train()
    assert sae.config.norm_limit == norm_limit(x) and sae.config.norm_limit_out is None
    ordinary = x[~is_outlier(x, sae.config.norm_limit)]
    assert sae.config.recorded_tokens == len(ordinary)
    assert torch.allclose(sae.max_activation, sae.encode(ordinary).amax(0).detach(), atol=1e-4)
    assert sae.b_dec.norm() < x.norm(dim=-1).median()  # with outliers the mean would be seven times as long
    facts = json.loads((tmp_path / "run" / "training_facts.json").read_text())
    assert facts["training"]["norm_limit"] == sae.config.norm_limit
    assert 3 <= facts["training"]["outliers_left_out"] <= 10  # 10 batches of 64
    metrics = facts["metrics"]
    assert metrics["outliers"] == 7 and metrics["outlier_variance"] > 0.99
    assert 0 < metrics["fvu_with_outliers"] != metrics["fvu"]
    assert SAEModel.from_pretrained(tmp_path / "run").config.norm_limit == sae.config.norm_limit


def test_outliers_can_be_learned_with_a_warning(arguments, caplog):
    sae = build("gated", D_IN)
    with caplog.at_level(logging.WARNING):
        quiet(SAETrainer(sae, arguments(outlier_multiple=None, activation_batch_size=350), with_sinks())).train()
    assert sae.config.norm_limit is None and sae.config.recorded_tokens == 700
    said = [each.getMessage() for each in caplog.records if "One percent" in each.getMessage()]
    assert len(said) == 1 and "% of its variance" in said[0] and "Use outlier_multiple=10" in said[0]


def test_no_warning_if_outliers_are_left_out(arguments, caplog):
    quiet(SAETrainer(build("gated", D_IN), arguments(activation_batch_size=350), with_sinks())).train()
    assert "One percent" not in caplog.text


def test_without_outliers_the_multiple_changes_nothing(arguments):
    x, trained = activations(700, seed=0), []
    for multiple in (10.0, None):
        trained.append(build("gated", D_IN))
        quiet(SAETrainer(trained[-1], arguments(outlier_multiple=multiple), x)).train()
    for one, other in zip(trained[0].state_dict().values(), trained[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("step", [5, 18])
def test_a_resumed_run_leaves_out_the_same_outliers(tmp_path, step):
    def stream() -> TensorActivations:
        return TensorActivations(with_sinks(scale=20.0), seed=0)

    trainer(tmp_path / "whole", stream=stream()).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "parts", StopAt(step), stream=stream()).train()
    trainer(tmp_path / "parts", stream=stream()).train(resume_from_checkpoint=True)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "parts").items())
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    for name in ("gated", "a/standard"):
        each = [SAEModel.from_pretrained(tmp_path / run / name).config for run in ("whole", "parts")]
        values = [{**config.to_dict(), "_name_or_path": ""} for config in each]
        assert values[0] == values[1] and each[0].norm_limit
        facts = [json.loads((tmp_path / run / name / "training_facts.json").read_text()) for run in ("whole", "parts")]
        assert facts[0]["training"]["outliers_left_out"] == facts[1]["training"]["outliers_left_out"] > 5


def test_a_transcoder_has_a_limit_at_both_sites(arguments):
    x, y = activations(700, seed=0), activations(700, seed=1)
    x[3], y[5] = 1e5, 1e5
    sae = build("standard", D_IN, site="resid_mid.0", site_out="mlp_out.0", d_out=D_IN, apply_b_dec_to_input=False)
    stream = TensorActivations({"resid_mid.0": x, "mlp_out.0": y}, seed=0)
    quiet(SAETrainer(sae, arguments(), stream)).train()
    assert (sae.config.norm_limit, sae.config.norm_limit_out) == (norm_limit(x), norm_limit(y))
    assert sae.config.recorded_tokens == 698


def test_a_batch_of_outliers_alone_stops_the_run(arguments):
    made = quiet(SAETrainer(build("gated", D_IN), arguments(activation_batch_size=1), with_sinks(every=3)))
    with pytest.raises(TrainingError, match="all 1 activations of the batch have norms above"):
        made.train()


def test_a_multiple_below_one_is_refused(arguments):
    with pytest.raises(InputError, match="outlier_multiple is 0.5; expected a number of at least 1"):
        arguments(outlier_multiple=0.5)


def sink_model():
    """Return a tiny GPT-2 that gives token 7 an activation of enormous norm."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[7] *= 1000
    return model


@pytest.mark.parametrize("special_tokens", [False, True])
def test_training_and_evaluate_record_the_same(arguments, special_tokens):
    model, site = sink_model(), "resid_pre.1"
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 97, (4, 32), generator=generator) for _ in range(8)]
    sae = build("gated", 32, site=site)
    stream = ModelActivations(model, site, batches, buffer_size=256, special_tokens=special_tokens)
    quiet(SAETrainer(sae, arguments(recorded_activations=10_000), stream)).train()
    config = sae.config
    recorded = {**config.to_dict()}
    strengths = sae.max_activation.clone(), sae.mean_activation.clone()
    assert config.special_token_ids == ([] if special_tokens else [0, 1, 2])
    assert config.norm_limit is not None and config.recorded_tokens < 1024
    with pytest.warns(UserWarning):
        report = evaluate(model, sae, batches, record=True)
    assert report.metrics.outliers == sum(int((batch == 7).sum()) for batch in batches) > 5
    again = config.to_dict()
    for name in ("recorded_fvu", "recorded_l0", "recorded_norm"):
        assert again.pop(name) == pytest.approx(recorded.pop(name), rel=1e-4)
    assert again == recorded  # including tokens, special tokens and limit
    assert torch.allclose(sae.max_activation, strengths[0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(sae.mean_activation, strengths[1], rtol=1e-4, atol=1e-5)


def test_a_run_is_not_resumed_with_other_special_tokens(arguments, tmp_path):
    model = tiny_model("gpt2")
    batches = [torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    settings = {"save_strategy": "steps", "save_steps": 5, "recorded_activations": 0}

    def made(sae: SAEModel) -> SAETrainer:
        return quiet(
            SAETrainer(sae, arguments(**settings), ModelActivations(model, "resid_post.1", batches, buffer_size=256))
        )

    made(build("gated", 32, site="resid_post.1")).train()
    model.generation_config.pad_token_id = 40
    with pytest.raises(
        CheckpointError, match=r"without the tokens \[0, 1, 2\], and this run leaves out \[0, 1, 2, 40\]"
    ):
        made(build("gated", 32, site="resid_post.1")).train(resume_from_checkpoint=True)


def test_a_run_file_leaves_outliers_out_and_its_card_says_so(small, tmp_path):
    assert assemble(small).training.get("outlier_multiple", OUTLIER_MULTIPLE) == 10.0
    changes = {"outlier_multiple": 1.5, "recorded_activations": 1000}
    run = Run.prepare(assemble({**small, "training": {**small["training"], **changes}}))
    run.train(quiet=True)
    folder = save_trained(run)[""]
    sae, card = run.saes[""], (Path(folder) / "README.md").read_text(encoding="utf-8")
    assert sae.config.norm_limit and sae.config.special_token_ids
    metrics = json.loads((Path(folder) / "sae_metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["outliers"] > 0 and metrics["fvu_with_outliers"] != metrics["fvu"]
    for name in ("outliers", "fvu_with_outliers", "relative_reconstruction_bias_with_outliers"):
        assert f"| `{name}` |" in card
    assert "outliers left out" in card
    off = assemble({**small, "training": {**small["training"], "outlier_multiple": None}})
    assert off.training["outlier_multiple"] is None


def test_shards_record_which_tokens_were_left_out(arguments, tmp_path):
    model, site = sink_model(), "resid_pre.1"
    batches = [torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(n)) for n in range(8)]
    kept = save_activations(tmp_path / "all", model, site, batches, special_tokens=True)
    some = save_activations(tmp_path / "some", model, site, batches, special_ids=[1, 5], norm_limit=20.0)
    assert ShardActivations(kept).special_ids == () and ShardActivations(some).special_ids == (1, 5)
    assert some.index["norm_limit"] == 20.0 and len(some) < len(kept) == 8 * 128
    del kept.index["special_token_ids"]  # as in shards of older versions
    assert ShardActivations(kept).special_ids is None
    sae = build("gated", 32, site=site)
    quiet(SAETrainer(sae, arguments(), ShardActivations(some))).train()
    assert sae.config.special_token_ids == [1, 5]
