"""`attribute` agrees with autograd and with finite differences of latents, and leaves the model unchanged."""

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae import Clamp, ProjectOut, SAEModel, Steer, attach, attribute, capture
from hf_gated_sae.errors import AttachError, InputError, SAEError, ShapeError, SiteError, UnknownNameError
from tests.hooks.support import (
    ARCHITECTURES,
    D_SAE,
    IDS,
    block,
    checkpoint_layers,
    close,
    hooks_on,
    logits_of,
    make_cross_layer,
    make_sae,
    model_of,
)
from tests.support.tiny_models import HIDDEN, tiny_model

F64 = torch.float64


def logit_difference(output):
    return output.logits[0, -1, 7] - output.logits[1, -2, 9]


def dense_gradients(found, sae):
    live = found.activations[sae]
    dense = torch.zeros(live.shape, dtype=live.values.dtype).flatten(0, 1)
    dense[live.tokens, live.indices] = found.gradients[sae]
    return dense.reshape(live.shape)


def by_autograd(model, sae, x, module, metric=logit_difference):
    """Reference: splice decode(latents) + error into the model, with the latents as a leaf of autograd."""
    latents = sae.encode(x).detach().requires_grad_()
    error = (x - sae.decode(latents, x)).detach()

    def splice(_, __, output):
        new = (sae.decode(latents, x) + error).to(x.dtype)
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = module.register_forward_hook(splice)
    try:
        (gradient,) = torch.autograd.grad(metric(model(input_ids=IDS)), latents)
    finally:
        handle.remove()
    return latents.detach(), gradient


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_derivatives_are_those_of_autograd_through_the_spliced_sae(architecture):
    model, sae = model_of("gpt2", F64), make_sae(architecture, dtype=F64)
    x = capture(model, "resid_post.1", input_ids=IDS)["resid_post.1"]
    latents, gradient = by_autograd(model, sae, x, block(model, "gpt2"))
    found = attribute(model, sae, logit_difference, input_ids=IDS)
    assert torch.equal(found.activations[sae].dense(), latents) and (latents != 0).any()
    close(dense_gradients(found, sae), gradient * (latents != 0), 1e-11)
    close(found[sae].dense(), gradient * latents, 1e-11)
    close(found.per_latent(sae), (gradient * latents).sum((0, 1)), 1e-11)


@pytest.mark.parametrize("normalization", ["center", "layer_norm", "rms_norm", "unit_norm", "standardize"])
def test_derivatives_of_normalised_saes_are_those_of_autograd(normalization):
    model, sae = model_of("gpt2", F64), make_sae(normalization=normalization, dtype=F64)
    x = capture(model, "resid_post.1", input_ids=IDS)["resid_post.1"]
    latents, gradient = by_autograd(model, sae, x, block(model, "gpt2"))
    found = attribute(model, sae, logit_difference, input_ids=IDS)
    close(found[sae].dense(), gradient * latents, 1e-11)


def changed(model, sae, effect, amount):
    clamp = Clamp(sae, {effect.latent: effect.activation + amount}, positions=[effect.token], rows=[effect.row])
    with attach(model, clamp):
        output = model(input_ids=IDS)
    return logit_difference(output).item()


SAES = {
    "resid_post.0": make_sae(site="resid_post.0", dtype=F64),
    "resid_post.1": make_sae(dtype=F64),
    "with a transform": make_sae(site="resid_post.1|center|scale=0.5", dtype=F64),
    "mlp_out.0": make_sae(site="mlp_out.0", dtype=F64),
    "attn_z.1": make_sae(site="attn_z.1", dtype=F64),
    "transcoder": make_sae(site="mlp_in.1", site_out="mlp_out.1", dtype=F64),
    "cross-layer transcoder": make_cross_layer(dtype=F64),
    "cross-layer transcoder, relu": make_cross_layer(activation="relu", dtype=F64),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SAES)
def test_gradients_agree_with_finite_differences(name):
    model, sae, step = model_of("gpt2", F64), SAES[name], 1e-5
    with torch.enable_grad():
        effects = attribute(model, sae, logit_difference, input_ids=IDS).top(4)
    assert len(effects) == 4
    for effect in effects:
        slope = (changed(model, sae, effect, step) - changed(model, sae, effect, -step)) / (2 * step)
        assert slope == pytest.approx(effect.gradient, rel=1e-6)
        assert effect.attribution == pytest.approx(effect.activation * effect.gradient, rel=1e-12)


def test_attributions_of_small_latents_are_the_effects_of_ablating_them():
    model, sae = model_of("gpt2", F64), copy.deepcopy(SAES["resid_post.1"])
    sae.W_dec.mul_(1e-6)  # so that ablation is a small change
    clean = logit_difference(model(input_ids=IDS)).item()
    for effect in attribute(model, sae, logit_difference, input_ids=IDS).top(3):
        assert clean - changed(model, sae, effect, -effect.activation) == pytest.approx(effect.attribution, rel=1e-3)


def test_several_saes_in_one_backward_give_the_same_as_each_alone():
    model = model_of("gpt2", F64)
    saes = [SAES[name] for name in ("mlp_out.0", "resid_post.1", "with a transform", "transcoder")]
    together = attribute(model, saes, logit_difference, input_ids=IDS)
    for sae in saes:
        alone = attribute(model, sae, logit_difference, input_ids=IDS)
        close(together[sae].dense(), alone[sae].dense(), 1e-12)
    everything = [effect for sae in saes for effect in together.top(10_000, sae)]
    expected = sorted((abs(effect.attribution) for effect in everything), reverse=True)
    assert [abs(effect.attribution) for effect in together.top(12)] == expected[:12]
    assert len({id(effect.sae) for effect in together.top(60)}) > 1


def test_top_effects_name_row_token_and_latent():
    model, sae = model_of("gpt2", F64), SAES["resid_post.1"]
    found = attribute(model, sae, logit_difference, input_ids=IDS)
    dense = found[sae].dense()
    for effect in found.top(5):
        assert dense[effect.row, effect.token, effect.latent].item() == effect.attribution
        assert effect.sae is sae
    assert found.top(1)[0].attribution in (dense.max().item(), dense.min().item())
    assert found.top(0) == []


@pytest.mark.parametrize(
    "names",
    [
        ["resid_post.1"],
        ["resid_post.0", "resid_post.1"],
        ["transcoder", "mlp_out.0"],
        ["cross-layer transcoder"],
    ],
)
def test_integrated_attributions_sum_to_the_effect_of_removing_all_latents(names):
    model, saes = model_of("gpt2", F64), [SAES[name] for name in names]
    with torch.no_grad():
        clean = logit_difference(model(input_ids=IDS)).item()
        seen = capture(model, saes, input_ids=IDS)
        steers = []
        for sae in saes:  # subtract what the latents of the clean run write, at every site
            for output, site in enumerate(sae.config.sites_written):
                rows = sae.rows_at(torch.arange(D_SAE), output)
                steers.append((site, seen[sae] @ rows))
        handles = [
            block_part(model, site).register_forward_hook(lambda _, __, out, w=written: minus(out, w))
            for site, written in steers
        ]
        ablated = logit_difference(model(input_ids=IDS)).item()
        for handle in handles:
            handle.remove()
    found = attribute(model, saes, logit_difference, method="integrated", steps=64, input_ids=IDS)
    assert found.metric == clean
    total = sum(found[sae].values.sum().item() for sae in saes)
    plain = attribute(model, saes, logit_difference, input_ids=IDS)
    assert total == pytest.approx(clean - ablated, rel=1e-2)
    assert sum(plain[sae].values.sum().item() for sae in saes) != pytest.approx(clean - ablated, rel=5e-2)


def block_part(model, site):
    name, layer = site.split(".")
    return block(model, "gpt2", int(layer)) if name == "resid_post" else block(model, "gpt2", int(layer)).mlp


def minus(output, written):
    return output - written if isinstance(output, torch.Tensor) else (output[0] - written, *output[1:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "gpt_oss", "mamba", "llama4_text"])
def test_attribute_leaves_the_model_unchanged(family):
    model, sae = model_of(family), make_sae()
    before = logits_of(model)
    seen = []
    found = attribute(model, sae, lambda output: seen.append(output.logits) or logit_difference(output), input_ids=IDS)
    assert torch.equal(seen[0], before) and torch.equal(logits_of(model), before)
    assert found.metric == logit_difference(model(input_ids=IDS)).item()
    assert all(parameter.grad is None for parameter in (*model.parameters(), *sae.parameters()))
    assert hooks_on(model) == ({}, [])
    assert found.gradients[sae].abs().max() > 0


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.1", "attn_z.1"])
def test_frozen_checkpointed_and_trained_models_agree(site):
    sae = make_sae(site=site)
    expected = attribute(model_of("llama"), sae, logit_difference, input_ids=IDS)
    frozen, checkpointed = tiny_model("llama").requires_grad_(False), tiny_model("llama").train()
    checkpoint_layers(checkpointed, reentrant=False)
    for model in (frozen, checkpointed):
        with torch.no_grad():  # no_grad around attribute() has no effect
            found = attribute(model, sae, logit_difference, input_ids=IDS)
        assert torch.equal(found.gradients[sae], expected.gradients[sae])
    checkpoint_layers(checkpointed, reentrant=True)
    with pytest.raises(AttachError, match="use_reentrant=False"):
        attribute(checkpointed, sae, logit_difference, input_ids=IDS)
    assert torch.equal(
        attribute(checkpointed.eval(), sae, logit_difference, input_ids=IDS)[sae].values, expected[sae].values
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_virtual_tokens_are_left_out(method):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, sae = peft.get_peft_model(tiny_model("llama"), config).eval(), make_sae()
    x = capture(model, "resid_post.1", input_ids=IDS)["resid_post.1"]
    assert x.shape[:2] == (2, 10)
    found = attribute(model, sae, lambda o: o.logits[0, -1, 7], input_ids=IDS, method=method, steps=50)
    assert torch.equal(found.activations[sae].dense(), sae.encode(x[:, 4:]))
    latents = capture(model, [sae, "final_norm"], input_ids=IDS, grad=True)
    last = model.base_model.get_output_embeddings()(latents["final_norm"])[0, -1, 7]
    (gradient,) = torch.autograd.grad(last, latents[sae])
    if method == "gradient":
        close(found[sae].dense(), (gradient * latents[sae])[:, 4:], 1e-4)
    else:  # the effect of removing the latents at the tokens of the text only
        written = torch.nn.functional.pad(sae.encode(x[:, 4:]) @ sae.W_dec, (0, 0, 4, 0))
        handle = block(model.base_model, "llama").register_forward_hook(lambda _, __, out: minus(out, written))
        without = model(input_ids=IDS).logits[0, -1, 7].item()
        handle.remove()
        assert found[sae].values.sum().item() == pytest.approx(found.metric - without, rel=1e-2)


def test_a_site_without_one_vector_per_token_is_refused():
    model, sae = model_of("llama"), make_sae(site="model.rotary_emb.output", d_in=8)
    with pytest.raises(ShapeError, match=r"\[1, 6, 8\].*2 rows of 6 tokens"):
        attribute(model, sae, logit_difference, input_ids=IDS)
    assert hooks_on(model) == ({}, [])


def test_half_precision_and_autocast_keep_the_saes_dtype():
    sae = make_sae()
    expected = attribute(model_of("llama"), sae, logit_difference, input_ids=IDS)
    half = attribute(model_of("llama", torch.bfloat16), sae, logit_difference, input_ids=IDS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attribute(model_of("llama"), sae, logit_difference, input_ids=IDS)
    for found in (half, mixed):
        assert found[sae].values.dtype == torch.float32
        close(found.per_latent(sae), expected.per_latent(sae), 0.1)


def test_padding_and_special_tokens_are_left_out():
    model, sae = model_of("llama"), make_sae()
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, 0], ids[1, :2], mask[1, :2] = 1, 0, 0
    found = attribute(model, sae, logit_difference, input_ids=ids, attention_mask=mask)
    dense = found[sae].dense()
    assert not dense[0, 0].any() and not dense[1, :2].any() and dense[0, 1].any() and dense[1, 2].any()
    every = attribute(model, sae, logit_difference, special_tokens=True, input_ids=ids, attention_mask=mask)
    assert every[sae].dense()[0, 0].any() and not every[sae].dense()[1, :2].any()
    assert torch.equal(every[sae].dense()[0, 1:], dense[0, 1:])


def test_embeddings_as_input():
    model, sae = model_of("llama"), make_sae()
    embeds = model.get_input_embeddings()(IDS).detach()
    found = attribute(model, sae, logit_difference, inputs_embeds=embeds)
    assert torch.equal(found[sae].values, attribute(model, sae, logit_difference, input_ids=IDS)[sae].values)


def test_a_slice_of_an_sae_keeps_the_indices_of_its_latents(tmp_path):
    model, sae = model_of("llama"), make_sae()
    whole = attribute(model, sae, logit_difference, input_ids=IDS)
    sae.save_pretrained(tmp_path)
    some = SAEModel.from_pretrained(tmp_path, latents=[5, 11, 58])
    found = attribute(model, some, logit_difference, input_ids=IDS)
    chosen = whole[sae].dense()[..., [5, 11, 58]]
    assert chosen.any()
    close(found[some].dense()[..., [5, 11, 58]], chosen, 1e-6)
    assert found[some].values.numel() == (whole.activations[sae].dense()[..., [5, 11, 58]] != 0).sum()


def test_attribution_includes_attached_interventions():
    model, sae = model_of("llama"), make_sae()
    direction = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0)), dim=0)
    with attach(model, Steer(sae, 3), ProjectOut("resid_post.0", direction)):
        expected = logit_difference(model(input_ids=IDS)).item()
        found = attribute(model, sae, logit_difference, input_ids=IDS)
        latents = capture(model, sae, input_ids=IDS)[sae]
    assert found.metric == expected
    assert torch.equal(found.activations[sae].dense(), latents)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 96), min_size=12, max_size=12), st.floats(-2, 2), st.floats(-2, 2))
def test_attribution_is_linear_in_the_metric(tokens, a, b):
    model, sae, ids = model_of("gpt2", F64), SAES["resid_post.1"], torch.tensor(tokens).reshape(2, 6)
    first, second = (lambda output: output.logits[0, -1, 7]), (lambda output: output.logits[1].square().mean())
    parts = [attribute(model, sae, metric, special_tokens=True, input_ids=ids)[sae] for metric in (first, second)]
    both = attribute(
        model, sae, lambda output: a * first(output) + b * second(output), special_tokens=True, input_ids=ids
    )[sae]
    expected = a * parts[0].dense() + b * parts[1].dense()
    assert torch.allclose(both.dense(), expected, rtol=1e-9, atol=1e-12)


def _item(output):
    return output.logits[0, -1, 7].item()


@pytest.mark.parametrize(
    ("saes", "metric", "settings", "error", "message"),
    [
        (make_sae(), _item, {}, InputError, "returned float"),
        (make_sae(), lambda output: output.logits[0, -1], {}, InputError, r"\[97\]"),
        (make_sae(), lambda output: output.logits[0, -1, 7].detach(), {}, InputError, "does not depend"),
        (make_sae(), lambda output: output.logits[0, -1, 7] * float("nan"), {}, InputError, "nan"),
        (make_sae(), logit_difference, {"method": "integratd"}, UnknownNameError, "integrated"),
        (make_sae(), logit_difference, {"steps": 0}, InputError, "steps=0"),
        (make_sae(site="resid_post.9"), logit_difference, {}, SiteError, "resid_post.9"),
        (make_sae(d_in=16), logit_difference, {}, ShapeError, "16"),
        (make_cross_layer(("resid_post.0", "resid_post.1"), None), logit_difference, {}, InputError, "crosscoder"),
        ([], logit_difference, {}, InputError, "no sites or SAEs"),
        (["resid_post.1"], logit_difference, {}, InputError, "expected SAEs"),
    ],
)  # fmt: skip
def test_an_error_leaves_no_hooks(saes, metric, settings, error, message):
    model = model_of("llama")
    with pytest.raises(error, match=message) as caught:
        attribute(model, saes, metric, input_ids=IDS, **settings)
    assert isinstance(caught.value, SAEError)
    assert hooks_on(model) == ({}, [])


def test_a_metric_computed_before_the_site_is_refused():
    model = tiny_model("llama")  # not shared: transformers leaves hooks on it to collect hidden states
    saes = [make_sae(site="resid_post.0"), make_sae(site="resid_post.2")]
    with pytest.raises(InputError, match=r"resid_post\.2"):
        attribute(model, saes, lambda o: o.hidden_states[2].sum(), input_ids=IDS, output_hidden_states=True)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        attribute(model_of("llama"), make_sae(), logit_difference, input_ids=IDS)


def test_an_sae_that_was_not_attributed_is_an_error():
    found = attribute(model_of("llama"), make_sae(), logit_difference, input_ids=IDS)
    with pytest.raises(UnknownNameError):
        found[make_sae(seed=1)]


def test_padding_on_the_left_changes_no_attribution():
    model, sae = tiny_model("gpt2"), make_sae()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS[:2]], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand(2, -1)
    found = attribute(model, sae, logit_difference, input_ids=padded, attention_mask=mask)
    alone = attribute(model, sae, logit_difference, input_ids=IDS[:2])
    assert found.metric == pytest.approx(alone.metric, abs=1e-4)
    close(found.activations[sae].dense()[:, 3:], alone.activations[sae].dense(), 1e-4)
