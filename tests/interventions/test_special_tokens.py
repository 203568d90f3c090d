"""One rule says which tokens are special: what the SAE recorded, else the model's configurations and its tokenizer."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gated_sae import Clamp, ProjectOut, Splice, TokenIds, attach, attribute, capture, harvest
from hf_gated_sae.evaluation import evaluate
from hf_gated_sae.interventions import TokenContext, special_ids_for, special_token_ids
from hf_gated_sae.interventions.special_tokens import own_tokenizer
from hf_gated_sae.training import ModelActivations, TextTokens
from tests.hooks.support import make_sae
from tests.support.tiny_models import tiny_model
from tests.training.words import word_tokenizer

SITE = "resid_post.1"
IDS = torch.tensor([[70, 5, 71, 6, 2, 7, 1, 8, 9, 0]])


@pytest.fixture
def model(tmp_path):
    """A model that names EOS alone, beside a tokenizer with BOS, padding, a token for unknown text and two marks."""
    tiny_model("llama", bos_token_id=None, pad_token_id=None).save_pretrained(tmp_path)
    word_tokenizer(unk_token="w3", extra_special_tokens=["w70", "w71"]).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path).eval()


def test_special_tokens_of_the_tokenizer_are_added(model):
    assert special_token_ids(model) == [0, 1, 2, 70, 71]
    assert special_token_ids(tiny_model("llama", bos_token_id=None, pad_token_id=None)) == [2]


def test_the_tokenizer_is_looked_for_once_and_on_this_machine_only(model, monkeypatch):
    calls, load = [], AutoTokenizer.from_pretrained

    def counted(*args, **kwargs):
        calls.append(kwargs["local_files_only"])
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    for _ in range(3):
        special_token_ids(model)
    assert own_tokenizer(model) is own_tokenizer(model) and calls == [True]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bert"])
def test_a_tokenizer_that_transformers_makes_up_without_files_is_ignored(tmp_path, family):
    """Its few tokens have ids that belong to other tokens of the model."""
    tiny_model(family).save_pretrained(tmp_path)
    made_up = AutoTokenizer.from_pretrained(tmp_path)
    assert len(made_up) < 10 and made_up.all_special_ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generation_config.bos_token_id = model.config.bos_token_id = 50
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    assert special_token_ids(model) == [2, 50]


def test_what_an_sae_recorded_comes_first(model):
    sae, other = make_sae(), make_sae(seed=1)
    sae.config.special_token_ids = [9, 2]
    other.config.special_token_ids = []
    assert special_token_ids(model, sae) == [2, 9] and special_token_ids(model, other) == []
    assert special_ids_for(model, [sae]) == [2, 9]
    assert special_ids_for(model, [sae, other]) == [2, 9]
    assert special_ids_for(model, [sae, SITE]) == [0, 1, 2, 9, 70, 71] == special_ids_for(model, [sae, make_sae()])


def test_training_measuring_harvesting_and_attribution_leave_out_the_same_tokens(model):
    sae = make_sae()
    kept = [5, 6, 7, 8, 9]
    [found] = harvest(model, [SITE, sae], [IDS])
    assert found.token_ids.tolist() == kept
    stream = ModelActivations(model, SITE, [IDS])
    assert stream.special_ids == (0, 1, 2, 70, 71)
    assert torch.equal(next(stream.sample(100))[SITE], found[SITE])
    text = TextTokens(["w5 w70 w6"], word_tokenizer(extra_special_tokens=["w5"]), context_length=3)
    assert ModelActivations(model, SITE, text).special_ids == (0, 1, 2, 5, 70, 71)  # of both tokenizers
    report = evaluate(model, sae, [IDS])
    assert report.tokens == 5 and report.tokens_left_out == 5
    attributed = attribute(model, sae, lambda output: output.logits[0, -1, 5], input_ids=IDS)
    assert attributed.activations[sae].dense().any(-1).nonzero()[:, 1].tolist() == [1, 3, 5, 7, 8]


def test_evaluation_leaves_out_the_special_tokens_that_the_sae_recorded(model):
    sae = make_sae()
    sae.config.special_token_ids = [5, 70]
    report = evaluate(model, sae, [IDS])
    assert report.tokens == 8 and report.special_token_ids == (5, 70)
    [found] = harvest(model, sae, [IDS])
    assert found.token_ids.tolist() == [71, 6, 2, 7, 1, 8, 9, 0]
    sae.config.special_token_ids = []  # trained on all of them
    everything = evaluate(model, sae, [IDS])
    assert everything.tokens == 10 and everything.tokens_left_out == 0


def edited(model, intervention, ids=IDS, **inputs):
    before = capture(model, SITE, input_ids=ids, **inputs)[SITE]
    with attach(model, intervention, check=False):
        after = capture(model, SITE, input_ids=ids, **inputs)[SITE]
    return (after != before).any(-1).nonzero()[:, 1].tolist()


def test_edits_leave_out_the_special_tokens_that_the_sae_recorded(model):
    sae = make_sae()
    assert edited(model, Splice(sae)) == [1, 3, 5, 7, 8]
    assert edited(model, ProjectOut(SITE, torch.ones(32))) == [1, 3, 5, 7, 8]
    sae.config.special_token_ids = [5, 70]
    assert edited(model, Splice(sae)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert edited(model, Splice(sae, positions=TokenIds([70, 71]))) == [2]
    assert edited(model, Splice(sae, special_tokens=True)) == list(range(10))
    assert edited(model, ProjectOut(SITE, torch.ones(32))) == [1, 3, 5, 7, 8]
    mask = torch.tensor([[0, 0, 0, *[1] * 7]])
    assert edited(model, Splice(sae), attention_mask=mask) == [3, 4, 5, 6, 7, 8, 9]  # padding is never edited
    sae.config.special_token_ids = []
    assert edited(model, Splice(sae)) == list(range(10))


def test_a_condition_is_not_met_at_special_tokens_that_the_sae_recorded(model):
    sae = make_sae()
    latents = capture(model, sae, input_ids=IDS)[sae][0]
    gate = int(latents[3].argmax())
    changed = int(latents[3].topk(2).indices[1])
    clamp = Clamp(sae, {changed: 50.0}, when={gate: float(latents[3, gate]) * 0.999}, window=3)
    assert 4 not in edited(model, clamp) and {3, 5} <= set(edited(model, clamp))
    sae.config.special_token_ids = [6]  # token 6 is at position 3
    assert not {3, 5} & set(edited(model, clamp))


def test_a_call_looks_up_special_tokens_once():
    ids = torch.tensor([[5, 6, 7, 5]])
    context = TokenContext(torch.arange(4)[None], torch.tensor([[4]]), None, "prompt", 4, ids=ids)
    assert context.special_among((5,)) is context.special_among([5])
    assert context.special_among([5]).tolist() == [[True, False, False, True]]
    assert context.special_among([]) is None and context.special_among(None) is None
    padded = dataclasses.replace(context, index=torch.tensor([[-1, 0, 1, 2]]), special=torch.ones(1, 4).bool())
    assert padded.special_among([7]).tolist() == [[True, False, True, False]]
    assert padded.special_among([]).tolist() == [[True, False, False, False]]
