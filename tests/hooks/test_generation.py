"""In `generate` the same tokens are edited however the model computes them."""

from contextvars import ContextVar

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, RwkvConfig, RwkvForCausalLM

from hf_gated_sae import Ablate, Clamp, Splice, Steer, TokenIds, attach
from hf_gated_sae.errors import AttachError
from tests.hooks.support import (
    FAMILIES,
    IDS,
    active_latents,
    block,
    close,
    continuing,
    hand_made,
    logits_of,
    make_sae,
    model_of,
)
from tests.support.tiny_models import tiny_model

NEW = 5
PROMPT = IDS.shape[1]
# The same two prompts with padding on the left.
PADDED = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
PADDED[1, 2] = 47
MASK = (PADDED != 0).long()
POSITIONS = ["all", "prompt", "generated", "last_prompt", [0, PROMPT - 1, PROMPT + 1], [-2]]


def generate(model, ids=IDS, **settings):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(ids, output_scores=True, return_dict_in_generate=True, **settings)


def same(one, other, relative=1e-4):
    assert torch.equal(one.sequences, other.sequences)
    for a, b in zip(one.scores, other.scores, strict=True):
        finite = torch.isfinite(b)
        close(a[finite], b[finite], relative)


def selected(positions, prompt, index):
    """Reference: whether `positions` select the token at an index of its row."""
    if isinstance(positions, str):
        return {
            "all": True,
            "prompt": index < prompt,
            "generated": index >= prompt,
            "last_prompt": index == prompt - 1,
        }[positions]
    return index in [p if p >= 0 else prompt + p for p in positions]


def edit_of(sae, positions="generated"):
    return Steer(sae, 3, strength=6.0, unit="raw", positions=positions, special_tokens=True)


def step_by_step(model, family, sae, positions, ids=IDS, steps=NEW):
    """Reference: greedy decoding without a cache, edited by a hand-written hook."""
    prompt = ids.shape[1]
    scores = []
    for _ in range(steps):
        length = ids.shape[1]
        where = torch.tensor([selected(positions, prompt, index) for index in range(length)])
        with hand_made(block(model, family), lambda x: x + where[:, None] * 6.0 * sae.W_dec[3]):
            logits = logits_of(model, ids)[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        scores.append(logits)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids, scores


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba", "mpt", "recurrent_gemma"])
def test_generation_edits_exactly_the_selected_tokens(family, positions):
    model, sae = model_of(family), make_sae()
    ids, scores = step_by_step(model, family, sae, positions)
    with attach(model, edit_of(sae, positions)):
        cached = generate(model)
        uncached = generate(model, use_cache=False)
    for given in (cached, uncached):
        assert torch.equal(given.sequences, ids)
        for a, b in zip(given.scores, scores, strict=True):
            finite = torch.isfinite(b)
            close(a[finite], b[finite], 1e-4)
    assert not torch.equal(generate(model).scores[-1], cached.scores[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_and_without_cache_are_the_same(family):
    model, sae = model_of(family), make_sae()
    latents = active_latents(model, sae)
    with attach(
        model, Clamp(sae, {latents[0]: 4.0}, positions="generated"), Ablate(sae, latents[1:], positions=[1, 7])
    ):
        same(generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_text_longer_than_the_attention_window(family):
    """The cache holds fewer tokens than were seen."""
    model, sae = tiny_model(family, sliding_window=4), make_sae()
    with attach(model, edit_of(sae, [1, 6, 8, 9]), edit_of(make_sae(seed=5), "generated")) as handle:
        same(generate(model), generate(model, use_cache=False))
        same(generate(model, prefill_chunk_size=3), generate(model))
        places = [entry.positions[0] for entry in handle.report().interventions]
    assert places == [[1, 6, 8, 9], [6, 7, 8, 9]]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_a_model_whose_cache_is_a_list_of_tensors(positions):
    """RWKV's cache is a list of states without positions. (One row: with two, RWKV mixes up their states.)"""
    config = RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32)
    config.eos_token_id = 2
    torch.manual_seed(0)
    model, sae = RwkvForCausalLM(config).eval(), make_sae(site="rwkv.blocks.1.output")
    with attach(model, edit_of(sae, positions)) as handle:
        same(generate(model, IDS[:1]), generate(model, IDS[:1], use_cache=False))
    expected = [index for index in range(PROMPT + NEW - 1) if selected(positions, PROMPT, index)]
    assert handle.report().interventions[0].positions[0] == expected


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom", "opt", "mamba"])
def test_left_padding_changes_no_token(family, positions):
    model, sae = model_of(family), make_sae()
    edit = Steer(sae, 3, strength=6.0, unit="raw", positions=positions)
    with attach(model, edit) as handle:
        padded = generate(model, PADDED, attention_mask=MASK)
        report = handle.report().interventions[0].positions
    for row in range(2):
        alone = PADDED[row : row + 1, int((MASK[row] == 0).sum()) :]
        with attach(model, edit) as handle:
            single = generate(model, alone)
            assert handle.report().interventions[0].positions[0] == report[row]
        for step in range(NEW):
            close(padded.scores[step][row, 3:], single.scores[step][0, 3:], 1e-3)
        assert torch.equal(padded.sequences[row, -NEW:], single.sequences[0, -NEW:])


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_chunk_size": 2},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_all_ways_of_decoding_give_the_same(settings, positions):
    model, sae = model_of("llama"), make_sae()
    # Prompt lookup takes one row, and finds drafts only in text that repeats.
    ids = torch.tensor([[11, 54, 33, 11, 54, 33, 11, 54]]) if "prompt_lookup_num_tokens" in settings else IDS
    with attach(model, edit_of(sae, positions)):
        same(generate(model, ids, **settings), generate(model, ids))


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_static_cache_with_left_padding(family, positions):
    model, sae = model_of(family), make_sae()
    with attach(model, Steer(sae, 3, strength=6.0, unit="raw", positions=positions)) as handle:
        expected = generate(model, PADDED, attention_mask=MASK)
        before = handle.report().interventions[0].positions
        same(generate(model, PADDED, attention_mask=MASK, cache_implementation="static"), expected)
        assert handle.report().interventions[0].positions == before


def test_prompt_lookup_with_accepted_and_rejected_drafts():
    """A model that repeats itself accepts drafts; the calls then hold prompt and generated tokens at once."""
    model, sae = model_of("gpt2"), make_sae()
    ids = torch.tensor([[11, 54, 33, 78, 11, 54, 33, 78, 11, 54, 33]])
    with attach(model, edit_of(sae, "generated")) as handle:
        looked_up = generate(model, ids, prompt_lookup_num_tokens=4, max_new_tokens=12, min_new_tokens=12)
        calls = handle.report().interventions[0].calls
        same(looked_up, generate(model, ids, max_new_tokens=12, min_new_tokens=12))
        assert min(handle.report().interventions[0].positions[0]) == ids.shape[1]
    assert calls <= 12


def test_assisted_decoding_does_not_edit_the_assistant_or_change_the_text():
    model, assistant, sae = model_of("llama"), tiny_model("llama", seed=1), make_sae()
    with attach(model, edit_of(sae)):
        same(generate(model, IDS[:1], assistant_model=assistant), generate(model, IDS[:1]))


def test_assisted_decoding_by_an_edited_assistant():
    """A copy of the model with the same edits drafts what the model itself would write: every draft is accepted."""
    model, assistant, sae = model_of("llama"), tiny_model("llama"), make_sae()
    with attach(assistant, edit_of(sae)) as drafts, attach(model, edit_of(sae)) as handle:
        same(generate(model, IDS[:1], assistant_model=assistant), generate(model, IDS[:1]))
        assert min(drafts.report().interventions[0].positions[0]) == PROMPT
        assert min(handle.report().interventions[0].positions[0]) == PROMPT


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("positions", ["all", "generated", [0, PROMPT]], ids=str)
def test_beams(positions, settings):
    model, sae = model_of("gpt2"), make_sae()
    with attach(model, edit_of(sae, positions)) as handle:
        cached = generate(model, **settings)
        rows = handle.report().interventions[0].positions
        uncached = generate(model, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    close(cached.sequences_scores, uncached.sequences_scores, 1e-4)
    assert sorted(rows) == list(range(2 * settings["num_beams"]))
    expected = [index for index in range(PROMPT + NEW - 1) if selected(positions, PROMPT, index)]
    assert all(places == expected for places in rows.values())


def test_sampling_with_a_seed_and_several_sequences():
    model, sae = model_of("llama"), make_sae()
    settings = dict(do_sample=True, num_return_sequences=3, top_k=0)
    with attach(model, edit_of(sae)) as handle:
        torch.manual_seed(5)
        cached = generate(model, **settings)
        assert sorted(handle.report().interventions[0].positions) == list(range(6))
        torch.manual_seed(5)
        same(generate(model, use_cache=False, **settings), cached)
    torch.manual_seed(5)
    clean = generate(model, **settings)
    assert torch.equal(clean.scores[0], cached.scores[0])  # the first new token comes from the unedited prompt
    assert not torch.equal(clean.scores[1], cached.scores[1])


def test_the_prompt_may_be_given_in_any_way():
    model, sae = model_of("llama"), make_sae()
    embeds = model.get_input_embeddings()(IDS).detach()
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=False)
    with attach(model, edit_of(sae)):
        expected = model.generate(IDS, **settings)
        assert torch.equal(model.generate(input_ids=IDS, **settings), expected)
        assert torch.equal(model.generate(inputs=IDS, **settings), expected)
        assert torch.equal(model.generate(IDS, GenerationConfig(**settings, pad_token_id=0, eos_token_id=2)), expected)
        assert torch.equal(model.generate(inputs_embeds=embeds, **settings), expected[:, PROMPT:])
        assert torch.equal(model.generate(None, inputs_embeds=embeds, **settings), expected[:, PROMPT:])
    assert not torch.equal(model.generate(IDS, **settings), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_a_prompt_everything_after_the_first_token_is_generated(use_cache):
    model, sae = model_of("llama"), make_sae()
    with attach(model, edit_of(sae)) as handle:
        model.generate(max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache)
        assert handle.report().interventions[0].positions == {0: [1, 2, 3]}


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_a_custom_decoding_loop(family):
    model, sae = model_of(family), make_sae()
    ids, scores = step_by_step(model, family, sae, "generated")
    with attach(model, edit_of(sae)) as handle, torch.no_grad():
        given, cache = IDS, {}
        for step in range(NEW):
            output = model(input_ids=given, use_cache=True, **cache)
            cache = continuing(model, output)
            logits = output.logits[:, -1]
            logits[:, 2] = -torch.inf
            close(logits[:, 3:], scores[step][:, 3:], 1e-4)
            given = logits.argmax(-1, keepdim=True)
        assert handle.report().interventions[0].positions[0] == list(range(PROMPT, PROMPT + NEW - 1))


def test_a_conversation_continued_from_its_cache():
    model, sae = model_of("llama"), make_sae()
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    first = model.generate(IDS[:1], **settings)
    ids = torch.cat([first.sequences, torch.tensor([[70, 71]])], dim=1)
    with attach(model, edit_of(sae, "generated")) as handle:
        second = model.generate(ids, **continuing(model, first), **settings)
        assert handle.report().interventions[0].positions == {0: [ids.shape[1], ids.shape[1] + 1]}
        assert torch.equal(model.generate(ids, **settings).sequences, second.sequences)


def test_nested_generations_of_one_model_keep_both_prompts():
    """The outer prompt counts: drafting from generated tokens does not make them part of it."""
    model, sae = model_of("llama"), make_sae()

    class Drafts(LogitsProcessor):
        def __call__(self, input_ids, scores):
            model.generate(input_ids, max_new_tokens=1, do_sample=False)
            return scores

    with attach(model, edit_of(sae)) as handle:
        expected = generate(model)
        drafted = model.generate(
            IDS, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, logits_processor=[Drafts()]
        )
        assert torch.equal(drafted, expected.sequences)
        assert min(handle.report().interventions[0].positions[0]) == PROMPT


def test_continuous_batching_takes_global_edits_and_refuses_those_that_need_the_prompts_end():
    model, sae = tiny_model("llama"), make_sae()
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [IDS[0].tolist(), IDS[1, :4].tolist()]

    def batch():
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16, block_size=16)
        results = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=small, warmup=False
        )
        return [result.generated_tokens for result in results.values()]

    singly = []
    with pytest.raises(AttachError, match="another thread"), attach(model, edit_of(sae, "all")):
        batch()  # transformers runs it in another thread
    with attach(model, edit_of(sae, "all"), all_threads=True):
        together = batch()
        for prompt in prompts:
            singly.append(model.generate(torch.tensor([prompt]), config)[0, len(prompt) :].tolist())
    assert together == singly
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "cu_seq_lens_q": torch.tensor([0, 3, 6])}
    for refused in (edit_of(sae, "generated"), Ablate(sae, [3], rows=0)):
        with attach(model, refused), pytest.raises(AttachError, match="packs several sequences"), torch.no_grad():
            model(input_ids=IDS[:1], **packed)


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_a_spliced_model_generates_the_same_with_and_without_cache(architecture):
    model, sae = model_of("llama"), make_sae(architecture)
    with attach(model, Splice(sae)):
        same(
            generate(model, PADDED, attention_mask=MASK), generate(model, PADDED, attention_mask=MASK, use_cache=False)
        )


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [None, IDS[:, :3], torch.cat([IDS, IDS], 1), torch.cat([IDS, IDS[:, :1]], 1)])
def test_the_guidance_calls_of_a_generation_have_their_own_prompt(negative, use_cache):
    """Classifier-free guidance: half of the calls begin with the negative prompt, or the prompt's last token."""
    model = model_of("llama")
    sizes = []
    handle = attach(model, edit_of(make_sae(), "last_prompt"))
    counts = model.register_forward_hook(lambda *_: sizes.append(handle.report().interventions[0].edited))
    try:
        with handle:
            model.generate(
                IDS,
                guidance_scale=2.0,
                negative_prompt_ids=negative,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                use_cache=use_cache,
            )
            places = handle.report().interventions[0].positions
    finally:
        counts.remove()
    own = 0 if negative is None else negative.shape[1] - 1
    assert places == {row: sorted({own, PROMPT - 1}) for row in range(2)}
    assert sizes[1] == 4 and sizes[-1] == (4 if use_cache else 16)  # two rows each, once or in each of four steps


def test_another_model_called_during_a_generation_has_its_own_prompt_and_rows():
    model, other, sae = model_of("llama"), tiny_model("gpt2"), make_sae()

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            with torch.no_grad():
                other(input_ids[:1, :4])
            return scores

    plain = Steer(sae, 3, strength=6.0, unit="raw", positions="last_prompt", rows=[0])
    with attach(model, edit_of(sae)), attach(other, plain) as handle:
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, logits_processor=[Asks()])
    assert handle.report().interventions[0].positions == {0: [3]}


def test_a_generation_without_edited_tokens_is_warned_about():
    model, sae = model_of("llama"), make_sae()
    absent = Steer(sae, 3, strength=6.0, unit="raw", positions=TokenIds([96]))
    with pytest.warns(UserWarning, match="edited none of the 16 tokens"), attach(model, absent):
        generate(model, IDS, max_new_tokens=3, min_new_tokens=3, suppress_tokens=[96])


def test_a_generation_that_edits_all_tokens_instead_of_some_is_an_error(monkeypatch):
    """Simulates that every step of a generation is mistaken for its prompt."""
    model, sae = model_of("llama"), make_sae()
    monkeypatch.setattr("hf_gated_sae.hooks.token_positions.ForwardArguments.inputs", property(lambda call: call.ids))
    with (
        pytest.raises(AttachError, match="edited all 20 tokens of a generation"),
        attach(model, edit_of(sae, "prompt")),
    ):
        monkeypatch.setattr("hf_gated_sae.hooks.token_tracker.GENERATIONS", ContextVar("none", default={}))
        monkeypatch.setattr("hf_gated_sae.hooks.running_call._the_cache", lambda call, names: None)
        generate(model)


def test_an_error_in_another_thread_is_raised_at_the_end():
    """Continuous batching runs in another thread and only logs errors."""
    model = tiny_model("llama")
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16, block_size=16)
    with (
        pytest.raises(AttachError, match="failed in another thread.*packs several sequences"),
        attach(model, edit_of(make_sae(), "generated"), all_threads=True),
    ):
        model.generate_batch(
            [IDS[0].tolist()], generation_config=config, continuous_batching_config=small, warmup=False
        )
