"""Which tokens `positions` select in a plain forward: padding on either side, special tokens, packed rows."""

import inspect

import pytest
import torch
from transformers import StaticCache

from hf_gated_sae import Ablate, Clamp, Splice, Steer, attach, capture
from tests.hooks.support import (
    FAMILIES,
    active_latents,
    block,
    close,
    continuing,
    hand_made,
    logits_of,
    make_sae,
    model_of,
)

# One row of 6 real tokens, one of 4; 0 is padding, 1 is BOS, 2 is EOS.
LONG, SHORT = [1, 54, 33, 78, 90, 17], [60, 41, 2, 13]
LEFT = torch.tensor([[0, *LONG], [0, 0, 0, *SHORT]])
RIGHT = torch.tensor([[*LONG, 0], [*SHORT, 0, 0, 0]])
REAL = {"left": (LEFT != 0).long(), "right": (RIGHT != 0).long()}
IDS = {"left": LEFT, "right": RIGHT}
START = {"left": [1, 3], "right": [0, 0]}

# Positions that are edited by default, without special tokens, by row; they count real tokens.
CHOSEN = {
    "all": {0: [1, 2, 3, 4, 5], 1: [0, 1, 3]},
    "prompt": {0: [1, 2, 3, 4, 5], 1: [0, 1, 3]},
    "generated": {},
    "last_prompt": {0: [5], 1: [3]},
    (0, 2, 5): {0: [2, 5], 1: [0]},
    (-1, -3): {0: [3, 5], 1: [1, 3]},
    (-5,): {0: [1]},
    (): {},
}


def edit_of(positions, **settings):
    return Steer(make_sae(), 3, strength=6.0, unit="raw", positions=positions, **settings)


@pytest.mark.parametrize("side", IDS)
@pytest.mark.parametrize("positions", CHOSEN, ids=str)
def test_the_report_lists_the_selected_tokens(positions, side):
    model = model_of("llama")
    with attach(model, edit_of(positions)) as handle:
        logits_of(model, IDS[side], attention_mask=REAL[side])
    entry = handle.report().interventions[0]
    assert entry.positions == CHOSEN[positions]
    assert entry.edited == sum(map(len, CHOSEN[positions].values()))


@pytest.mark.parametrize("side", IDS)
@pytest.mark.parametrize("positions", CHOSEN, ids=str)
def test_exactly_the_selected_tokens_are_edited(positions, side):
    model, sae = model_of("llama"), make_sae()
    where = torch.zeros(2, 7, dtype=torch.bool)
    for row, places in CHOSEN[positions].items():
        for place in places:
            where[row, START[side][row] + place] = True
    with hand_made(block(model, "llama"), lambda x: x + where[..., None] * 6.0 * sae.W_dec[3]):
        expected = logits_of(model, IDS[side], attention_mask=REAL[side])
    with attach(model, edit_of(positions)):
        close(logits_of(model, IDS[side], attention_mask=REAL[side]), expected, 1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "recurrent_gemma"])
def test_padding_on_the_left_changes_no_real_token(family):
    """Except in recurrent_gemma, whose state runs through padding with and without edits."""
    model = model_of(family)
    sae = make_sae()
    latents = active_latents(model, sae)
    # As `generate` does: without position ids, some models treat padding as text.
    places = {"position_ids": (REAL["left"].cumsum(-1) - 1).clamp(min=0)}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        places = {}
    edits = [Clamp(sae, {latents[0]: 4.0}), Splice(sae, positions=[1, -1]), Ablate(sae, latents[1:], positions=[-2])]
    with attach(model, *edits):
        padded = logits_of(model, LEFT, attention_mask=REAL["left"], **places)
        for row, tokens in enumerate([LONG, SHORT]):
            close(padded[row, START["left"][row] :], logits_of(model, torch.tensor([tokens]))[0], 1e-3)


@pytest.mark.parametrize("side", IDS)
def test_special_tokens_and_padding_are_edited_on_request(side):
    model, sae = model_of("llama"), make_sae()
    with hand_made(block(model, "llama"), lambda x: x + 6.0 * sae.W_dec[3]):
        expected = logits_of(model, IDS[side], attention_mask=REAL[side])
    with attach(model, edit_of("all", special_tokens=True)) as handle:
        close(logits_of(model, IDS[side], attention_mask=REAL[side]), expected, 1e-5)
    assert handle.report().interventions[0].edited == 14
    with attach(model, edit_of([0, 2], special_tokens=True)) as handle:
        logits_of(model, IDS[side], attention_mask=REAL[side])
    assert handle.report().interventions[0].positions == {0: [0, 2], 1: [0, 2]}


@pytest.mark.parametrize("side", IDS)
def test_a_negative_position_before_the_first_token_does_not_select_padding(side):
    model = model_of("llama")
    with attach(model, edit_of([-5, -6], special_tokens=True)) as handle:
        logits_of(model, IDS[side], attention_mask=REAL[side])
    assert handle.report().interventions[0].positions == {0: [0, 1]}


def test_without_a_mask_every_token_is_real():
    model = model_of("llama")
    with attach(model, edit_of([0, 2], special_tokens=True)) as handle:
        logits_of(model, LEFT)
    assert handle.report().interventions[0].positions == {0: [0, 2], 1: [0, 2]}


def test_padding_is_left_out_with_embeddings_as_input():
    model = model_of("llama")
    with torch.no_grad(), attach(model, edit_of("all")) as handle:
        model(inputs_embeds=model.get_input_embeddings()(LEFT), attention_mask=REAL["left"])
    # Without ids, BOS and EOS are not recognised.
    assert handle.report().interventions[0].positions == {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3]}


def test_a_mask_that_covers_the_cache_is_read_at_the_columns_of_the_call():
    """A cached call with embeddings, whose mask also covers the cache."""
    model = model_of("llama")
    embeds = model.get_input_embeddings()(LEFT).detach()
    with torch.no_grad(), attach(model, edit_of("all")) as handle:
        first = model(inputs_embeds=embeds[:, :4], attention_mask=REAL["left"][:, :4], use_cache=True)
        model(inputs_embeds=embeds[:, 4:], attention_mask=REAL["left"], **continuing(model, first))
    assert handle.report().interventions[0].positions == {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3]}


def test_a_mask_as_wide_as_a_static_cache_is_read_at_the_columns_of_the_call():
    model = model_of("llama")
    mask = torch.cat([REAL["left"], torch.zeros(2, 5, dtype=torch.long)], dim=1)
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad(), attach(model, edit_of("all")) as handle:
        model(LEFT[:, :5], attention_mask=mask, use_cache=True, **continuing(model, cache))
        model(LEFT[:, 5:], attention_mask=mask, use_cache=True, **continuing(model, cache))
    assert handle.report().interventions[0].positions == CHOSEN["all"]


def test_packed_sequences_count_by_their_position_ids():
    model = model_of("llama")
    ids, places = torch.tensor([[11, 54, 33, 60, 41, 22]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with attach(model, edit_of([1])) as handle:
        logits_of(model, ids, position_ids=places)
    entry = handle.report().interventions[0]
    assert entry.edited == 2 and entry.positions == {0: [1]}


# Two sequences of 4 and 3 tokens in one row, separated only by position ids, as by DataCollatorWithFlattening.
PACKED = torch.tensor([[11, 54, 33, 78, 60, 41, 22]])
PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        ("all", range(7)),
        ("prompt", range(7)),
        ("last_prompt", [3, 6]),
        ([-1], [3, 6]),
        ([0, 3], [0, 3, 4]),
        (slice(-2, None), [2, 3, 5, 6]),
        (slice(1, 3), [1, 2, 5, 6]),
        ("generated", []),
    ],
    ids=str,
)
def test_packed_sequences_are_separate(positions, columns):
    model, sae = model_of("llama"), make_sae()
    where = torch.zeros(7, 1)
    where[list(columns)] = 6.0
    with hand_made(block(model, "llama"), lambda x: x + where * sae.W_dec[3]):
        expected = logits_of(model, PACKED, position_ids=PLACES)
    with attach(model, edit_of(positions)):
        close(logits_of(model, PACKED, position_ids=PLACES), expected, 1e-5)


def test_a_window_does_not_reach_into_the_next_sequence():
    model, sae = model_of("llama"), make_sae()
    kept = capture(model, sae, input_ids=PACKED, position_ids=PLACES)[sae][0]
    # Active at the end of the first sequence, inactive in the second.
    latent = int((kept[3] > 0).logical_and((kept[4:] == 0).all(0)).nonzero()[0])
    edit = Clamp(sae, {7: 9.0}, when={latent: 0.0}, window=4)
    with attach(model, edit, check=False) as handle:
        logits_of(model, PACKED, position_ids=PLACES, use_cache=False)
    [record] = handle.report().interventions
    first = [index for index in range(4) if (kept[max(index - 3, 0) : index + 1, latent] > 0).any()]
    assert record.edited == len(first) and record.positions == {0: first}


def test_position_ids_that_do_not_start_at_0_are_counted_from_0():
    model = model_of("llama")
    with attach(model, edit_of([0, -1])) as handle:
        logits_of(model, PACKED, position_ids=torch.arange(5, 12)[None])
    assert handle.report().interventions[0].positions == {0: [0, 6]}


def test_special_tokens_are_those_of_the_models_config():
    model = model_of("llama")
    before = model.config.bos_token_id
    model.config.bos_token_id, generation = 54, model.generation_config.bos_token_id
    model.generation_config.bos_token_id = 54
    try:
        with attach(model, edit_of("all")) as handle:
            logits_of(model, torch.tensor([[1, 54, 33]]))
    finally:
        model.config.bos_token_id, model.generation_config.bos_token_id = before, generation
    assert handle.report().interventions[0].positions == {0: [0, 2]}
