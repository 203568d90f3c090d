"""Latents as values of nnsight's envoys."""

import pytest
import torch

from hf_gated_sae import Clamp, Splice, attach, capture
from hf_gated_sae.errors import AttachError, InputError, ShapeError, SiteError
from hf_gated_sae.hooks.nnsight import sae_envoys
from tests.hooks.nnsight_support import wrap
from tests.hooks.support import D_SAE, IDS, active_latents, close, logits_of, make_sae, model_of
from tests.support.tiny_models import tiny_model

FAMILIES = {"llama": "resid_post.1", "bloom": "resid_post.1", "gpt2": "attn_z.1", "gemma2": "mlp_out.0"}


@pytest.fixture(params=FAMILIES)
def held(request):
    """The envoy of the module at the SAE's site, the wrapped model, the model for hooks, and the SAE."""
    family = request.param
    sae, inner = make_sae(site=FAMILIES[family]), tiny_model(family)
    lm = wrap(inner, envoys=sae_envoys(inner, sae))
    (envoy,) = [each for each in lm.modules() if hasattr(type(each), "latents")]
    return envoy, lm, model_of(family), sae


def test_reading_changes_nothing_and_gives_what_capture_gives(held):
    envoy, lm, model, sae = held
    with torch.no_grad(), lm.trace(IDS):
        latents = envoy.latents.save()
        logits = lm.output.logits.save()
    assert torch.equal(latents, capture(model, sae, input_ids=IDS)[sae])
    assert torch.equal(logits, logits_of(model))


def test_reading_changes_nothing_under_autocast(held):
    envoy, lm, model, sae = held
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model)
        with lm.trace(IDS):
            latents = envoy.latents.save()
            logits = lm.output.logits.save()
        assert torch.equal(latents, capture(model, sae, input_ids=IDS)[sae])
    assert latents.dtype == torch.float32 and torch.equal(logits, expected)


def test_a_change_in_place_does_what_clamp_does(held):
    envoy, lm, model, sae = held
    (latent,) = active_latents(model, sae, count=1)
    with torch.no_grad(), lm.trace(IDS):
        envoy.latents[..., latent] = 10.0
        logits = lm.output.logits.save()
    with attach(model, Clamp(sae, {latent: 10.0})):
        expected = logits_of(model)
    assert not torch.allclose(expected, logits_of(model))
    close(logits, expected, 1e-5)


def test_an_assignment_does_what_the_change_in_place_does(held):
    envoy, lm, model, sae = held
    with torch.no_grad(), lm.trace(IDS):
        latents = envoy.latents.clone()
        latents[:, 2, 7] += 3.0
        envoy.latents = latents
        assigned = lm.output.logits.save()
    with torch.no_grad(), lm.trace(IDS):
        envoy.latents[:, 2, 7] += 3.0
        changed = lm.output.logits.save()
    assert torch.equal(assigned, changed) and not torch.equal(assigned, logits_of(model))


def test_in_generation_each_step_has_its_latents(held):
    envoy, lm, model, sae = held
    seen = []
    with lm.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:3]:
            seen.append(envoy.latents.shape)
            envoy.latents[..., 3] = 6.0
        ids = tracer.result.save()
        seen = seen.save()
    assert [list(shape) for shape in seen] == [[2, 6, D_SAE], [2, 1, D_SAE], [2, 1, D_SAE]]
    with attach(model, Clamp(sae, {3: 6.0}, special_tokens=True)):
        assert torch.equal(ids, model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False))


def test_the_sae_is_not_part_of_the_model(held):
    _, lm, model, _ = held
    assert sorted(lm._module.state_dict()) == sorted(model.state_dict())


def test_gradients_reach_latents():
    sae, inner = make_sae(), tiny_model("llama")
    lm = wrap(inner, envoys=sae_envoys(inner, sae))
    with lm.trace(IDS):
        latents = lm.model.layers[1].latents
        lm.model.layers[1].latents = latents + 1.0
        total = lm.output.logits.sum()
        with total.backward():
            gradient = latents.grad.save()
    assert gradient.shape == (2, 6, D_SAE) and gradient.abs().sum() > 0


def test_saes_and_latents_that_do_not_fit_are_refused():
    model, sae = model_of("llama"), make_sae()
    with pytest.raises(InputError, match="no SAEs"):
        sae_envoys(model)
    with pytest.raises(InputError, match="two SAEs"):
        sae_envoys(model, sae, make_sae("topk"))
    with pytest.raises(SiteError, match="resid_post.9"):
        sae_envoys(model, make_sae(site="resid_post.9"))
    with pytest.raises(ShapeError, match="16"):
        sae_envoys(model, make_sae(d_in=16))
    inner = tiny_model("llama")
    lm = wrap(inner, envoys=sae_envoys(inner, sae))
    with pytest.raises(ShapeError, match=r"\[2, 6, 64\] were set to \[3, 3\]"), torch.no_grad(), lm.trace(IDS):
        lm.model.layers[1].latents = torch.zeros(3, 3)
        lm.output.logits.save()
    with attach(inner, Splice(sae)), pytest.raises(AttachError, match="one of the two"), lm.trace(IDS):
        lm.model.layers[1].latents.save()
