"""`capture` gives what a hand-made hook sees, and runs no more of the model than it needs."""

import pytest
import torch

from hf_gated_sae import Clamp, Splice, Steer, attach, capture, resolve
from hf_gated_sae.errors import AttachError, SAEError, ShapeError, SiteError
from hf_gated_sae.sites import Site
from tests.hooks.support import (
    ARCHITECTURES,
    FAMILIES,
    IDS,
    block,
    close,
    full_path,
    hand_made,
    hooks_on,
    logits_of,
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


def test_a_single_thing_needs_no_list():
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


def test_what_is_attached_shows():
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


def test_later_writes_of_the_model_do_not_reach_what_was_captured():
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


def test_inside_inference_mode():
    model, sae = model_of("llama"), make_sae()
    expected = capture(model, sae, input_ids=IDS)[sae]
    with torch.inference_mode():
        assert torch.equal(capture(model, sae, input_ids=IDS)[sae], expected)


def test_train_mode_and_dropout_are_the_models_own():
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
    ],
)
def test_an_error_leaves_nothing(wanted, inputs, error):
    model = model_of("llama")
    clean = logits_of(model)
    with pytest.raises(error):
        capture(model, wanted, **inputs)
    assert hooks_on(model) == ({}, [])
    assert torch.equal(logits_of(model), clean)


def test_a_site_that_is_not_reached_is_an_error():
    model = tiny_model("llama")
    capture(model, "resid_post.2", input_ids=IDS)
    model.model.config.num_hidden_layers = 2
    with pytest.raises(AttachError, match=r"without reaching resid_post\.2"):
        capture(model, ["resid_post.0", "resid_post.2"], input_ids=IDS)


def test_a_capture_within_a_block_takes_only_its_own_hooks_away():
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
