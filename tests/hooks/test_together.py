"""Several interventions, sites, blocks and calls do not interfere with each other."""

import gc
import threading

import pytest
import torch

from hf_gated_sae import Ablate, Clamp, Splice, Steer, attach, capture
from hf_gated_sae.errors import AttachError, InputError
from hf_gated_sae.interventions import AblateSite
from tests.hooks.support import (
    IDS,
    active_latents,
    close,
    continuing,
    hooks_on,
    logits_of,
    make_cross_layer,
    make_sae,
    model_of,
    steer,
)
from tests.support.tiny_models import tiny_model


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def test_a_condition_on_a_later_source_is_evaluated_where_it_is_known():
    """The first site that the SAE writes comes before the activation that the condition needs."""
    model, sae = model_of("llama"), make_cross_layer()
    latents = capture(model, sae, input_ids=IDS)[sae]
    later = sae.latents_per_site[0] + int((latents[..., sae.latents_per_site[0] :] > 0).float().mean((0, 1)).argmax())
    assert (latents[..., later] > 0).any()
    with attach(model, Ablate(sae, [later])):
        expected = logits_of(model)
    assert not torch.equal(expected, logits_of(model))
    with attach(model, Ablate(sae, [later], when={later: 0.0})) as handle:
        assert torch.equal(logits_of(model), expected)
    first, second = handle.report().interventions
    assert (first.calls, first.edited) == (1, 0), "the first site was edited"
    assert second.edited == int((latents[..., later] > 0).sum())


@pytest.mark.parametrize(
    "family, names",
    [
        ("llama", ("resid_post.0", "resid_pre.1")),
        ("granite", ("attn_out.1", "model.layers.1.self_attn.output")),
    ],
)
def test_replacing_one_tensor_under_two_names_is_refused(family, names):
    first, second = (Splice(make_sae(site=name)) for name in names)
    with pytest.raises(InputError, match="Both Splice and Splice replace"):
        attach(model_of(family), first, second)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("resid_post.0", "resid_pre.1")),
        ("llama", ("resid_pre.1", "resid_post.0|center")),
        ("granite", ("attn_out.1", "model.layers.1.self_attn.output")),  # scaled before it is added
    ],
)
@pytest.mark.parametrize("verb", [steer, lambda site: AblateSite(site)])
def test_editing_one_tensor_under_two_names_is_refused(family, names, verb):
    model = model_of(family)
    with pytest.raises(InputError, match="one tensor under two names") as caught:
        attach(model, verb(site=names[0]), steer(site=names[1]))
    assert all(name in str(caught.value) for name in names)
    attach(model, steer(site=names[0]), steer(site=f"{names[0]}|scale=2"))


def test_names_that_differ_only_in_a_transform_are_edited_together():
    """Both read the clean activation: the sum of both differences is added, in any order."""
    model, site = model_of("llama"), "resid_post.0"
    edits = [Clamp(make_sae(site=f"{site}{transform}"), {3: 4.0}) for transform in ("", "|scale=2")]
    clean = capture(model, site, input_ids=IDS)[site]
    alone = []
    for edit in edits:
        with attach(model, edit):
            alone.append(capture(model, site, input_ids=IDS)[site] - clean)
    for several in (edits, edits[::-1]):
        with attach(model, *several):
            together = capture(model, site, input_ids=IDS)[site] - clean
        close(together, alone[0] + alone[1], 1e-5)


def test_a_later_intervention_does_not_inherit_a_history():
    model, sae = model_of("llama"), make_sae()
    gates = dict.fromkeys(active_latents(model, sae, count=1), 0.0)
    with attach(model, steer()), torch.no_grad():  # keeps the model's tracker alive
        with attach(model, Steer(sae, 3, unit="raw", when=gates, window=3)):
            cache = model(IDS, use_cache=True)
        gc.collect()
        later = [Steer(sae, 3, unit="raw", when=gates, window=3) for _ in range(50)]  # some at the first one's address
        for edit in later:
            with attach(model, edit), pytest.raises(AttachError, match="begin with an empty cache"):
                model(IDS[:, :1], **continuing(model, cache))


@pytest.mark.parametrize("part", [{"positions": [0]}, {"rows": 0}])
def test_edits_of_a_crosscoder_need_its_splice_everywhere(part):
    sae = make_cross_layer(("resid_post.0", "resid_post.1"), None)
    model = model_of("llama")
    attach(model, Splice(sae), Ablate(sae, [3], **part))
    with pytest.raises(InputError, match="at all positions and rows"):
        attach(model, Splice(sae, **part), Ablate(sae, [3]))
    with pytest.raises(InputError, match="at all positions and rows"):
        attach(model, Splice(sae), Ablate(sae, [3], special_tokens=True))


def test_a_model_whose_forward_was_compiled_is_refused():
    model = tiny_model("llama")
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(AttachError, match="compiled"):
        attach(model, steer())


def test_a_replacement_for_all_threads_conflicts_with_those_of_any_thread():
    model, failures = model_of("llama"), []

    def elsewhere():
        try:
            attach(model, Splice(make_sae()), all_threads=True).enable()
        except InputError as error:
            failures.append(error)

    with attach(model, AblateSite("resid_post.1")):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert "Both AblateSite and Splice" in str(failures[0])
    assert hooks_on(model) == ({}, [])


def test_negative_zeros_of_tokens_that_are_not_selected_stay_negative():
    model, site, seen = model_of("llama"), "resid_post.1", []
    zero = -torch.zeros(32)
    with attach(model, AblateSite(site, zero)):
        with attach(model, steer(positions=[0])):
            seen.append(capture(model, site, input_ids=IDS)[site])
    assert torch.equal(bits(seen[0][:, 1:]), bits(zero.expand(2, 5, 32)))
    assert not torch.equal(seen[0][:, 0], zero.expand(2, 32))


def test_an_sae_can_be_trained_after_use_in_inference_mode():
    model, sae = model_of("llama"), make_sae()
    sae.requires_grad_(True)
    with torch.inference_mode(), attach(model, Ablate(sae, [3, 5])):
        model(IDS)
    with attach(model, Ablate(sae, [3, 5])):
        model(IDS).logits.sum().backward()
    assert sae.W_dec.grad[[3, 5]].abs().sum() > 0


def test_positions_that_select_only_special_tokens_are_an_error():
    model = model_of("llama")
    ids = IDS.clone()
    ids[:, 0] = 1  # BOS
    with pytest.raises(AttachError, match="special_tokens=True"), attach(model, steer(positions=[0])):
        logits_of(model, ids)
    with attach(model, steer(positions=[0], special_tokens=True)) as handle:
        logits_of(model, ids)
    assert handle.report().interventions[0].edited == 2
    with attach(model, steer(positions=[0, 1])):  # one of them is edited
        logits_of(model, ids)
