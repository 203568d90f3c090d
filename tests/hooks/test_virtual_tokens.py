"""PEFT's prompt and prefix tuning put virtual tokens before the prompt; positions are those of the text."""

import contextlib
import functools

import peft
import pytest
import torch

from hf_gated_sae import Patch, TokenIds, attach, capture
from hf_gated_sae.errors import AttachError
from tests.hooks.support import IDS, continuing, hooks_on, steer
from tests.support.tiny_models import tiny_model

# PEFT reads an attribute that transformers renamed, and ignores the position ids that generate() passes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

METHODS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
COLUMNS = torch.tensor([True, False, False, True, False, False])


def wrapped(method):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model("llama"), METHODS[method]).eval()


@functools.cache
def knows_the_cache():
    """Whether PEFT inserts its virtual tokens once per generation, and not before every token."""
    model, count = wrapped("prompt"), []
    made = model.get_prompt
    model.get_prompt = lambda *args, **kwargs: (count.append(1), made(*args, **kwargs))[1]
    model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return len(count) == 1


def right_or_refused(use_cache=True):
    """Expect an error where PEFT misuses the cache of this version of transformers, and none elsewhere."""
    if knows_the_cache() or not use_cache:
        return contextlib.nullcontext()
    return pytest.raises(AttachError, match="several caches|between tokens")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3]}),
        ("last_prompt", {0: [5], 1: [3]}),
        ([0], {0: [0], 1: [0]}),
        ([-1], {0: [5], 1: [3]}),
        (slice(1, 3), {0: [1, 2], 1: [1, 2]}),
        (TokenIds([54, 13]), {0: [1], 1: [1]}),
        (COLUMNS, {0: [0, 3], 1: [1]}),
    ],
    ids=str,
)
def test_positions_of_a_forward(method, positions, expected):
    model = wrapped(method)
    with torch.no_grad(), attach(model, steer(positions=positions)) as handle:
        model(input_ids=IDS, attention_mask=MASK)
        model(IDS, MASK)
    record = handle.report().interventions[0]
    assert record.positions == expected
    assert record.edited == 2 * sum(map(len, expected.values()))


def test_without_a_mask_nothing_is_padding():
    model = wrapped("prompt")
    with torch.no_grad(), attach(model, steer(positions=[0, -1])) as handle:
        model(input_ids=IDS)
    assert handle.report().interventions[0].positions == {0: [0, 5], 1: [0, 5]}


@pytest.mark.parametrize(("method", "use_cache"), [("prompt", True), ("prompt", False), ("prefix", True)])
@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("generated", {0: [6, 7], 1: [4, 5]}),
        ("prompt", {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3]}),
        ([0, -1], {0: [0, 5], 1: [0, 3]}),
    ],
    ids=str,
)
def test_positions_of_a_generation(method, use_cache, positions, expected):
    model = wrapped(method)
    with right_or_refused(use_cache), attach(model, steer(positions=positions)) as handle:
        model.generate(
            input_ids=IDS,
            attention_mask=MASK,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            use_cache=use_cache,
        )
        assert handle.report().interventions[0].positions == expected


@pytest.mark.parametrize(("method", "use_cache"), [("prompt", True), ("prompt", False), ("prefix", True)])
def test_the_guidance_calls_of_a_generation_have_no_virtual_tokens(method, use_cache):
    """Classifier-free guidance calls the model itself, beginning with the negative prompt."""
    model = wrapped(method)
    negative = IDS[:, :3]
    with right_or_refused(use_cache), attach(model, steer(positions="last_prompt")) as handle:
        model.generate(
            input_ids=IDS,
            guidance_scale=2.0,
            negative_prompt_ids=negative,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            use_cache=use_cache,
        )
        record = handle.report().interventions[0]
        assert record.positions == {0: [2, 5], 1: [2, 5]}
        assert record.edited == (4 if use_cache else 16)


@pytest.mark.parametrize("method", METHODS)
def test_the_columns_of_a_patch_are_those_of_the_text(method):
    model, site = wrapped(method), "resid_post.1"
    value = torch.arange(2 * 4 * 32.0).reshape(2, 4, 32)
    clean = capture(model, site, input_ids=IDS)[site]
    for special_tokens in (False, True):  # a patch has no values for virtual tokens
        with attach(model, Patch(site, value, special_tokens=special_tokens)) as handle:
            found = capture(model, site, input_ids=IDS)[site]
            model(input_ids=IDS)
        assert torch.equal(found[:, -6:-2], value)
        assert torch.equal(found[:, :-6], clean[:, :-6]) and torch.equal(found[:, -2:], clean[:, -2:])
        assert handle.report().interventions[0].positions == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    with pytest.raises(AttachError, match="10 columns, and the model went through 6"), torch.no_grad():
        with attach(model, Patch(site, torch.ones(2, 10, 32))):
            model(input_ids=IDS)


def test_a_patch_continues_into_a_generation():
    model, site = wrapped("prompt"), "resid_post.1"
    with right_or_refused(), attach(model, Patch(site, torch.ones(2, 7, 32))) as handle:
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, min_new_tokens=3)
        assert handle.report().interventions[0].positions == {row: [0, 1, 2, 3, 4, 5, 6] for row in range(2)}


def test_the_wrapped_model_called_directly_has_no_virtual_tokens():
    model = wrapped("prompt")
    with torch.no_grad(), attach(model, steer(positions=[0, -1])) as handle:
        model(input_ids=IDS)
        model.get_base_model()(inputs_embeds=model.get_base_model().get_input_embeddings()(IDS))
    assert handle.report().interventions[0].edited == 8


@pytest.mark.parametrize("method", METHODS)
def test_the_wrapper_may_be_called_if_the_wrapped_model_was_attached_to(method):
    model = wrapped(method)
    with torch.no_grad(), attach(model.get_base_model(), steer(positions=[0, -1])) as handle:
        model(input_ids=IDS, attention_mask=MASK)
    assert handle.report().interventions[0].positions == {0: [0, 5], 1: [0, 3]}


def test_virtual_tokens_between_tokens_are_refused():
    model = wrapped("prompt")
    with torch.no_grad(), attach(model, steer()):
        cache = model(input_ids=IDS, use_cache=True)
        with pytest.raises(AttachError, match="between tokens"):
            model(input_ids=IDS[:, :1], **continuing(model.get_base_model(), cache))


def test_no_hooks_are_left_on_the_wrapper():
    model = wrapped("prompt")
    with attach(model, steer()):
        assert hooks_on(model)[0].keys() >= {"", "base_model"}
    assert hooks_on(model) == ({}, [])


def test_the_wrapper_may_be_attached_to_after_the_wrapped_model():
    model = wrapped("prompt")
    with torch.no_grad(), attach(model.get_base_model(), steer()), attach(model, steer(positions=[0])) as handle:
        model(input_ids=IDS)
    assert handle.report().interventions[0].positions == {0: [0], 1: [0]}
    assert hooks_on(model) == ({}, [])


@pytest.mark.parametrize(("method", "before"), [("prompt", 4), ("prefix", 0)])
def test_the_first_position_is_the_first_token_of_the_text(method, before):
    model = wrapped(method)
    with torch.no_grad():
        clean = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[2]
        with attach(model, steer(positions=[0])):
            edited = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[2]
    assert (edited != clean).any(-1).nonzero().tolist() == [[0, before], [1, before + 2]]
