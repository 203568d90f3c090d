"""The check of attach() measures the same kinds of tokens as the SAE's recorded metrics."""

import warnings

import pytest
import torch

from hf_gated_sae import Splice, attach, capture
from hf_gated_sae.architectures.topk import TopKSAE, TopKSAEConfig
from hf_gated_sae.functional import FidelityAccumulator
from hf_gated_sae.functional.outliers import is_outlier, norm_limit
from tests.support.tiny_models import HIDDEN, VOCAB, tiny_model

SINK = 5
BOS = 1
# 90 different tokens, one of them the sink; none is special.
TOKENS = torch.arange(3, 93).view(3, 30)
WITH_SPECIAL = torch.cat([torch.full((3, 1), BOS), TOKENS], 1)
assert int(TOKENS.max()) < VOCAB and (TOKENS == SINK).sum() == 1


@pytest.fixture(scope="module")
def model():
    """A model with one token whose activation is far larger than all others, as at an attention sink."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[SINK] *= 300
    return model


def activations(model, ids=TOKENS):
    return capture(model, "embed", input_ids=ids, special_tokens=True)["embed"].flatten(0, 1)


def half_known(model):
    """An SAE with one latent for every second token, the sink among them."""
    x = activations(model)[::2]
    sae = TopKSAE(TopKSAEConfig(d_in=HIDDEN, d_sae=len(x), k=4, site="embed", apply_b_dec_to_input=False))
    with torch.no_grad():
        sae.W_enc_T.copy_(x / x.norm(dim=-1, keepdim=True))
        sae.W_dec.copy_(x / x.norm(dim=-1, keepdim=True))
    return sae.eval()


def recorded(sae, x):
    """Record the SAE's metrics on some activations, and return it."""
    accumulator = FidelityAccumulator(sae.config.d_sae, sae.b_dec)
    with torch.no_grad():
        output = sae(x)
    accumulator.update(x, output.reconstruction, output.latents)
    sae.config.record(len(x), accumulator.compute())
    return sae


def check(model, sae, ids=TOKENS):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return attach(model, Splice(sae), check=ids).checks[0]


def test_a_record_that_counts_the_sink_gives_no_alarm(model):
    x = activations(model)
    sae = recorded(half_known(model), x)
    usual = float((x - x.mean(0))[~is_outlier(x, norm_limit(x))].square().sum(-1).mean().sqrt())
    assert sae.config.recorded_norm > 5 * usual  # far more than without the sink
    found = check(model, sae)
    assert found.verdict == "it fits, high-norm tokens counted as in its record"
    assert found.tokens == len(x) and found.norm == pytest.approx(sae.config.recorded_norm, rel=1e-4)
    short = check(model, sae, TOKENS[:, :15])  # the sink is one of fewer tokens, so the norm is larger
    assert short.norm > 1.2 * sae.config.recorded_norm and short.verdict.startswith("it fits")


def test_a_record_that_leaves_the_sink_out_is_compared_without_it(model):
    x = activations(model)
    sae = recorded(half_known(model), x[~is_outlier(x, norm_limit(x))])
    for sae.config.norm_limit in (None, norm_limit(x)):
        found = check(model, sae)
        assert found.verdict == "it fits" and found.tokens == len(x) - 1
        assert found.norm == pytest.approx(sae.config.recorded_norm, rel=1e-4)
        assert found.fvu == pytest.approx(sae.config.recorded_fvu, rel=1e-4)


def test_the_recorded_norm_limit_is_used(model):
    x = activations(model)
    limit = float(x.norm(dim=-1).quantile(0.8))
    sae = recorded(half_known(model), x[~is_outlier(x, limit)])
    sae.config.norm_limit = limit
    assert check(model, sae).tokens == int((x.norm(dim=-1) <= limit).sum()) < len(x) - 1


def test_a_norm_limit_for_activations_of_another_size_is_ignored(model):
    sae = half_known(model)
    sae.config.norm_limit = 1e-3
    assert check(model, sae).tokens == TOKENS.numel() - 1


def test_with_a_recorded_limit_a_norm_that_only_the_sink_explains_is_warned_about(model):
    x = activations(model)
    sae = recorded(half_known(model), x)
    sae.config.norm_limit = norm_limit(x)
    with pytest.warns(UserWarning, match=r"norm .* \(recorded: .*No nearby site fits better"):
        attach(model, Splice(sae), check=TOKENS)


def test_the_recorded_special_tokens_are_left_out_and_no_others(model):
    sae = half_known(model)
    sae.config.norm_limit = 1e9
    for ids, left_out in ((None, 3), ([], 0), ([BOS], 3), ([BOS, 4, 10], 5), ([4, 10], 2)):
        sae.config.special_token_ids = ids
        assert check(model, sae, WITH_SPECIAL).tokens == WITH_SPECIAL.numel() - left_out


def test_whether_special_tokens_count_is_inferred_from_the_recorded_norm(model):
    """The first token is special, and its activation is far larger than the others."""
    sink = tiny_model("llama")
    with torch.no_grad():
        sink.model.embed_tokens.weight[BOS] *= 300
    sae = recorded(half_known(sink), activations(sink, WITH_SPECIAL))
    assert check(sink, sae, WITH_SPECIAL).tokens == WITH_SPECIAL.numel()
    sae = recorded(half_known(sink), activations(sink, TOKENS))
    assert check(sink, sae, WITH_SPECIAL).tokens == TOKENS.numel()
