"""`report()` lists exactly the tokens that were edited."""

import torch

from hf_gated_sae import Ablate, Splice, Steer, attach, capture
from tests.hooks.support import IDS, logits_of, make_sae, model_of

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


def test_the_report_before_the_model_ran():
    with attach(model_of("llama"), Splice(make_sae())) as handle:
        (entry,) = handle.report().interventions
    assert (entry.calls, entry.edited, entry.positions) == (0, 0, {})
    assert (entry.verb, entry.site) == ("Splice", "resid_post.1")


def test_each_intervention_has_its_entry_in_the_order_given():
    sae, late = make_sae(), make_sae(site="mlp_out.2")
    with attach(
        model_of("llama"), Ablate(late, [1]), Splice(sae, positions=[0, -1]), Steer(sae, 3, positions=[])
    ) as handle:
        logits_of(model_of("llama"), attention_mask=MASK)
        logits_of(model_of("llama"), attention_mask=MASK)
    first, second, third = handle.report().interventions
    assert [(e.verb, e.site, e.calls) for e in (first, second, third)] == [
        ("Ablate", "mlp_out.2", 2),
        ("Splice", "resid_post.1", 2),
        ("Steer", "resid_post.1", 2),
    ]
    assert (first.edited, first.positions) == (20, {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3]})
    assert (second.edited, second.positions) == (8, {0: [0, 5], 1: [0, 3]})
    assert (third.edited, third.positions) == (0, {})


def test_only_tokens_that_meet_the_condition_are_counted():
    model, sae = model_of("llama"), make_sae()
    latents = capture(model, sae, input_ids=IDS)[sae]
    latent = int((latents > 0).float().mean((0, 1)).sub(0.5).abs().argmin())
    met = latents[..., latent] > 0
    with attach(model, Steer(sae, 3, when={latent: 0.0})) as handle:
        logits_of(model)
    (entry,) = handle.report().interventions
    assert entry.edited == int(met.sum())
    assert entry.positions == {row: met[row].nonzero()[:, 0].tolist() for row in range(2) if met[row].any()}


def test_the_text_names_verb_site_and_counts():
    model = model_of("llama")
    with attach(model, Steer(make_sae(), 3), Ablate(make_sae(site="mlp_out.0"), [1])) as handle:
        logits_of(model)
    text = str(handle.report())
    assert "Steer at resid_post.1: 12 tokens edited in 1 calls" in text
    assert "Ablate at mlp_out.0: 12 tokens edited in 1 calls" in text


def test_a_generation_lists_prompt_and_new_tokens_once_each():
    model = model_of("llama")
    with attach(model, Steer(make_sae(), 3, special_tokens=True)) as handle:
        model.generate(IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    (entry,) = handle.report().interventions
    # The last new token is never an input. The second row's two padding tokens are both reported as position -1.
    assert entry.positions == {0: list(range(9)), 1: [-1, *range(7)]}
    assert (entry.calls, entry.edited) == (4, 18)
