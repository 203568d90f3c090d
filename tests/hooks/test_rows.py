"""Which tokens and rows are edited: spans, token ids, masks and rows, in plain forwards and in `generate`."""

import pytest
import torch

from hf_gated_sae import Clamp, Splice, Steer, TokenIds, attach
from hf_gated_sae.errors import AttachError, InputError
from tests.hooks.support import IDS, active_latents, block, close, hand_made, logits_of, make_sae, model_of

# One row of 6 real tokens, one of 4; 0 is padding, 1 is BOS, 2 is EOS.
LONG, SHORT = [1, 54, 33, 78, 90, 17], [60, 41, 2, 13]
LEFT = torch.tensor([[0, *LONG], [0, 0, 0, *SHORT]])
MASK = (LEFT != 0).long()
COLUMNS = torch.tensor([[1, 1, 1, 0, 0, 1, 0], [1, 1, 0, 1, 0, 0, 1]]) > 0
NEW = 4

# The positions, what they edit by default in the left-padded prompts, and in the 3 generated tokens that are inputs.
CHOSEN = {
    "span": (slice(1, 3), {0: [1, 2], 1: [1]}, []),
    "span without an end": (slice(2, None), {0: [2, 3, 4, 5], 1: [3]}, [0, 1, 2]),
    "span without a beginning": (slice(None, 2), {0: [1], 1: [0, 1]}, []),
    "span of everything": (slice(None), {0: [1, 2, 3, 4, 5], 1: [0, 1, 3]}, [0, 1, 2]),
    "span before the prompt's end": (slice(-3, -1), {0: [3, 4], 1: [1]}, []),
    "span from before the prompt's end on": (slice(-1, None), {0: [5], 1: [3]}, [0, 1, 2]),
    "span to before the prompt's end": (slice(None, -3), {0: [1, 2], 1: [0]}, []),
    "span from the beginning to before the end": (slice(1, -1), {0: [1, 2, 3, 4], 1: [1]}, []),
    "span from beyond the prompt": (slice(-500, 2), {0: [1], 1: [0, 1]}, []),
    "last two of the prompt": (range(-2, 0), {0: [4, 5], 1: [3]}, []),
    "token ids": (TokenIds([33, 13, 90]), {0: [2, 4], 1: [3]}, None),
    "special token ids": (TokenIds([1, 2, 0]), {}, []),
    "mask of each row": (COLUMNS, {0: [1, 4], 1: [0, 3]}, []),
    "mask of the columns": (COLUMNS[1], {0: [2, 5], 1: [0, 3]}, []),
}


def edit_of(positions, **settings):
    return Steer(make_sae(), 3, strength=6.0, unit="raw", positions=positions, **settings)


@pytest.mark.parametrize("case", CHOSEN)
def test_exactly_the_selected_tokens_are_edited(case):
    positions, chosen, _ = CHOSEN[case]
    model, sae = model_of("llama"), make_sae()
    where = torch.zeros(2, 7, dtype=torch.bool)
    for row, places in chosen.items():
        where[row, [(1, 3)[row] + place for place in places]] = True
    with hand_made(block(model, "llama"), lambda x: x + where[..., None] * 6.0 * sae.W_dec[3]):
        expected = logits_of(model, LEFT, attention_mask=MASK)
    with attach(model, edit_of(positions), check=False) as handle:
        close(logits_of(model, LEFT, attention_mask=MASK), expected, 1e-5)
    assert handle.report().interventions[0].positions == chosen


WAYS = [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}, {"num_beams": 2}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("case", [case for case in CHOSEN if CHOSEN[case][2] is not None])
def test_the_same_tokens_are_edited_in_a_generation(case, way):
    positions, chosen, generated = CHOSEN[case]
    model = model_of("llama")
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, attention_mask=MASK, **way)
    with attach(model, edit_of(positions), check=False) as handle:
        model.generate(LEFT, **settings)
    times = way.get("num_beams", 1)
    expected = {
        row * times + copy: [*chosen.get(row, []), *(len((LONG, SHORT)[row]) + place for place in generated)]
        for row in range(2)
        for copy in range(times)
    }
    found = handle.report().interventions[0].positions
    # A generated token may be EOS, which is left out.
    for row, places in expected.items():
        prompt = len((LONG, SHORT)[row // times])
        assert [place for place in found.get(row, []) if place < prompt] == [p for p in places if p < prompt]
        assert set(found.get(row, [])) <= set(places)


def test_generated_tokens_are_found_by_their_ids():
    model = model_of("llama")
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    plain = model.generate(IDS, **settings)
    wanted = int(plain[0, 7])
    edit = Steer(make_sae(), 3, strength=1e-6, unit="raw", positions=TokenIds(wanted))
    for use_cache in (True, False):
        with attach(model, edit, check=False) as handle:
            text = model.generate(IDS, use_cache=use_cache, **settings)
        assert torch.equal(text, plain)
        expected = {row: (text[row, :-1] == wanted).nonzero().flatten().tolist() for row in range(2)}
        assert handle.report().interventions[0].positions == {row: at for row, at in expected.items() if at}


def test_each_row_gets_its_own_edits():
    model, sae = model_of("gpt2"), make_sae()
    a, b = active_latents(model, sae)[:2]
    first, second = Clamp(sae, {a: 7.0}, rows=0), Clamp(sae, {b: 5.0}, rows=[1])
    with attach(model, first, second, check=False) as handle:
        together = logits_of(model)
    assert [list(entry.positions) for entry in handle.report().interventions] == [[0], [1]]
    for row, alone in enumerate((Clamp(sae, {a: 7.0}), Clamp(sae, {b: 5.0}))):
        with attach(model, alone, check=False):
            close(together[row : row + 1], logits_of(model, IDS[row : row + 1]), 1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}],
    ids=str,
)
def test_rows_include_all_sequences_generated_from_them(settings):
    model, sae = model_of("gpt2"), make_sae()
    with attach(model, edit_of("all", rows=1), Splice(sae, rows=(0,)), check=False) as handle:
        model.generate(IDS, max_new_tokens=3, **settings)
    copies = settings.get("num_beams", settings.get("num_return_sequences", 1))
    found = [sorted(entry.positions) for entry in handle.report().interventions]
    assert found == [list(range(copies, 2 * copies)), list(range(copies))]


@pytest.mark.parametrize("rows", [-1, [], [0, -2], 0.5, "0", True])
def test_invalid_rows_are_refused(rows):
    with pytest.raises(InputError, match="rows is"):
        edit_of("all", rows=rows)


@pytest.mark.parametrize(
    "positions", [slice(0, 5, 2), slice(0.5, 2), slice("a"), slice(3, 3), slice(4, 2), slice(-1, -3), slice(True, 3)]
)
def test_invalid_spans_are_refused(positions):
    with pytest.raises(InputError, match="positions is slice"):
        edit_of(positions)


@pytest.mark.parametrize("ids", [[], [-1], [0.5], "the", None, True])
def test_invalid_token_ids_are_refused(ids):
    with pytest.raises(InputError, match="TokenIds was given"):
        TokenIds(ids)


def test_token_ids_are_refused_with_embeddings_as_input():
    model = model_of("llama")
    embeds = model.get_input_embeddings()(IDS).detach()
    with attach(model, edit_of(TokenIds([33])), check=False), pytest.raises(AttachError, match="with embeddings"):
        with torch.no_grad():
            model(inputs_embeds=embeds)


def test_masks_and_spans_from_the_prompts_end_are_refused_for_packed_rows():
    model = model_of("llama")
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "cu_seq_lens_q": torch.tensor([0, 3, 6])}
    for positions in (COLUMNS[0, :6], slice(-2, None)):
        with attach(model, edit_of(positions), check=False), pytest.raises(AttachError, match="packs several"):
            logits_of(model, IDS[:1], **packed)
    with attach(model, edit_of(slice(1, None)), check=False) as handle:
        logits_of(model, IDS[:1], **packed)
    assert handle.report().interventions[0].edited == 4


def test_changing_a_mask_afterwards_has_no_effect():
    model, mask = model_of("llama"), torch.tensor([True, False] * 3)
    with attach(model, edit_of(mask), check=False):
        before = logits_of(model)
        mask.fill_(True)
        assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("positions", [[2, 50], 50, slice(50, 60)])
def test_positions_that_were_never_reached_are_an_error_at_the_end(positions):
    model = model_of("llama")
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, attention_mask=MASK)
    with pytest.raises(AttachError, match=r"positions \[50\] of Steer .* longest row had 9 tokens"):
        with attach(model, edit_of(positions), check=False):
            model.generate(LEFT, **settings)
    with attach(model, edit_of(8), check=False) as handle:
        model.generate(LEFT, **settings)
    assert handle.report().interventions[0].positions == {0: [8]}
    with pytest.raises(KeyError), attach(model, edit_of(positions), check=False):
        logits_of(model)
        raise KeyError  # the first error must not be hidden
    with attach(model, edit_of(positions), check=False):
        pass  # nothing ran
