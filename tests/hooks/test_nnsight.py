"""In nnsight's traces interventions give the same bits as with hooks, and nothing is left behind."""

import subprocess
import sys
import warnings

import pytest
import torch
from nnsight import NNsight
from transformers import DynamicCache

from hf_gated_sae import Clamp, ProjectOut, Scale, Splice, Steer, attach, capture
from hf_gated_sae.errors import AttachError, InputError, ShapeError, SiteError
from hf_gated_sae.hooks.nnsight import edit, report
from hf_gated_sae.interventions import Ablate, Cap, Patch
from tests.hooks.nnsight_support import wrap, wrapped
from tests.hooks.support import IDS, SITE, active_latents, continuing, hooks_on, logits_of, make_sae, model_of, steer
from tests.interventions.examples import every_example
from tests.support.tiny_models import HIDDEN, tiny_model

PADDED = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
PADDED[1, 2] = 47
MASK = (PADDED != 0).long()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def direction(width=HIDDEN):
    return torch.linspace(-1, 1, width)


SETTINGS = {
    "Splice of some": lambda sae, latents: [Splice(sae, positions=[1, -1], rows=1)],
    "Clamp on a condition": lambda sae, latents: [Clamp(sae, {latents[0]: 3.0}, when={latents[1]: 0.1})],
    "Cap of some": lambda sae, latents: [Cap(sae, dict.fromkeys(latents, 0.1), positions=slice(1, 4))],
    "Patch of few columns": lambda sae, latents: [Patch(SITE, torch.ones(2, 3, HIDDEN))],
    "Steer at the end": lambda sae, latents: [Steer(sae, latents[0], strength=4.0, positions="last_prompt")],
    "several": lambda sae, latents: [
        Splice(sae),
        Scale(sae, {latents[0]: 0.0}),
        ProjectOut("resid_post.0", direction()),
        Ablate(make_sae("topk", site="resid_post.2"), [3, 4]),
    ],
}
EXAMPLES = every_example()


def traced(lm, ids=IDS, **inputs):
    with torch.no_grad(), lm.trace(ids, **inputs):
        logits = lm.output.logits.save()
    return logits  # noqa: RET504  # the trace runs when its block ends


def generated(generate, ids=IDS, **settings):
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **settings}
    return generate(ids, output_scores=True, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("case", [*EXAMPLES, *SETTINGS])
def test_every_verb_gives_the_same_logits_as_hooks(case):
    model, sae = model_of("llama"), make_sae()
    latents, example = active_latents(model, sae), EXAMPLES.get(case)
    interventions = SETTINGS[case](sae, latents) if example is None else [example.make(sae, *latents[:2], model)]
    with attach(model, *interventions) as handle:
        expected = logits_of(model)
        reported = handle.report()
    assert torch.equal(expected, logits_of(model)) == (example is not None and not example.changes)
    edited = edit(wrapped("llama"), *interventions)
    assert torch.equal(traced(edited), expected)
    assert report(edited) == reported


@pytest.mark.parametrize(
    "family", ["bloom", "falcon", "gemma2", "gpt2", "gpt_oss", "gpt_neo", "llama", "mamba", "opt"]
)
def test_every_family_and_site_gives_the_same_logits_as_hooks(family):
    """Sites in tensors and tuples, inputs and outputs, scaled, flattened, and written in place."""
    model, lm = model_of(family), wrapped(family)
    with torch.no_grad():
        checked = 0
        for site in ("embed", "resid_mid.1", "attn_z.0", "mlp_in.1", "mlp_out.1|center", "resid_post.2", "final_norm"):
            try:
                held = ProjectOut(site, direction())
                with attach(model, held):
                    expected = logits_of(model)
            except (SiteError, ShapeError):  # not in this family
                continue
            assert not torch.equal(expected, logits_of(model)), site
            assert torch.equal(traced(edit(lm, held)), expected), site
            checked += 1
    assert checked >= (3 if family == "mamba" else 4)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last_prompt", [0, 5, 7, -2]])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_generation_edits_the_same_tokens(family, positions):
    model, sae = model_of(family), make_sae()
    held = [Steer(sae, 3, strength=6.0, unit="raw", positions=positions, special_tokens=True)]
    for ids, mask in ((IDS, None), (PADDED, MASK)):
        settings = {} if mask is None else {"attention_mask": mask}
        with attach(model, *held) as handle:
            expected = generated(model.generate, ids, **settings)
            reported = handle.report()
        edited = edit(wrapped(family), *held)
        with edited.generate(ids, **settings, max_new_tokens=4, min_new_tokens=4, do_sample=False, **SCORES) as tracer:
            out = tracer.result.save()
        assert torch.equal(out.sequences, expected.sequences)
        assert all(torch.equal(one, other) for one, other in zip(out.scores, expected.scores, strict=True))
        assert report(edited) == reported


SCORES = {"output_scores": True, "return_dict_in_generate": True}


def test_rows_are_those_of_the_prompt():
    model, sae = model_of("llama"), make_sae()
    held = Steer(sae, 3, strength=6.0, unit="raw", rows=1)
    with attach(model, held):
        expected = generated(model.generate, num_beams=2, num_return_sequences=2)
    edited = edit(wrapped("llama"), held)
    with edited.generate(
        IDS, num_beams=2, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4, do_sample=False, **SCORES
    ) as tracer:
        out = tracer.result.save()
    assert torch.equal(out.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(out.scores, expected.scores, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_guidance_calls_of_a_generation_have_their_own_prompt(use_cache):
    model, held = model_of("llama"), steer(positions="last_prompt")
    settings = {"guidance_scale": 2.0, "negative_prompt_ids": IDS[:, :3], "use_cache": use_cache}
    with attach(model, held) as handle:
        expected = generated(model.generate, **settings)
        reported = handle.report()
    edited = edit(wrapped("llama"), held)
    with edited.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, **settings, **SCORES) as tracer:
        out = tracer.result.save()
    assert all(torch.equal(one, other) for one, other in zip(out.scores, expected.scores, strict=True))
    assert report(edited) == reported
    assert reported.interventions[0].positions == {row: [2, 5] for row in range(2)}


def test_a_condition_on_earlier_tokens_remembers_them_between_steps():
    model, sae = model_of("llama"), make_sae()
    one, other = active_latents(model, sae, count=2)
    held = Clamp(sae, {one: 9.0}, when={other: 0.1}, window=3)
    with attach(model, held) as handle:
        expected = generated(model.generate)
        reported = handle.report()
    edited = edit(wrapped("llama"), held)
    with edited.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        ids = tracer.result.save()
    assert torch.equal(ids, expected.sequences)
    assert report(edited) == reported and reported.interventions[0].edited


def test_a_custom_decoding_loop_continues_from_its_cache():
    model, sae = model_of("llama"), make_sae()
    held = Steer(sae, 3, strength=6.0, unit="raw", positions="generated")
    edited, one, other = edit(wrapped("llama"), held), DynamicCache(), DynamicCache()
    for start, end in ((0, 4), (4, 5), (5, 6)):
        # nnsight's default mask covers only the new tokens, so that transformers 5.24 ignores the cache.
        step, mask = IDS[:, start:end], torch.ones_like(IDS[:, :end])
        with attach(model, held):
            expected = logits_of(model, step, attention_mask=mask, **continuing(model, one))
        assert torch.equal(traced(edited, step, attention_mask=mask, **continuing(model, other)), expected)
    assert report(edited).interventions[0].positions == {0: [4, 5], 1: [4, 5]}


def test_padding_is_left_out_in_prompts_of_unequal_length():
    model, sae = model_of("llama"), make_sae()
    held = Ablate(sae, active_latents(model, sae))
    edited = edit(wrapped("llama"), held)
    with torch.no_grad(), edited.trace() as tracer:
        with tracer.invoke("<11> <54> <33> <78>"):
            first = edited.output.logits.save()
        with tracer.invoke("<60> <41> <22> <13> <5> <44>"):
            second = edited.output.logits.save()
    ids = torch.tensor([[0, 0, 11, 54, 33, 78], [60, 41, 22, 13, 5, 44]])
    with attach(model, held) as handle:
        places = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])  # as nnsight numbers them
        expected = logits_of(model, ids, attention_mask=(ids != 0).long(), position_ids=places)
        assert report(edited) == handle.report()
    assert torch.equal(torch.cat([first, second]), expected)


def test_gradients_are_those_of_the_hooks():
    model, sae = model_of("llama"), make_sae()
    held, embeds = Splice(sae), torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(0))
    one, other = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    with attach(model, held):
        model(inputs_embeds=one).logits.square().sum().backward()
    edited = edit(wrapped("llama"), held)
    with edited.trace(inputs_embeds=other):
        logits = edited.output.logits.save()
    torch.autograd.backward(logits.square().sum())
    model.zero_grad()
    assert torch.equal(one.grad, other.grad)


def test_the_trace_sees_edited_values():
    model, sae = model_of("llama"), make_sae()
    edited = edit(wrapped("llama"), Splice(sae))
    with torch.no_grad(), edited.trace(IDS):
        before = edited.model.layers[1].input.save()
        spliced = edited.model.layers[1].output.save()
    assert spliced.shape == before.shape and not torch.equal(before, spliced)
    with torch.no_grad():
        x = capture(model, SITE, input_ids=IDS)[SITE]
        assert torch.equal(spliced, sae(x).reconstruction)


def test_only_the_edited_copy_is_edited_and_copies_stack():
    model, sae = model_of("llama"), make_sae()
    latents, lm = active_latents(model, sae), wrapped("llama")
    once = edit(lm, Ablate(sae, latents[:2]))
    twice = edit(once, ProjectOut("resid_post.2", direction()))
    with attach(model, Ablate(sae, latents[:2])):
        expected = logits_of(model)
        with attach(model, ProjectOut("resid_post.2", direction())):
            both = logits_of(model)
    assert torch.equal(traced(twice), both)
    assert torch.equal(traced(once), expected)
    assert torch.equal(traced(lm), logits_of(model))
    assert hooks_on(lm._module)[0] == {}
    assert sorted(lm._module.state_dict()) == sorted(model.state_dict())


def test_a_stopped_trace_is_no_error_and_the_next_one_works():
    model, sae = model_of("llama"), make_sae()
    edited = edit(wrapped("llama"), Splice(sae))
    with torch.no_grad(), edited.trace(IDS) as tracer:
        early = edited.model.layers[0].output.save()
        tracer.stop()
    assert early.shape == (2, 6, HIDDEN)
    with attach(model, Splice(sae)):
        expected = logits_of(model)
    assert torch.equal(traced(edited), expected)


def test_positions_that_were_never_reached_are_an_error_in_the_report():
    edited = edit(wrapped("llama"), Steer(make_sae(), 3, strength=6.0, unit="raw", positions=[2, 5]))
    traced(edited, IDS[:, :4])
    with pytest.raises(AttachError, match=r"positions \[5\] of Steer at resid_post.1 were never reached"):
        report(edited)
    traced(edited)  # this trace reaches them
    assert report(edited).interventions[0].positions == {0: [2, 5], 1: [2, 5]}


def test_a_site_that_is_not_reached_is_an_error():
    lm = wrap(tiny_model("llama"))
    edited = edit(lm, ProjectOut(SITE, direction()))
    lm._module.model.layers[1].forward = lambda x, **_: x  # replaces nnsight's forward at this layer
    with pytest.raises(AttachError, match="never reached resid_post.1"):
        traced(edited)


def test_hooks_and_nnsight_do_not_mix():
    model, sae = model_of("llama"), make_sae()
    edited = edit(wrapped("llama"), Splice(sae))
    inner = wrapped("llama")._module
    with attach(inner, ProjectOut("resid_post.0", direction())), pytest.raises(AttachError, match="one of the two"):
        traced(edited)
    with attach(model, Splice(sae)):
        expected = logits_of(model)
    assert torch.equal(traced(edited), expected)


def test_hooks_act_on_a_wrapped_model_outside_of_traces():
    model, sae, inner = model_of("llama"), make_sae(), wrapped("llama")._module
    with attach(model, Splice(sae)):
        expected = logits_of(model)
    with attach(inner, Splice(sae)):
        assert torch.equal(logits_of(inner), expected)


def test_errors_are_those_of_attach():
    model, sae = model_of("llama"), make_sae()
    lm = wrapped("llama")
    with pytest.raises(InputError, match="nnsight model"):
        edit(model, Splice(sae))
    with pytest.raises(InputError, match="no interventions"):
        edit(lm)
    with pytest.raises(SiteError, match="resid_post.9"):
        edit(lm, ProjectOut("resid_post.9", direction()))
    with pytest.raises(ShapeError, match="16"):
        edit(lm, Splice(make_sae(d_in=16)))
    with pytest.raises(InputError, match="replace"):
        edit(lm, Splice(sae), Splice(make_sae("topk")))
    with pytest.raises(InputError, match="edit"):
        report(lm)
    with torch.device("meta"):
        empty = tiny_model("llama")
    with pytest.raises(InputError, match="weights"):
        edit(NNsight(empty), Splice(sae))
    assert torch.equal(traced(lm), logits_of(model))


def test_an_error_of_an_intervention_is_raised_unchanged():
    edited = edit(wrapped("llama"), Steer(make_sae(), 3, strength=1.0, unit="raw", rows=7))
    with pytest.raises(InputError, match="row"):
        traced(edited)


def test_nnsight_is_imported_by_its_back_end_only_when_used():
    code = """
import sys, hf_gated_sae, hf_gated_sae.hooks.nnsight
from hf_gated_sae import attach, capture, Splice
from hf_gated_sae.hooks.nnsight import edit, sae_envoys
assert "nnsight" not in sys.modules and not hasattr(3, "save")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
