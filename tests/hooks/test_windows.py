"""Conditions that hold for a window of tokens: the same tokens are edited however the model computes them."""

import pytest
import torch

from hf_gated_sae import Ablate, Clamp, Scale, Splice, Steer, attach, capture
from hf_gated_sae.errors import AttachError, InputError
from tests.hooks.support import IDS, block, close, continuing, hand_made, logits_of, make_sae, model_of
from tests.support.tiny_models import tiny_model

DOUBLE = torch.float64
# Longer, so that windows end; 1 is BOS, a special token.
LONG = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(3))
LONG[:, 0] = 1
PADDED = torch.cat([torch.zeros(2, 3, dtype=torch.long), LONG], dim=1)
PADDED[1, 2] = 47
MASK = (PADDED != 0).long()
NEW = 6


def rare(model, sae, ids=LONG, start=1):
    """A latent, and a bound that it exceeds at three tokens from column `start` on."""
    latents = capture(model, sae, input_ids=ids)[sae][:, start:]
    top = latents.flatten(0, 1).sort(0, descending=True).values
    latent = int(((top[2] - top[3]) * (top[3] > 0)).argmax())
    return latent, float((top[2, latent] + top[3, latent]) / 2)


def opened(met, window):
    """Reference for one row: whether a window that was opened at or before each token is still open."""
    return [any(met[max(0, at - window + 1) : at + 1]) for at in range(len(met))]


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_the_condition_holds_for_the_window(window, special_tokens):
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    latent, bound = rare(model, sae)
    met = capture(model, sae, input_ids=LONG)[sae][..., latent] > bound
    assert met.any()
    if not special_tokens:
        met[:, 0] = False
    where = torch.tensor([opened(row, window) for row in met.tolist()])
    if not special_tokens:
        where[:, 0] = False
    with hand_made(block(model, "llama"), lambda x: x + where[..., None] * 2.0 * sae.W_dec[7]):
        expected = logits_of(model, LONG)
    edit = Steer(sae, 7, strength=2.0, unit="raw", when={latent: bound}, window=window, special_tokens=special_tokens)
    with attach(model, edit, check=False) as handle:
        close(logits_of(model, LONG), expected, 1e-12)
    report = handle.report().interventions[0]
    assert report.positions == {row: found for row, found in enumerate(places(where)) if found}


def places(where):
    return [row.nonzero().flatten().tolist() for row in where]


def test_all_of_a_condition_must_be_met_at_one_token():
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    latents = capture(model, sae, input_ids=LONG)[sae]
    on = latents > 0
    pairs = [(a, b) for a in range(64) for b in range(64) if on[..., a].any() and on[..., b].any()]
    a, b = next((a, b) for a, b in pairs if not (on[..., a] & on[..., b])[:, 1:].any() and on[:, 1:, a].any())
    for when, edited in (({a: 0.0}, True), ({a: 0.0, b: 0.0}, False)):
        with attach(model, Scale(sae, {7: 2.0}, when=when, window=100), check=False) as handle:
            logits_of(model, LONG)
        assert bool(handle.report().interventions[0].edited) is edited


def test_a_special_token_opens_no_window():
    model, sae = model_of("llama"), make_sae()
    latents = capture(model, sae, input_ids=LONG)[sae]
    # Above the bound at BOS, and nowhere else.
    latent = int((latents[:, 0].amin(0) - latents[:, 1:].amax((0, 1))).argmax())
    bound = float(latents[:, 1:, latent].max()) + 1e-3
    assert (latents[:, 0, latent] > bound).any()
    for special_tokens in (False, True):
        edit = Clamp(sae, {7: 9.0}, when={latent: bound}, window=4, special_tokens=special_tokens)
        with attach(model, edit, check=False) as handle:
            logits_of(model, LONG)
        assert bool(handle.report().interventions[0].edited) is special_tokens


def generate(model, ids=LONG, **settings):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(ids, return_dict_in_generate=True, output_scores=True, **settings)


WAYS = {
    "no cache": {"use_cache": False},
    "chunks of 1": {"prefill_chunk_size": 1},
    "chunks of 5": {"prefill_chunk_size": 5},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("positions", ["all", "generated", "prompt", slice(3, None)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_all_ways_of_decoding_give_the_same(way, positions):
    model, sae = model_of("llama"), make_sae()
    latent, bound = rare(model, sae)
    edit = Steer(sae, 7, strength=6.0, unit="raw", when={latent: bound}, window=8, positions=positions)
    with attach(model, edit, check=False) as handle:
        expected = generate(model)
        edited = handle.report().interventions[0]
    assert edited.edited > 0, "no token was edited, so the test compares nothing"
    with attach(model, edit, check=False) as handle:
        found = generate(model, **WAYS[way])
        assert handle.report().interventions[0].positions == edited.positions
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        finite = torch.isfinite(other)
        close(one[finite], other[finite], 1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
def test_left_padding_changes_no_token(family):
    model, sae = model_of(family), make_sae()
    latent, bound = rare(model, sae, PADDED[:, 3:])
    edit = Steer(sae, 7, strength=6.0, unit="raw", when={latent: bound}, window=4)
    with attach(model, edit, check=False) as handle:
        padded = generate(model, PADDED, attention_mask=MASK)
        report = handle.report().interventions[0].positions
    assert report
    for row in range(2):
        alone = PADDED[row : row + 1, int((MASK[row] == 0).sum()) :]
        with attach(model, edit, check=False) as handle:
            single = generate(model, alone)
            assert handle.report().interventions[0].positions.get(0) == report.get(row)
        assert torch.equal(padded.sequences[row, -NEW:], single.sequences[0, -NEW:])


@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant"])
def test_rejected_drafts_are_forgotten(drafts):
    model, sae = model_of("gpt2"), make_sae()
    ids = torch.tensor([[11, 54, 33, 78, 11, 54, 33, 78, 11, 54, 33]])
    settings = dict(max_new_tokens=16, min_new_tokens=16)
    latent, bound = rare(model, sae, generate(model, ids, **settings).sequences, start=ids.shape[1])
    by = {"assistant_model": tiny_model("gpt2", seed=1)} if drafts == "assistant" else {"prompt_lookup_num_tokens": 4}
    edit = Steer(sae, 7, strength=6.0, unit="raw", when={latent: bound}, window=3, positions="generated")
    with attach(model, edit, check=False) as handle:
        expected = generate(model, ids, **settings)
        assert handle.report().interventions[0].edited
        found = generate(model, ids, **settings, **by)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_custom_decoding_loop():
    model, sae = model_of("llama"), make_sae()
    latent, bound = rare(model, sae)
    edit = Steer(sae, 7, strength=6.0, unit="raw", when={latent: bound}, window=6)
    with attach(model, edit, check=False), torch.no_grad():
        expected = model(input_ids=LONG).logits
        cache, parts = {}, []
        for start in range(0, LONG.shape[1], 3):
            output = model(input_ids=LONG[:, start : start + 3], **cache, use_cache=True)
            cache = continuing(model, output)
            parts.append(output.logits)
    close(torch.cat(parts, 1), expected, 1e-4)


def test_several_sequences_of_each_row_keep_their_own_history():
    model, sae = model_of("llama"), make_sae()
    latent, bound = rare(model, sae)
    edit = Steer(sae, 7, strength=6.0, unit="raw", when={latent: bound}, window=3)
    texts = []
    with attach(model, edit, check=False):
        for use_cache in (True, False):
            torch.manual_seed(5)
            texts.append(generate(model, do_sample=True, num_return_sequences=3, use_cache=use_cache).sequences)
    assert torch.equal(*texts)


def test_beams_are_refused_only_with_a_cache():
    model, sae = model_of("gpt2"), make_sae()
    edit = Clamp(sae, {7: 9.0}, when={3: 0.0}, window=4)
    for settings in ({"num_beams": 3}, {"generation_config": beams(model)}):
        with (
            attach(model, edit, check=False),
            pytest.raises(AttachError, match=r"beam search reorders .* num_beams=1"),
        ):
            generate(model, IDS, **settings)
    with attach(model, edit, check=False):
        generate(model, IDS, num_beams=3, use_cache=False)
    with attach(model, Clamp(sae, {7: 9.0}, when={3: 0.0}), check=False):
        generate(model, IDS, num_beams=3)


def beams(model):
    return type(model.generation_config)(num_beams=2, pad_token_id=0, eos_token_id=2)


def test_earlier_caches_and_packed_rows_are_refused():
    model, sae = model_of("llama"), make_sae()
    edit = Clamp(sae, {7: 9.0}, when={3: 0.0}, window=4)
    with torch.no_grad():
        cache = model(input_ids=LONG, use_cache=True)
    with attach(model, edit, check=False), pytest.raises(AttachError, match="begin with an empty cache"):
        logits_of(model, LONG[:, :2], **continuing(model, cache))
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "cu_seq_lens_q": torch.tensor([0, 3, 6])}
    with attach(model, edit, check=False), pytest.raises(AttachError, match="packs several sequences"):
        logits_of(model, IDS[:1], **packed)


@pytest.mark.parametrize("window", [0, -1, 2.5, None, True, [1, 2]])
def test_invalid_windows_are_refused(window):
    with pytest.raises(InputError, match=r"Ablate was given window=.*1 or more"):
        Ablate(make_sae(), [1], when={3: 0.0}, window=window)


def test_a_window_needs_a_condition():
    with pytest.raises(InputError, match="without when="):
        Ablate(make_sae(), [1], window=3)


def test_nan_latents_of_padding_open_no_window_and_are_not_an_error():
    model, sae = model_of("llama"), make_sae()
    edit = Clamp(sae, {7: 9.0}, when={3: 1e9}, window=50)

    def ruined(x):
        return x.masked_fill((MASK == 0)[..., None], torch.nan)

    with hand_made(block(model, "llama", 0).mlp, lambda x: x), attach(model, edit, Splice(sae), check=False) as handle:
        with hand_made(block(model, "llama", 1).mlp, ruined):
            logits_of(model, PADDED, attention_mask=MASK)
    assert handle.report().interventions[0].edited == 0
    with attach(model, edit, check=False), pytest.raises(AttachError, match="Clamp put NaN"):
        with hand_made(block(model, "llama", 1).mlp, lambda x: x * torch.nan):
            logits_of(model, PADDED, attention_mask=MASK)
