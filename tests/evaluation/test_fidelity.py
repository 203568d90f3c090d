from __future__ import annotations

import json
import math
import warnings

import peft
import pytest
import torch
from torch.nn import functional as F

from hf_gated_sae.architectures.standard import StandardSAE, StandardSAEConfig
from hf_gated_sae.errors import InputError, SAEError
from hf_gated_sae.evaluation import FidelityReport, evaluate
from hf_gated_sae.hooks import attach, capture
from hf_gated_sae.interventions import AblateSite, Splice
from tests.support.tiny_models import tiny_model

D = 32
SITE = "resid_post.1"


def sae_with(W_enc: torch.Tensor, W_dec: torch.Tensor) -> StandardSAE:
    config = StandardSAEConfig(d_in=D, d_sae=len(W_dec), site=SITE, base_model="tiny", base_model_revision="abc")
    sae = StandardSAE(config).eval()
    sae.W_enc_T.data.copy_(W_enc)
    sae.W_dec.data.copy_(W_dec)
    return sae


def identity_sae() -> StandardSAE:
    """Return an SAE with two latents per dimension, for its positive and its negative part."""
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    return sae_with(both, both)


def zero_sae() -> StandardSAE:
    return sae_with(torch.zeros(4, D), torch.zeros(4, D))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")  # bos 1, eos 2, pad 0


@pytest.fixture(scope="module")
def batches():
    ids = torch.randint(3, 97, (6, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    ids[1, 7] = 2
    attention = torch.ones_like(ids)
    attention[3, 12:] = 0
    return [{"input_ids": i, "attention_mask": a} for i, a in zip(ids.split(2), attention.split(2), strict=True)]


@pytest.fixture(autouse=True)
def no_surprise_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Loss recovered is|Zero-ablating)")
        yield


def test_a_perfect_sae_recovers_all_of_the_loss(model, batches):
    report = evaluate(model, identity_sae(), batches)
    assert report.loss_recovered == pytest.approx(1.0, abs=1e-4)
    assert report.metrics.fvu < 1e-10
    assert report.metrics.relative_reconstruction_bias == pytest.approx(1.0)
    assert report.metrics.l0 == pytest.approx(D)


def test_an_sae_that_writes_zeros_recovers_nothing(model, batches):
    report = evaluate(model, zero_sae(), batches)
    assert report.loss_recovered == pytest.approx(0.0, abs=1e-6)
    assert report.loss_spliced == pytest.approx(report.loss_zero_ablated)
    assert report.metrics.l0 == 0 and report.metrics.dead_fraction == 1
    assert math.isnan(report.metrics.relative_reconstruction_bias)


def test_every_number_is_over_the_same_tokens(model, batches):
    """Losses and metrics equal a plain computation over real, non-special tokens and nothing else."""
    torch.manual_seed(0)
    sae = sae_with(torch.randn(64, D) * 0.2, F.normalize(torch.randn(64, D), dim=-1))
    report = evaluate(model, sae, batches)
    losses = {"clean": 0.0, "spliced": 0.0, "zero": 0.0}
    predicted, x = 0, []
    for batch in batches:
        ids, keep = batch["input_ids"], (batch["attention_mask"] == 1) & (batch["input_ids"] > 2)
        x.append(capture(model, SITE, **batch)[SITE][keep])
        for name, what in (("clean", ()), ("spliced", (Splice(sae),)), ("zero", (AblateSite(SITE),))):
            handle = attach(model, *what) if what else None
            if handle:
                handle.enable()
            with torch.no_grad():
                log_probs = model(**batch).logits.log_softmax(-1)
            if handle:
                handle.disable()
            for row in range(len(ids)):
                for t in range(ids.shape[1] - 1):
                    if keep[row, t] and keep[row, t + 1]:
                        losses[name] -= log_probs[row, t, ids[row, t + 1]].item()
                        predicted += name == "clean"
    x = torch.cat(x)
    with torch.no_grad():
        output = sae(x)
    assert report.loss_tokens == predicted == 6 * 18 - 2 - 8
    assert report.tokens == len(x) == 6 * 19 - 1 - 8
    assert report.tokens_left_out == 6 + 1 + 8
    assert report.loss_clean == pytest.approx(losses["clean"] / predicted, rel=1e-6)
    assert report.loss_spliced == pytest.approx(losses["spliced"] / predicted, rel=1e-6)
    assert report.loss_zero_ablated == pytest.approx(losses["zero"] / predicted, rel=1e-6)
    assert report.metrics.l0 == pytest.approx((output.latents > 0).float().sum(-1).mean().item())
    assert report.density == pytest.approx((output.latents > 0).float().mean(0).tolist())
    assert report.max_activation == pytest.approx(output.latents.amax(0).tolist(), rel=1e-5)
    assert report.mean_activation == pytest.approx(output.latents.mean(0).tolist(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("settings", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_do_not_count(batches, settings):
    torch.manual_seed(0)
    tuned = peft.get_peft_model(tiny_model("llama"), settings(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    report = evaluate(tuned, identity_sae(), batches)
    loss, predicted, tokens = 0.0, 0, 0
    for batch in batches:
        ids, keep = batch["input_ids"], (batch["attention_mask"] == 1) & (batch["input_ids"] > 2)
        with torch.no_grad():
            log_probs = tuned(**batch).logits[:, -ids.shape[1] :].log_softmax(-1)
        both = keep[:, :-1] & keep[:, 1:]
        loss -= log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][both].sum().item()
        predicted, tokens = predicted + int(both.sum()), tokens + int(keep.sum())
    assert report.loss_tokens == predicted and report.tokens == tokens
    assert report.loss_clean == pytest.approx(loss / predicted, rel=1e-5)
    assert report.metrics.fvu < 1e-10 and report.loss_recovered == pytest.approx(1.0, abs=1e-4)


def test_the_report_does_not_depend_on_the_batching(model, batches):
    sae = sae_with(torch.randn(64, D, generator=torch.Generator().manual_seed(0)) * 0.2, torch.ones(64, D) / 8)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    attention = torch.cat([batch["attention_mask"] for batch in batches])
    whole = evaluate(model, sae, [{"input_ids": ids, "attention_mask": attention}]).to_dict()
    parts = evaluate(model, sae, batches).to_dict()
    metrics, expected = parts.pop("metrics"), whole.pop("metrics")
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert parts.pop("warnings") and whole.pop("warnings")
    for name, value in whole.items():
        same = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
        assert parts[name] == same, name


def test_plain_token_ids_are_enough(model, batches):
    ids = batches[0]["input_ids"]
    plain = evaluate(model, identity_sae(), [ids])
    assert plain == evaluate(model, identity_sae(), [{"input_ids": ids, "labels": ids}])
    assert plain.base_model == "tiny" and plain.base_model_revision == "abc" and plain.site == SITE


def test_nothing_is_left_on_the_model(batches):
    model = tiny_model("llama").train()

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]

    before = hooks()
    evaluate(model, identity_sae(), batches[:1])
    assert hooks() == before and model.training
    with pytest.raises(SAEError):
        evaluate(model, identity_sae(), [*batches[:1], torch.zeros(1, 2, 3, dtype=torch.long)])
    assert hooks() == before and model.training


def test_statistics_are_recorded_on_request_only(model, batches):
    sae = identity_sae()
    evaluate(model, sae, batches)
    assert sae.config.recorded_tokens == 0
    report = evaluate(model, sae, batches, record=True)
    assert sae.config.recorded_tokens == report.tokens
    assert tuple(sae.max_activation.tolist()) == report.max_activation
    assert tuple(sae.mean_activation.tolist()) == report.mean_activation


def test_progress_counts_activations(model, batches):
    seen = []
    report = evaluate(model, identity_sae(), batches, progress=seen.append)
    assert len(seen) == 3 and seen == sorted(seen) and seen[-1] == report.tokens


def test_a_loss_recovered_above_one_is_reported_with_a_warning():
    """In a random model, zeros or half of an MLP's output may give a lower loss than the output itself."""
    model = tiny_model("llama")
    batches = [torch.randint(3, 97, (4, 30), generator=torch.Generator().manual_seed(1))]
    half = identity_sae()
    half.W_dec.data.mul_(0.5)
    outcomes = {}
    for layer in range(3):
        half.config.site = f"mlp_out.{layer}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = evaluate(model, half, batches)
        said = [str(warning.message) for warning in caught if "oss recovered" in str(warning.message)]
        assert tuple(said) == report.warnings
        gap = report.loss_zero_ablated - report.loss_clean
        assert report.loss_recovered == pytest.approx((report.loss_zero_ablated - report.loss_spliced) / gap)
        outcomes[layer] = report
        assert any("above 1" in note for note in said) == (report.loss_recovered > 1)
        assert any("is unreliable" in note for note in said) == (gap < 0.02)
    assert any(report.warnings for report in outcomes.values())


@pytest.mark.parametrize("batch", [torch.tensor([[1, 5]]), torch.tensor([[1, 2]])])
def test_text_with_nothing_to_predict_is_refused(model, batch):
    with pytest.raises(InputError, match="at least two tokens"):
        evaluate(model, identity_sae(), [batch])


def test_a_transcoder_is_refused(model, batches):
    sae = StandardSAE(StandardSAEConfig(d_in=D, d_out=16, d_sae=8, site=SITE, apply_b_dec_to_input=False))
    with pytest.raises(InputError, match="d_out = 16"):
        evaluate(model, sae, batches)


def test_an_sae_without_a_site_is_refused(model, batches):
    sae = identity_sae()
    sae.config.site = None
    with pytest.raises(InputError, match="site"):
        evaluate(model, sae, batches)


def test_a_report_survives_json(model, batches):
    for sae in (identity_sae(), zero_sae()):  # the second has undefined ratios
        report = evaluate(model, sae, batches)
        stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        restored = FidelityReport.from_dict(stored)
        assert restored.to_dict() == report.to_dict()
        assert isinstance(restored.density, tuple)
        assert math.isnan(restored.metrics.cosine) == math.isnan(report.metrics.cosine)
    assert evaluate(model, zero_sae(), batches).to_dict(per_latent=False)["density"] == []


def test_a_broken_stored_report_is_refused(model, batches):
    values = evaluate(model, identity_sae(), batches).to_dict()
    with pytest.raises(InputError, match="Did you mean 'loss_clean'"):
        FidelityReport.from_dict({**values, "loss_claen": 1.0})
    with pytest.raises(InputError, match="lacks 'loss_clean'"):
        FidelityReport.from_dict({name: value for name, value in values.items() if name != "loss_clean"})
    with pytest.raises(InputError, match="expected a mapping"):
        FidelityReport.from_dict({**values, "metrics": 3})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_on_the_left_changes_no_number(family):
    """Position ids follow the mask, as in `generate`; GPT-2 by itself would count padding."""
    model, generator = tiny_model(family), torch.Generator().manual_seed(0)
    ids, attention = torch.zeros(4, 12, dtype=torch.long), torch.zeros(4, 12, dtype=torch.long)
    rows = [torch.randint(3, 97, (length,), generator=generator) for length in (12, 7, 9, 4)]
    for number, row in enumerate(rows):
        ids[number, 12 - len(row) :], attention[number, 12 - len(row) :] = row, 1
    torch.manual_seed(0)
    sae = sae_with(torch.randn(64, D) * 0.2, F.normalize(torch.randn(64, D), dim=-1))
    padded = evaluate(model, sae, [{"input_ids": ids, "attention_mask": attention}])
    alone = evaluate(model, sae, [row[None] for row in rows])
    assert padded.loss_clean == pytest.approx(alone.loss_clean, rel=1e-5)
    assert padded.loss_spliced == pytest.approx(alone.loss_spliced, rel=1e-5)
    assert padded.metrics.fvu == pytest.approx(alone.metrics.fvu, rel=1e-5)


@pytest.fixture
def sink():
    """A model that gives token 7 an activation of enormous norm, in one direction."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[7, 0] = 1e5
    return model


@pytest.fixture
def with_sinks():
    ids = torch.randint(8, 97, (4, 60), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = ids[2, 40] = 7
    return ids


def sae_of(site: str) -> StandardSAE:
    """Return an SAE that reads and writes the direction of the outliers alone."""
    one = torch.zeros(4, D)
    one[0, 0] = 1.0
    sae = sae_with(one, one)
    sae.config.site = site
    return sae


@pytest.mark.parametrize("split", [1, 2, 4])
def test_outliers_are_measured_separately(sink, with_sinks, split):
    site = "resid_pre.0"
    sae = sae_of(site)
    x = capture(sink, site, input_ids=with_sinks)[site].reshape(-1, D)
    limit = 10 * x.norm(dim=-1).median()
    ordinary = x[x.norm(dim=-1) <= limit]
    with torch.no_grad():
        every, few = sae(x), sae(ordinary)
    with pytest.warns(UserWarning, match="2 of 240 activations at resid_pre.0 have a norm above .* and hold 100.0%"):
        report = evaluate(sink, sae, with_sinks.split(split), record=True)
    metrics = report.metrics
    assert report.norm_limit == pytest.approx(float(limit)) and len(ordinary) == 238 == metrics.tokens == report.tokens
    assert metrics.outliers == 2 and metrics.outlier_variance > 0.999
    assert "2 activations with a norm above" in report.positions_left_out

    def fvu(x, y):
        return float((x - y).double().square().sum() / (x - x.mean(0)).double().square().sum())

    assert metrics.fvu == pytest.approx(fvu(ordinary, few.reconstruction), rel=1e-5) and metrics.fvu > 0.9
    assert metrics.fvu_with_outliers == pytest.approx(fvu(x, every.reconstruction), rel=1e-4)
    assert metrics.fvu_with_outliers < 1e-4
    with_all = float(every.reconstruction.square().sum() / (every.reconstruction * x).sum())
    assert metrics.relative_reconstruction_bias_with_outliers == pytest.approx(with_all)
    assert max(report.max_activation) == pytest.approx(float(few.latents.max())) and every.latents.max() > 9e4
    assert sae.max_activation.max() == pytest.approx(float(few.latents.max()))
    assert sae.config.norm_limit == report.norm_limit and sae.config.special_token_ids == [0, 1, 2]
    assert sae.config.recorded_fvu == metrics.fvu and sae.config.recorded_tokens == 238


def test_a_recorded_limit_holds_for_other_text(sink, with_sinks):
    sae = sae_of("resid_pre.0")
    x = capture(sink, "resid_pre.0", input_ids=with_sinks)["resid_pre.0"].reshape(-1, D).norm(dim=-1)
    sae.config.norm_limit = float(x.median())
    report = evaluate(sink, sae, [with_sinks])
    assert report.norm_limit == float(x.median()) and report.metrics.outliers == int((x > x.median()).sum()) == 120


def test_outliers_can_be_included(sink, with_sinks):
    report = evaluate(sink, sae_of("resid_pre.0"), [with_sinks], outlier_multiple=None)
    assert report.norm_limit is None and report.metrics.outliers == 0 and report.tokens == 240
    assert report.metrics.fvu == report.metrics.fvu_with_outliers < 1e-4


def test_without_outliers_both_numbers_are_equal(model, batches):
    metrics = evaluate(model, identity_sae(), batches).metrics
    assert metrics.outliers == 0 and metrics.outlier_variance == 0
    assert metrics.fvu == metrics.fvu_with_outliers
    assert metrics.relative_reconstruction_bias == metrics.relative_reconstruction_bias_with_outliers


def test_a_report_of_an_older_version_without_outliers_is_read(model, batches):
    stored = evaluate(model, identity_sae(), batches).to_dict()
    for name in ("special_token_ids", "norm_limit"):
        del stored[name]
    for name in ("outliers", "outlier_variance", "fvu_with_outliers", "relative_reconstruction_bias_with_outliers"):
        del stored["metrics"][name]
    restored = FidelityReport.from_dict(stored)
    assert restored.metrics.outliers == 0 and math.isnan(restored.metrics.fvu_with_outliers)


def test_a_batch_of_special_tokens_alone_changes_nothing(model, batches):
    alone = evaluate(model, identity_sae(), batches)
    more = evaluate(model, identity_sae(), [*batches, torch.tensor([[1, 2, 1]])])
    assert more.loss_spliced == alone.loss_spliced and more.tokens == alone.tokens
    assert more.tokens_left_out == alone.tokens_left_out + 3
