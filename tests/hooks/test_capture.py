"""`capture` returns what a hand-written hook sees, and runs no more of the model than it needs."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hf_gated_sae import Clamp, SAEModel, Splice, Steer, attach, capture, resolve
from hf_gated_sae.errors import AttachError, InputError, SAEError, ShapeError, SiteError
from hf_gated_sae.sites import Site
from tests.hooks.support import (
    ARCHITECTURES,
    FAMILIES,
    IDS,
    block,
    checkpoint_layers,
    close,
    continuing,
    full_path,
    hand_made,
    hooks_on,
    logits_of,
    make_cross_layer,
    make_sae,
    model_of,
)
from tests.support.tiny_models import tiny_model


def seen_by_hand(module, run):
    seen = []

    def look(x):
        seen.append(x.detach().clone())
        return x

    with hand_made(module, look):
        run()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_a_hand_made_hook(family):
    model = model_of(family)
    layers = {f"resid_post.{layer}": block(model, family, layer) for layer in range(3)}
    expected = {site: seen_by_hand(module, lambda: logits_of(model)) for site, module in layers.items()}
    found = capture(model, list(layers), input_ids=IDS)
    assert list(found) == list(layers)
    for site, value in found.items():
        assert torch.equal(value, expected[site])
        assert not value.requires_grad
    assert not torch.equal(found["resid_post.1"], found["resid_post.2"])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_after_the_last_site_is_run(family):
    model, ran = model_of(family), []
    handles = [block(model, family, n).register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n in range(3)]
    try:
        capture(model, "resid_post.0", input_ids=IDS)
        assert ran == [0]
        ran.clear()
        capture(model, ["resid_post.1", "resid_post.0"], input_ids=IDS)
        assert ran == [0, 1]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saes_give_their_latents(architecture):
    model, sae, other = model_of("llama"), make_sae(architecture), make_sae(site="mlp_out.0", seed=1)
    found = capture(model, [sae, "resid_post.1", other, Site.parse("mlp_out.0")], input_ids=IDS)
    assert torch.equal(found[sae], sae.encode(found["resid_post.1"]))
    assert torch.equal(found[other], other.encode(found[Site.parse("mlp_out.0")]))
    assert (found[sae] > 0).any()


def test_a_single_site_or_sae_needs_no_list():
    model, sae = model_of("llama"), make_sae()
    assert list(capture(model, sae, input_ids=IDS)) == [sae]
    assert list(capture(model, "resid_post.1", input_ids=IDS)) == ["resid_post.1"]


def test_inputs_reach_the_model():
    model = model_of("llama")
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    expected = seen_by_hand(block(model, "llama"), lambda: logits_of(model, IDS, attention_mask=mask))
    assert torch.equal(capture(model, "resid_post.1", input_ids=IDS, attention_mask=mask)["resid_post.1"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_of_a_half_precision_model_are_computed_in_the_saes_dtype(dtype):
    model, sae = model_of("llama", dtype), make_sae()
    expected = seen_by_hand(block(model, "llama"), lambda: logits_of(model))
    found = capture(model, [sae, "resid_post.1"], input_ids=IDS)
    assert found["resid_post.1"].dtype == dtype and torch.equal(found["resid_post.1"], expected)
    assert found[sae].dtype == torch.float32 and torch.equal(found[sae], sae.encode(expected.float()))


def test_autocast_does_not_reach_the_latents():
    model, sae = model_of("llama"), make_sae()
    with torch.autocast("cpu", torch.bfloat16):
        found = capture(model, [sae, "resid_post.1"], input_ids=IDS)
    assert found[sae].dtype == torch.float32
    assert torch.equal(found[sae], sae.encode(found["resid_post.1"].float()))


def test_captures_include_attached_interventions():
    model, sae = model_of("llama", torch.float64), make_sae(dtype=torch.float64)

    def edit(latents):
        latents[..., 3] = 5.0

    clean = capture(model, ["resid_post.1"], input_ids=IDS)["resid_post.1"]
    with attach(model, Clamp(sae, {3: 5.0})) as handle:
        edited = capture(model, ["resid_post.1", "resid_post.2"], input_ids=IDS)
        assert handle.report().interventions[0].calls == 1
    with hand_made(block(model, "llama", 1), full_path(sae, edit)):
        later = seen_by_hand(block(model, "llama", 2), lambda: logits_of(model))
    close(edited["resid_post.1"], full_path(sae, edit)(clean), 1e-12)
    close(edited["resid_post.2"], later, 1e-12)
    assert torch.equal(capture(model, "resid_post.1", input_ids=IDS)["resid_post.1"], clean)


def test_later_in_place_writes_do_not_change_what_was_captured():
    model = tiny_model("llama")
    expected = capture(model, "resid_post.0", input_ids=IDS)["resid_post.0"]

    def overwrite(module, args):
        args[0].mul_(3.0)

    block(model, "llama", 1).register_forward_pre_hook(overwrite)
    found = capture(model, ["resid_post.0", "resid_post.1"], input_ids=IDS)
    assert torch.equal(found["resid_post.0"], expected)


def test_gradients():
    model, sae = model_of("llama"), make_sae()
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    found = capture(model, [sae, "resid_post.1"], grad=True, inputs_embeds=embeds)
    (gradient,) = torch.autograd.grad(found[sae].sum(), embeds)
    assert gradient.abs().sum() > 0

    by_hand = []
    handle = block(model, "llama").register_forward_hook(lambda m, a, output: by_hand.append(sae.encode(output)))
    model(inputs_embeds=embeds)
    handle.remove()
    assert torch.equal(torch.autograd.grad(by_hand[0].sum(), embeds)[0], gradient)
    assert found["resid_post.1"].requires_grad
    assert not capture(model, sae, inputs_embeds=embeds)[sae].requires_grad


def by_hand(model, sae, x, metric):
    """Reference for the gradient of a metric: the latents are a leaf of autograd, and the error is kept."""
    latents = sae.encode(x).detach().requires_grad_()
    with hand_made(block(model, "gpt2"), lambda _: sae.decode(latents) + (x - sae.decode(latents.detach()))):
        return torch.autograd.grad(metric(model(IDS).logits), latents)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_flow_to_latents_and_to_earlier_sites(architecture):
    model, sae = model_of("gpt2", torch.float64), make_sae(architecture, dtype=torch.float64)
    wanted = ["resid_post.0", "resid_post.1", sae, "resid_post.2", "lm_head.output"]
    clean = capture(model, wanted, input_ids=IDS)
    found = capture(model, wanted, grad=True, input_ids=IDS)
    for key in wanted:
        assert torch.equal(found[key], clean[key])
    metric = lambda logits: logits[0, -1, 7] - logits[1, 2].square().mean()  # noqa: E731
    gradient = torch.autograd.grad(metric(found["lm_head.output"]), found[sae], retain_graph=True)[0]
    close(gradient, by_hand(model, sae, clean["resid_post.1"], metric), 1e-11)

    # At earlier sites the gradient is the model's own: it also flows through the error.
    [through] = torch.autograd.grad(metric(found["lm_head.output"]), found["resid_post.0"])
    plain = capture(model, ["resid_post.0", "lm_head.output"], grad=True, input_ids=IDS)
    [expected] = torch.autograd.grad(metric(plain["lm_head.output"]), plain["resid_post.0"])
    close(through, expected, 1e-11)


def test_gradients_flow_to_the_latents_of_a_transcoder():
    model = model_of("gpt2", torch.float64)
    sae = make_sae(site="mlp_in.1|center", site_out="mlp_out.1", dtype=torch.float64)
    found = capture(model, [sae, "mlp_out.1", "lm_head.output"], grad=True, input_ids=IDS)
    metric = found["lm_head.output"][0, -1, 7]
    written, latents = torch.autograd.grad(metric, [found["mlp_out.1"], found[sae]])
    close(latents, written @ sae.W_dec.T, 1e-11)
    assert latents.abs().max() > 0


def test_gradients_of_a_frozen_model_begin_at_the_first_site():
    model = tiny_model("llama").requires_grad_(False)
    with torch.no_grad():
        found = capture(model, ["resid_post.0", "resid_post.2"], grad=True, input_ids=IDS)
    assert found["resid_post.0"].is_leaf
    assert torch.autograd.grad(found["resid_post.2"].sum(), found["resid_post.0"])[0].abs().max() > 0


def test_gradients_are_right_if_the_model_writes_into_what_was_captured():
    model = tiny_model("llama")
    plain = capture(model, ["resid_post.0", "resid_post.1"], grad=True, input_ids=IDS)
    expected = torch.autograd.grad(plain["resid_post.1"].sum(), plain["resid_post.0"])[0]
    block(model, "llama", 1).register_forward_pre_hook(lambda _, args: (args[0].mul_(3.0).div_(3.0), *args[1:]))
    found = capture(model, ["resid_post.0", "resid_post.1"], grad=True, input_ids=IDS)
    assert torch.equal(found["resid_post.0"], plain["resid_post.0"])
    close(torch.autograd.grad(found["resid_post.1"].sum(), found["resid_post.0"])[0], expected, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["attn_out.1", make_sae(site="attn_out.1"), "resid_post.1", make_sae()])
def test_gradients_within_checkpointed_layers_are_right_or_refused(what, reentrant):
    def gradient(model):
        found = capture(model, [what, "final_norm"], grad=True, input_ids=IDS)
        found[what].retain_grad()
        found["final_norm"].square().sum().backward()
        return found[what].grad

    model = tiny_model("llama").train()
    expected = gradient(model)
    checkpoint_layers(model, reentrant=reentrant)
    hooks = hooks_on(model)
    # Older versions of transformers checkpoint a layer's call, hooks included, instead of its forward.
    all_of_it = type(block(model, "llama")).__call__ is not torch.nn.Module.__call__
    within = all_of_it or (what.config.site if isinstance(what, SAEModel) else what) == "attn_out.1"
    if within and (reentrant or isinstance(what, SAEModel)):
        with pytest.raises(AttachError, match=r"layers\.1(\.self_attn)?\.output, within a layer"):
            gradient(model)
        assert hooks_on(model) == hooks
        assert torch.equal(gradient(model.eval()), expected)
    else:
        assert torch.equal(gradient(model), expected)


def test_saes_of_several_sites_read_them_together():
    model, sae = model_of("llama"), make_cross_layer()
    found = capture(model, [sae, "mlp_in.0", "mlp_in.1"], input_ids=IDS)
    expected = sae.encode(torch.stack([found["mlp_in.0"], found["mlp_in.1"]], -2))
    assert torch.equal(found[sae], expected) and (expected > 0).any()
    assert torch.equal(capture(model, sae, grad=True, input_ids=IDS)[sae], expected)


def test_transforms_are_applied():
    model, sae = model_of("llama"), make_sae(site="resid_post.1|center")
    found = capture(model, ["resid_post.1", "resid_post.1|center", "resid_post.1|scale=0.5", sae], input_ids=IDS)
    x = found["resid_post.1"]
    close(found["resid_post.1|center"], x - x.mean(-1, keepdim=True), 1e-6)
    assert torch.equal(found["resid_post.1|scale=0.5"], x * 0.5)
    assert torch.equal(found[sae], sae.encode(found["resid_post.1|center"]))


def test_inside_inference_mode():
    model, sae = model_of("llama"), make_sae()
    expected = capture(model, [sae, "resid_post.1"], input_ids=IDS)
    with torch.inference_mode():
        found = capture(model, [sae, "resid_post.1"], input_ids=IDS)
        with pytest.raises(InputError, match="inference_mode"):
            capture(model, sae, grad=True, input_ids=IDS)
    for key, value in found.items():
        assert torch.equal(value, expected[key])
        (value.requires_grad_() * 2).sum().backward()  # an ordinary tensor, which autograd can use
        value.detach().zero_()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # raised by checkpointing while capturing
def test_a_forward_that_was_stopped_leaves_nothing_behind():
    model = tiny_model("gpt2").train()
    checkpoint_layers(model, reentrant=True)
    torch.manual_seed(0)
    expected = model(IDS, labels=IDS, output_hidden_states=True, use_cache=False)
    expected.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    hooks = hooks_on(model)
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with context:
            capture(model, "attn_z.1", input_ids=IDS, output_hidden_states=True, output_attentions=False)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and hooks_on(model) == hooks
    torch.manual_seed(0)
    found = model(IDS, labels=IDS, output_hidden_states=True, use_cache=False)
    found.loss.backward()
    assert len(found.hidden_states) == len(expected.hidden_states)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), gradients, strict=True))


def test_a_cache_that_is_given_is_filled_in_every_layer():
    model = model_of("llama")
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(IDS, **continuing(model, expected))
    capture(model, "resid_post.0", input_ids=IDS, **continuing(model, cache))
    assert [layer.get_seq_length() for layer in cache.layers] == [IDS.shape[1]] * 3
    later = capture(model, "resid_post.2", input_ids=IDS[:, :1], **continuing(model, cache))["resid_post.2"]
    assert torch.equal(
        later, capture(model, "resid_post.2", input_ids=IDS[:, :1], **continuing(model, expected))["resid_post.2"]
    )


def test_train_mode_and_dropout_are_kept():
    model = tiny_model("gpt2", resid_pdrop=0.5)
    model.train()
    torch.manual_seed(3)
    expected = seen_by_hand(block(model, "gpt2"), lambda: logits_of(model))
    torch.manual_seed(3)
    assert torch.equal(capture(model, "resid_post.1", input_ids=IDS)["resid_post.1"], expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("wanted", "inputs", "error"),
    [
        ("resid_post.1", {"input_ids": IDS[:, :0]}, SAEError),
        ("resid_post.1", {}, SAEError),
        ("resid_post.1", {"input_ids": IDS + 1000}, IndexError),
        ("resid_post.9", {"input_ids": IDS}, SiteError),
        (make_sae(d_in=16), {"input_ids": IDS}, ShapeError),
        (["resid_post.1", ["resid_post.0"]], {"input_ids": IDS}, SAEError),
        ([], {"input_ids": IDS}, SAEError),
        ([5], {"input_ids": IDS}, SAEError),
        (3, {"input_ids": IDS}, InputError),
        (None, {"input_ids": IDS}, InputError),
        (make_sae(site="model.rotary_emb.output", d_in=8), {"input_ids": IDS}, ShapeError),
    ],
)
def test_an_error_leaves_no_hooks(wanted, inputs, error):
    model = model_of("llama")
    clean = logits_of(model)
    with pytest.raises(error):
        capture(model, wanted, **inputs)
    assert hooks_on(model) == ({}, [])
    assert torch.equal(logits_of(model), clean)


def test_a_tensor_shared_by_all_rows_is_captured_but_not_encoded():
    model, site = model_of("llama"), "model.rotary_emb.output"
    assert capture(model, site, input_ids=IDS)[site].shape == (1, 6, 8)
    with pytest.raises(ShapeError, match=r"\[1, 6, 8\] for 2 sequences of 6 tokens"):
        capture(model, make_sae(site=site, d_in=8), input_ids=IDS)


class Pairs(nn.Module):
    """Pools every two tokens; the model does not use the output."""

    def forward(self, x):
        return x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)


def test_a_site_with_fewer_vectors_than_tokens_is_not_encoded():
    model = tiny_model("llama")
    model.model.register_module("pooled", Pairs())
    model.model.norm.register_forward_hook(lambda module, args, output: (model.model.pooled(output), None)[1])
    site = "model.pooled.output"
    assert capture(model, site, input_ids=IDS)[site].shape == (2, 3, 32)
    with pytest.raises(ShapeError, match=r"\[2, 3, 32\] for 2 sequences of 6 tokens"):
        capture(model, make_sae(site=site), input_ids=IDS)


def test_a_site_that_is_not_reached_is_an_error():
    model = tiny_model("llama")
    capture(model, "resid_post.2", input_ids=IDS)
    model.model.config.num_hidden_layers = 2
    with pytest.raises(AttachError, match=r"without reaching resid_post\.2"):
        capture(model, ["resid_post.0", "resid_post.2"], input_ids=IDS)


def test_a_capture_within_a_block_removes_only_its_own_hooks():
    model = model_of("llama")
    with attach(model, Steer(make_sae(), 3), Splice(make_sae(site="mlp_out.2"))):
        expected = logits_of(model)
        capture(model, ["resid_post.1", "mlp_out.2", "embed"], input_ids=IDS)
        assert torch.equal(logits_of(model), expected)


def test_every_named_site_of_a_family_can_be_captured_at_once():
    for family in ("llama", "gpt2", "llama4_text"):
        model = model_of(family)
        names = resolve(model).names()
        found = capture(model, names, input_ids=IDS)
        assert list(found) == names and len(names) > 20
        assert all(value.shape[:2] == IDS.shape for value in found.values())
