"""The check that attach() makes of an SAE before attaching it."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gated_sae import Ablate, SAEModel, Splice, attach, capture, evaluate, resolve
from hf_gated_sae.architectures.cross_layer import CrossLayerSAE, CrossLayerSAEConfig
from hf_gated_sae.architectures.topk import TopKSAE, TopKSAEConfig
from hf_gated_sae.demo.bundled import MODEL, SAES
from hf_gated_sae.errors import InputError, SiteError
from hf_gated_sae.hooks import AttachCheck
from hf_gated_sae.hub.origin import Origin
from tests.hooks.support import IDS, make_sae, model_of
from tests.support.tiny_models import HIDDEN, VOCAB, tiny_model

BUNDLED = sorted(str(path.parent.relative_to(SAES)) for path in SAES.glob("*/*/config.json"))
TOKENS = torch.arange(3, 3 + 3 * 12).remainder(VOCAB).view(3, 12)


@pytest.fixture(scope="module")
def language_model():
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    resolve(model)  # so that tests count only the forwards of the check
    return model


def bundled(name):
    return SAEModel.from_pretrained(SAES / name)


def unrecorded(name):
    """A copy of the SAE without its checkpoint, and so without recorded metrics."""
    sae = bundled(name)
    copy = type(sae)(type(sae.config).from_dict(sae.config.to_dict())).eval()
    copy.load_state_dict(sae.state_dict())
    assert copy.checkpoint is None
    return copy


class Forwards:
    """Counts calls of a module."""

    def __init__(self, module):
        self.count = 0
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def attached(model, sae, **options):
    """Return the check of one SAE; warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [check] = attach(model, Splice(sae), **options).checks
    assert isinstance(check, AttachCheck)
    return check


# ------------------------------------------------------------------ trained SAEs of a model with a tokenizer


@pytest.mark.parametrize("name", BUNDLED)
def test_an_sae_fits_where_it_was_trained_with_the_recorded_metrics(language_model, name):
    check = attached(language_model, bundled(name))
    assert check.verdict == "it fits" and check.site == name.split("/")[0] and check.tokens > 100
    assert check.fvu == pytest.approx(check.expected_fvu, rel=0.3)
    assert check.l0 == pytest.approx(check.expected_l0, rel=0.5)
    assert check.norm == pytest.approx(check.expected_norm, rel=0.3)


@pytest.mark.parametrize("name", BUNDLED)
def test_an_sae_without_recorded_metrics_fits_where_it_was_trained(language_model, name):
    check = attached(language_model, unrecorded(name))
    assert check.verdict == "it fits" and (check.expected_fvu, check.expected_l0, check.expected_norm) == (None,) * 3


@pytest.mark.parametrize("source", [bundled, unrecorded])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("resid_post.1/gated", "resid_post.2"),
        ("resid_post.1/gated", "mlp_out.1"),
        ("resid_post.1/standard", "attn_out.2"),
        ("mlp_out.2/gated", "mlp_out.1"),
        ("mlp_out.2/gated", "resid_post.2"),
        ("mlp_out.2/standard", "mlp_in.2"),
        ("mlp_out.2/standard", "model.layers.2.self_attn.output"),
    ],
)
def test_at_a_wrong_site_the_error_names_the_right_one(language_model, source, name, given):
    sae = source(name)
    sae.config.site = given
    right = name.split("/")[0]
    same = {right, "resid_pre.2"} if right == "resid_post.1" else {right}  # one tensor, two names
    with pytest.raises(SiteError, match="did you mean that site") as error:
        attach(language_model, Splice(sae))
    assert any(f"At '{place}'" in str(error.value) for place in same)
    assert f"does not fit {given}" in str(error.value) and "check=False" in str(error.value)
    attach(language_model, Splice(sae), check=False).enable().disable()
    with pytest.raises(SiteError, match="did you mean that site"):  # the result is remembered
        attach(language_model, Splice(sae))


def test_a_transform_that_the_sae_was_not_trained_on_is_an_error(language_model):
    sae = bundled("resid_post.1/gated")
    sae.config.site = "resid_post.1|unit_norm"
    with pytest.raises(SiteError, match="At 'resid_post.1' FVU is 0.1"):
        attach(language_model, Splice(sae))


def test_the_change_that_the_message_proposes_works(language_model):
    sae = bundled("mlp_out.2/gated")
    sae.config.site = "mlp_out.1"
    with pytest.raises(SiteError, match="Set sae.config.site = 'mlp_out.2'"):
        attach(language_model, Splice(sae))
    sae.config.site = "mlp_out.2"
    assert attached(language_model, sae).verdict == "it fits"


def test_the_check_runs_one_forward_up_to_the_next_layer_and_only_once(language_model):
    sae = bundled("resid_post.1/gated")
    with Forwards(language_model) as whole, Forwards(language_model.model.layers[3]) as beyond:
        first = attached(language_model, sae)
        assert (whole.count, beyond.count) == (1, 0)
        assert attached(language_model, sae) is first
        attach(language_model, Ablate(sae, [1]), Splice(sae))
        assert whole.count == 1
        with torch.no_grad():
            sae.b_dec.add_(0.1)  # changes the SAE
        assert attached(language_model, sae).fvu != first.fvu and whole.count == 2


def test_the_check_changes_nothing(language_model):
    sae = bundled("resid_post.1/gated")
    sae.config.site = "mlp_out.1"
    language_model.train()
    state = torch.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in language_model.modules()]
    try:
        with torch.inference_mode(), pytest.raises(SiteError):
            attach(language_model, Splice(sae))
        assert all(module.training for module in language_model.modules())
    finally:
        language_model.eval()
    assert torch.equal(state, torch.get_rng_state())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in language_model.modules()]
    assert not sae.training


def test_attached_interventions_neither_act_nor_count_during_the_check(language_model):
    first, second = bundled("resid_post.1/gated"), bundled("mlp_out.2/gated")
    expected = attached(language_model, bundled("mlp_out.2/gated"))
    with attach(language_model, Ablate(first, range(500)), all_threads=True) as handle:
        assert attached(language_model, second) == expected
        assert handle.report().interventions[0].calls == 0


def test_a_batch_can_be_given(language_model):
    sae = bundled("resid_post.1/gated")
    ids = torch.randint(3, 1000, (2, 40))
    padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded["attention_mask"][0, :10] = 0
    assert attached(language_model, sae, check=ids).tokens == 80
    assert attached(language_model, sae, check=padded).tokens == 70
    assert attach(language_model, Splice(sae), check=False).checks == ()


def test_an_sae_that_is_not_as_recorded_and_fits_nowhere_is_warned_about_once(language_model):
    sae = make_sae(d_in=language_model.config.hidden_size)
    sae.config.base_model, sae.config.recorded_fvu, sae.config.recorded_l0 = "some/other-model", 0.1, 900.0
    with pytest.warns(
        UserWarning, match=r"FVU .* \(recorded: 0.1\), L0 .* \(recorded: 900\).*'some/other-model'"
    ) as seen:
        attach(language_model, Splice(sae))
    assert [Path(each.filename).name for each in seen] == [Path(__file__).name]
    assert "differs from its record" in attached(language_model, sae).verdict


def test_an_sae_without_recorded_metrics_that_fits_nowhere_gives_no_warning(language_model):
    check = attached(language_model, make_sae(d_in=language_model.config.hidden_size))
    assert check.fvu > 1 and "no nearby site fits" in check.verdict


# ------------------------------------------------------------------ models without a tokenizer


def test_without_a_tokenizer_nothing_runs_and_the_verdict_says_so(tmp_path):
    model, sae = tiny_model("llama"), make_sae()
    attach(model, Splice(sae), check=False)  # proves sites and calls
    with Forwards(model) as forwards:
        check = attached(model, sae)
    assert forwards.count == 0
    assert (
        (check.tokens, check.fvu) == (0, None) and "not measured" in check.verdict and "check=batch" in check.verdict
    )
    model.save_pretrained(tmp_path)
    check = attached(AutoModelForCausalLM.from_pretrained(tmp_path), sae)
    assert "not measured" in check.verdict and str(tmp_path) in check.verdict


def test_an_sae_loaded_in_part_is_not_measured(tmp_path):
    make_sae().save_pretrained(tmp_path)
    few = SAEModel.from_pretrained(tmp_path, latents=[3, 5])
    [check] = attach(model_of("llama"), Ablate(few, [3]), check=IDS).checks
    assert "2 of 64 latents" in check.verdict


def memory(x, y, site, **place):
    """A TopK SAE with one latent per token, which maps each activation in `x` to that in `y`."""
    n, d_in = x.shape
    sae = TopKSAE(
        TopKSAEConfig(d_in=d_in, d_sae=n, d_out=y.shape[-1], k=1, site=site, apply_b_dec_to_input=False, **place)
    )
    with torch.no_grad():
        length = x.norm(dim=-1, keepdim=True)
        sae.W_enc_T.copy_(x / length)
        sae.W_dec.copy_(y / length)
    return sae.eval()


def gemma_with_wild_post_norms():
    """The post-norms' gains have both signs, so their outputs and inputs differ in direction."""
    model = tiny_model("gemma2")
    with torch.no_grad():
        for block in model.model.layers:
            block.post_feedforward_layernorm.weight.normal_(std=4.0)
    return model


@pytest.mark.parametrize(
    ("trained", "given", "what"),
    [
        ("mlp_out.1", "model.layers.1.mlp.output", "after the post-norm"),
        ("model.layers.1.mlp.output", "mlp_out.1", "before the block changes it"),
    ],
)
def test_the_two_sides_of_a_post_norm_are_distinguished(trained, given, what):
    model = gemma_with_wild_post_norms()
    x = capture(model, trained, input_ids=TOKENS)[trained].flatten(0, 1)
    assert attached(model, memory(x, x, trained), check=TOKENS).verdict == "it fits"
    with pytest.raises(SiteError, match=f"At '{trained}', .*{what}"):
        attach(model, Splice(memory(x, x, given)), check=TOKENS)


def test_both_sides_of_a_transcoder_are_checked():
    model = model_of("llama")
    seen = capture(model, ["mlp_in.1", "mlp_out.1"], input_ids=TOKENS)
    x, y = (seen[site].flatten(0, 1) for site in ("mlp_in.1", "mlp_out.1"))
    assert attached(model, memory(x, y, "mlp_in.1", site_out="mlp_out.1"), check=TOKENS).fvu < 1e-6
    with pytest.raises(SiteError, match="does not fit attn_out.1 to mlp_out.1.*sae.config.site = 'mlp_in.1'"):
        attach(model, Splice(memory(x, y, "attn_out.1", site_out="mlp_out.1")), check=TOKENS)
    with pytest.raises(SiteError, match="sae.config.site_out = 'mlp_out.1'"):
        attach(model, Splice(memory(x, y, "mlp_in.1", site_out="mlp_out.2")), check=TOKENS)


def test_a_transcoder_is_not_fed_its_own_output():
    model = model_of("llama")
    seen = capture(model, ["mlp_in.1", "mlp_out.1"], input_ids=TOKENS)
    x, y = (seen[site].flatten(0, 1) for site in ("mlp_in.1", "mlp_out.1"))
    both = "sae.config.site = 'mlp_in.1' and sae.config.site_out = 'mlp_out.1'"
    for given, change in (("mlp_out.1", both), ("mlp_in.1", "sae.config.site_out = 'mlp_out.1'")):
        with pytest.raises(SiteError, match=f"At 'mlp_in.1' to 'mlp_out.1' FVU is .*Set {change}, or"):
            attach(model, Splice(memory(x, y, given)), check=TOKENS)


def test_crosscoders_are_measured():
    sites = ["resid_post.0", "resid_post.1"]
    config = CrossLayerSAEConfig(
        d_in=HIDDEN, d_sae=64, sites=sites, sites_out=sites, latents_per_site=[32, 32], apply_b_dec_to_input=False
    )
    check = attached(model_of("llama"), CrossLayerSAE(config).eval(), check=TOKENS)
    assert check.tokens == TOKENS.numel() and check.fvu > 0 and check.site == "resid_post.0 .. resid_post.1"


@pytest.mark.parametrize("architecture", ["gated", "standard", "jumprelu", "topk", "batch_topk"])
def test_no_untrained_sae_of_a_random_model_gives_an_alarm(architecture):
    for family in ("gpt2", "gemma2"):
        for site in ("resid_post.1", "attn_out.1"):
            sae = make_sae(architecture, site=site, recorded=False)
            assert attached(model_of(family), sae, check=TOKENS).tokens > 0


def test_tokens_with_a_far_larger_norm_are_left_out():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENS[0, 0]] *= 1000
    assert attached(model, make_sae(site="embed"), check=TOKENS).tokens == TOKENS.numel() - 1


@pytest.mark.filterwarnings("ignore:Zero-ablating", "ignore:Loss recovered")
def test_what_was_measured_is_recorded_saved_and_expected(tmp_path):
    model, sae = model_of("llama"), make_sae(recorded=False)
    report = evaluate(model, sae, [TOKENS], record=True)
    sae.save_pretrained(tmp_path)
    check = attached(model, SAEModel.from_pretrained(tmp_path), check=TOKENS)
    assert (check.expected_fvu, check.expected_l0) == (report.metrics.fvu, report.metrics.l0)
    assert check.fvu == pytest.approx(check.expected_fvu) and check.l0 == pytest.approx(check.expected_l0)
    x = capture(model, sae.config.site, input_ids=TOKENS)[sae.config.site].flatten(0, 1)
    assert check.expected_norm == pytest.approx(float((x - x.mean(0)).square().sum(-1).mean().sqrt()), rel=1e-4)
    sae.record_statistics(sae.max_activation, sae.mean_activation, 5)  # on tokens where nothing else was measured
    assert sae.config.recorded_fvu is sae.config.recorded_norm is None


def test_the_check_runs_without_dropout():
    model, sae = tiny_model("gpt2"), make_sae()
    still = attached(model, sae, check=TOKENS)
    assert attached(model.train(), sae, check=TOKENS) == still and model.training


def test_l0_stated_by_other_publishers_is_expected():
    sae = make_sae()
    sae._origin = Origin("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", format="gemma_scope")
    assert attached(model_of("llama"), sae, check=TOKENS).expected_l0 == 82


@pytest.mark.parametrize("facts", ["{", "[]", '{"metrics": 5}', '{"metrics": {"fvu": "low", "l0": NaN, "mse": -1}}'])
def test_unusable_metrics_files_are_ignored(tmp_path, facts):
    make_sae().save_pretrained(tmp_path)
    (tmp_path / "sae_metrics.json").write_text(facts)
    check = attached(model_of("llama"), SAEModel.from_pretrained(tmp_path), check=TOKENS)
    assert (check.expected_fvu, check.expected_l0, check.expected_norm) == (None,) * 3 and check.tokens


@pytest.mark.parametrize("given", ["yes", 1.5, None, {"ids": TOKENS}, TOKENS.float(), TOKENS[:, :2]])
def test_a_check_that_is_not_a_batch_is_refused(given):
    with pytest.raises((InputError, ValueError)) as error:
        attach(model_of("llama"), Splice(make_sae()), check=given)
    assert type(error.value).__module__ == "hf_gated_sae.errors"


def test_weights_that_are_not_finite_are_refused():
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[:, 0] = float("inf")
    with pytest.raises(InputError, match="not finite"):
        attach(model_of("llama"), Splice(sae), check=TOKENS)
