"""Which arguments of a model's call are recognised, by their type or by proof, and which are refused."""

import functools
import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from hf_gated_sae import Steer, attach, capture
from hf_gated_sae.errors import AttachError
from hf_gated_sae.hooks import running_call
from hf_gated_sae.hooks.continuation import facts_of
from tests.hooks.support import IDS, cache_name, continuing, logits_of, make_sae, model_of, steer
from tests.support.tiny_models import TINY_NAMES, tiny_model


def renamed(model, **names):
    """Rename arguments of a model, as a later release may."""
    forward = type(model).forward

    @functools.wraps(forward)
    def later(self, *args, **kwargs):
        return forward(self, *args, **{names.get(name, name): value for name, value in kwargs.items()})

    model.__class__ = type("Later", (type(model),), {"forward": later})
    return model


def test_a_cache_is_recognised_under_any_argument_name():
    model = renamed(tiny_model("llama"), memory_bank=cache_name(tiny_model("llama")))
    with torch.no_grad(), attach(model, steer(positions=[4, 5])) as handle:
        cache = DynamicCache()
        model(IDS[:, :4], use_cache=True, memory_bank=cache)
        model(IDS[:, 4:], use_cache=True, memory_bank=cache)
    assert handle.report().interventions[0].positions == {0: [4, 5], 1: [4, 5]}


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("padding_mask", torch.ones(2, 6), "padding_mask= .* the padding mask"),
        ("positions", torch.arange(6).expand(2, 6), "positions= .* the positions of the tokens"),
        ("past", ((torch.ones(2, 4, 3, 8), torch.ones(2, 4, 3, 8)),) * 3, "past=, a tuple .* may be a cache"),
        ("layers", [[torch.ones(2, 4, 3, 8)] * 2] * 3, "layers=, a list .* may be a cache"),
    ],
)
def test_unknown_arguments_that_may_be_a_cache_a_mask_or_positions_are_refused(name, value, match):
    model = renamed(tiny_model("llama"), **{name: "ignored"})
    with torch.no_grad(), attach(model, steer()), pytest.raises(AttachError, match=match):
        model(IDS, **{name: value})


def test_arguments_about_other_inputs_are_accepted():
    called = {"input_ids": IDS, "encoder_hidden_states": (torch.ones(2, 3, 4),), "image_mask": torch.ones(2, 9)}
    assert running_call.read(called).cache is None
    assert running_call.read({**called, "logits_to_keep": 1, "cross_attention_mask": torch.ones(2, 9)}).mask is None


def test_two_caches_are_refused_and_one_under_two_names_is_one():
    one = DynamicCache()
    assert running_call.read({"input_ids": IDS, "cache": one, "past_key_values": one}).cache is one
    with pytest.raises(AttachError, match="several caches, cache=, past_key_values="):
        running_call.read({"input_ids": IDS, "cache": one, "past_key_values": DynamicCache()})


@pytest.mark.parametrize("family", TINY_NAMES)
def test_facts_proven_about_calls_hold_for_every_family(family):
    try:
        model = tiny_model(family)
    except ValueError:
        pytest.skip("this transformers does not have the family")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in transformers 5.16, a cache changes doge's logits
        try:
            capture(model, "resid_post.0", input_ids=IDS)
        except LookupError:
            pass  # there is no such site; calls are proven anyway
    facts = facts_of(model)
    assert facts.wrong is None
    assert facts.caches == (("state",) if family == "rwkv" else ())
    if facts.padding is None:  # then padding on the left changes no logits
        mask = torch.ones(2, 8, dtype=torch.long)
        mask[:, :2] = 0
        padded = logits_of(model, torch.cat([torch.zeros_like(IDS[:, :2]), IDS], 1), attention_mask=mask)
        assert torch.allclose(padded[:, 2:], logits_of(model), atol=1e-3)


class Miscounting(DynamicCache):
    """A cache of a later release that counts something other than tokens."""

    def get_seq_length(self, *args, **kwargs):
        return super().get_seq_length(*args, **kwargs) // 2


def test_a_cache_that_miscounts_tokens_is_an_error_when_attaching(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.DynamicCache", Miscounting)
    with pytest.raises(AttachError, match=r"read as positions .* but are \[4, 5, 6\].*update hf-gated-sae"):
        attach(model, steer())


def test_a_cache_that_is_silently_dropped_is_an_error_when_attaching():
    model = tiny_model("llama")
    name = cache_name(model)

    class Dropping(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            kwargs.pop(name, None)
            return super().forward(input_ids, **kwargs)

    model.__class__ = Dropping
    with pytest.raises(AttachError, match="the cache holds 3 tokens afterwards, not 7"):
        attach(model, steer())


def test_a_model_whose_cache_changes_its_logits_is_warned_about_once(monkeypatch):
    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids, **kwargs)
            if input_ids.shape[1] < 6:
                output.logits = output.logits * 2
            return output

    model = tiny_model("llama")
    model.__class__ = Forgetful
    with pytest.warns(UserWarning, match="computes other logits with its cache than without one"):
        attach(model, steer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, steer())


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_a_cached_step_of_unknown_position_is_refused(family):
    """The caches of recurrent models do not say how many tokens they hold."""
    model = model_of(family)
    with torch.no_grad():
        before = model(IDS[:, :4], use_cache=True)
        with attach(model, steer()), pytest.raises(AttachError, match="begin with an empty cache"):
            model(IDS[:, 4:5], use_cache=True, **continuing(model, before))
        with attach(model, steer(positions=[4])) as handle:
            first = model(IDS[:, :4], use_cache=True)
            model(IDS[:, 4:5], use_cache=True, **continuing(model, first))
    assert handle.report().interventions[0].positions == {0: [4], 1: [4]}


def test_padding_on_the_left_is_warned_about_where_it_changes_the_logits():
    ids, mask = torch.cat([IDS[:, :1] * 0, IDS], 1), torch.ones(2, 7, dtype=torch.long)
    mask[:, 0] = 0
    for family, places in (
        ("gpt2", {}),
        ("gpt2", {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}),
        ("llama", {}),
    ):
        model = tiny_model(family)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with attach(model, Steer(make_sae(), 3, strength=1.0, unit="raw")):
                for _ in range(2):
                    logits_of(model, ids, attention_mask=mask, **places)
        seen = [str(each.message) for each in seen if "padding on the left" in str(each.message)]
        assert len(seen) == (1 if family == "gpt2" and not places else 0)
        assert all("pass position_ids=" in each for each in seen)
