"""Each verb equals a hand-written hook, however the model computes."""

import pytest
import torch

from hf_gated_sae import (
    Ablate,
    Clamp,
    Patch,
    ProjectOut,
    SAEModel,
    Splice,
    Steer,
    attach,
    capture,
)
from hf_gated_sae.errors import InputError
from hf_gated_sae.interventions import AblateSite
from tests.hooks.support import (
    ARCHITECTURES,
    D_SAE,
    IDS,
    SITE,
    active_latents,
    block,
    close,
    hand_made,
    logits_of,
    make_sae,
    model_of,
)
from tests.interventions.examples import OTHER, every_example, samples_of

EXACT = 1e-12
DOUBLE = torch.float64
PADDED = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
MASK = (PADDED != 0).long()
EXAMPLES = every_example()


@pytest.mark.parametrize("verb", EXAMPLES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_verb_equals_the_full_path_for_each_architecture(architecture, verb):
    model, sae = model_of("llama", DOUBLE), make_sae(architecture, dtype=DOUBLE)
    a, b = active_latents(model, sae)[:2]
    make, plain, changes = EXAMPLES[verb]
    with hand_made(block(model, "llama"), plain(sae, a, b, model)):
        expected = logits_of(model)
    with attach(model, make(sae, a, b, model), check=False):
        close(logits_of(model), expected, EXACT)
    assert torch.equal(expected, logits_of(model)) == (not changes)


# ------------------------------------------------------------------ splice with the error term


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.1", "resid_post.1|center"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_splice_with_its_error_changes_no_bit_with_and_without_gradients(dtype, site):
    model, sae = model_of("gpt2", dtype), make_sae(site=site)
    clean = logits_of(model)
    with attach(model, Splice(sae, error=True), check=False) as handle:
        assert torch.equal(logits_of(model), clean)
        assert torch.equal(model(input_ids=IDS).logits, clean)
    assert handle.report().interventions[0].edited == 2 * IDS.numel()


def test_a_splice_with_its_error_computes_nothing_without_gradients():
    model, sae = model_of("llama"), make_sae()
    with torch.no_grad():
        sae.W_dec.fill_(torch.nan)
    clean = logits_of(model)
    with attach(model, Splice(sae, error=True), check=False):
        assert torch.equal(logits_of(model), clean)
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        [gradient] = torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds)
        assert gradient.isnan().any()  # with gradients, it does use the SAE


@pytest.mark.parametrize("positions", ["all", [1, 3]])
def test_gradients_flow_through_the_latents_with_the_error_held_constant(positions):
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    chosen = torch.zeros(IDS.shape[1], dtype=torch.bool)
    chosen[slice(None) if positions == "all" else positions] = True
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    kept = {}

    def by_hand(x):
        latents = sae.encode(x)
        latents.retain_grad()
        kept["latents"] = latents
        reconstruction = sae.decode(latents)
        return torch.where(chosen[:, None], reconstruction + (x - reconstruction).detach(), x)

    def gradient():
        [found] = torch.autograd.grad(model(inputs_embeds=embeds).logits[..., 7].sum(), embeds)
        return found

    with hand_made(block(model, "llama"), by_hand):
        expected = gradient()
    with attach(model, Splice(sae, error=True, positions=positions), check=False):
        close(gradient(), expected, EXACT)
    assert not torch.allclose(gradient(), expected)


def test_edits_beside_a_splice_with_its_error_act_on_top_of_it():
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    latent = active_latents(model, sae)[0]
    with attach(model, Clamp(sae, {latent: 5.0}), check=False):
        expected = logits_of(model)
    with attach(model, Splice(sae, error=True), Clamp(sae, {latent: 5.0}), check=False):
        assert torch.equal(logits_of(model), expected)
        close(model(input_ids=IDS).logits, expected, EXACT)
    with pytest.raises(InputError, match="Both Splice and Splice"):
        attach(model, Splice(sae, error=True), Splice(sae), check=False)


# ------------------------------------------------------------------ resampling


def resampled(sae, model, latents, **settings):
    return Ablate(sae, latents, mode="resample", samples=samples_of(model, sae).reshape(-1, D_SAE), **settings)


def test_every_token_gets_a_sample_that_depends_on_seed_row_and_position_alone():
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    latent = active_latents(model, sae)[0]
    samples = torch.arange(1.0, 101.0, dtype=DOUBLE)[:, None]

    def drawn(ids, mask=None, **settings):
        """Return which sample each token got, computed from what was added."""
        edit = Ablate(sae, [latent], mode="resample", samples=samples, **settings)
        inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        clean = capture(model, [SITE, sae], **inputs)
        with attach(model, edit, check=False):
            edited = capture(model, SITE, **inputs)[SITE]
        row = sae.W_dec[latent]
        added = (edited - clean[SITE]) @ row / row.square().sum()
        return (added + clean[sae][..., latent]).round().long()

    first = drawn(IDS)
    assert 1 <= first.min() and first.max() <= 100 and len(first.unique()) >= 8  # of 12 tokens
    assert torch.equal(drawn(IDS.flip(1)), first)  # independent of the tokens
    assert torch.equal(drawn(PADDED, MASK)[:, 3:], first)
    assert not torch.equal(drawn(IDS, seed=1), first)
    assert torch.equal(drawn(IDS, seed=1), drawn(IDS, seed=1))
    long = torch.arange(3, 93).repeat(8, 1)
    counts = drawn(long).flatten().bincount(minlength=101)[1:]  # 720 draws of 100: 7.2 +- 2.7 of each
    assert counts.max() <= 20 and (counts > 0).sum() >= 95


@pytest.mark.parametrize("settings", [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 3}], ids=str)
def test_samples_are_the_same_with_and_without_cache(settings):
    model, sae = model_of("llama"), make_sae()
    edit = resampled(sae, model, active_latents(model, sae), seed=4)
    texts = []
    with attach(model, edit, check=False):
        for cached in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
            torch.manual_seed(0)
            texts.append(model.generate(IDS, max_new_tokens=6, min_new_tokens=6, **settings, **cached))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_samples_may_be_given_for_the_edited_latents_or_for_all():
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    a, b = active_latents(model, sae)[:2]
    every = samples_of(model, sae)
    with attach(model, Ablate(sae, [b, a], mode="resample", samples=every), check=False):
        expected = logits_of(model)
    few = Ablate(sae, [b, a], mode="resample", samples=every.reshape(-1, D_SAE)[:, [b, a]])
    with attach(model, few, check=False):
        assert torch.equal(logits_of(model), expected)


# ------------------------------------------------------------------ vectors


@pytest.mark.parametrize("unit", [None, "raw", "norm"])
def test_a_vector_is_added_as_it_is_or_scaled_by_the_activations_norm(unit):
    model, vector = model_of("gpt2", DOUBLE), torch.linspace(-1, 2, 32)

    def by_hand(x):
        v = vector.double()
        return x - 0.4 * (x.norm(dim=-1, keepdim=True) * v / v.norm() if unit == "norm" else v)

    with hand_made(block(model, "gpt2"), by_hand):
        expected = logits_of(model)
    chosen = {} if unit is None else {"unit": unit}
    with attach(model, Steer(SITE, vector, strength=-0.4, **chosen)):
        close(logits_of(model), expected, EXACT)
    with attach(model, Steer(SITE, vector.tolist(), strength=-0.4, **chosen)):
        close(logits_of(model), expected, 1e-6)


def test_a_vector_is_added_in_its_own_precision():
    """Steps that are too small for bfloat16 alone still count: they are summed, then rounded once."""
    model, vector = model_of("llama", torch.bfloat16), torch.full((32,), 1e-3)
    with hand_made(block(model, "llama"), lambda x: (x.float() + 40 * vector).bfloat16()):
        expected = logits_of(model)
    with attach(model, *[Steer(SITE, vector) for _ in range(40)]):
        close(logits_of(model), expected, 0.02)


# ------------------------------------------------------------------ patches


@pytest.mark.parametrize("family", ["gpt2", "llama", "mpt"])
def test_a_patched_site_is_bit_identical_to_that_of_the_other_run(family):
    model = model_of(family)
    other = capture(model, SITE, input_ids=OTHER)[SITE]
    with attach(model, Patch(SITE, other)):
        assert torch.equal(logits_of(model), logits_of(model, OTHER))


def test_a_patch_acts_only_at_its_columns():
    model = model_of("llama", DOUBLE)
    other = capture(model, SITE, input_ids=OTHER)[SITE]

    def by_hand(x):
        x = x.clone()
        x[:, 1:3] = other[:, 1:3]
        return x

    with hand_made(block(model, "llama"), by_hand):
        expected = logits_of(model)
    with attach(model, Patch(SITE, other[:, :3], positions=slice(1, None))):
        assert torch.equal(logits_of(model), expected)
    with attach(model, Patch(SITE, other, positions=[1, 2])):
        assert torch.equal(logits_of(model), expected)


def test_columns_of_a_patch_count_padding_and_the_prompt_in_the_cache():
    model, sae = model_of("llama"), make_sae()
    latents = active_latents(model, sae)
    value = 3 * torch.rand(2, PADDED.shape[1] + 2, len(latents))
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, attention_mask=MASK)
    with attach(model, Patch(sae, value, latents=latents), check=False) as handle:
        cached = model.generate(PADDED, **settings)
        edited = handle.report().interventions[0].positions
        assert torch.equal(model.generate(PADDED, use_cache=False, **settings), cached)
        assert torch.equal(model.generate(PADDED, prefill_chunk_size=4, **settings), cached)
    assert edited == {0: list(range(8)), 1: list(range(8))}
    assert not torch.equal(model.generate(PADDED, **settings), cached)


def test_rows_of_a_patch_are_those_of_the_callers_batch():
    model = model_of("llama")
    value = capture(model, SITE, input_ids=OTHER)[SITE]
    settings = dict(max_new_tokens=4, min_new_tokens=4, num_beams=3)
    with attach(model, Patch(SITE, value, special_tokens=True)):
        both = model.generate(IDS, **settings)
    for row in range(2):
        with attach(model, Patch(SITE, value[row : row + 1], special_tokens=True)):
            assert torch.equal(model.generate(IDS[row : row + 1], **settings)[0], both[row])


def test_padding_that_is_not_finite_does_not_matter():
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    latent = active_latents(model, sae)[0]
    value = torch.ones(2, PADDED.shape[1], 1, dtype=DOUBLE)
    inputs = {"attention_mask": MASK}
    with attach(model, Patch(sae, value, latents=[latent]), check=False):
        expected = logits_of(model, PADDED, **inputs)
    value[:, :3] = torch.nan
    with attach(model, Patch(sae, value, latents=[latent]), check=False):
        assert torch.equal(logits_of(model, PADDED, **inputs), expected)


def test_a_slice_of_an_sae_patches_as_the_full_sae(tmp_path):
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    a, b = active_latents(model, sae)[:2]
    sae.save_pretrained(tmp_path)
    some = SAEModel.from_pretrained(tmp_path, latents=[b, 5, a])
    value = samples_of(model, sae)
    for given in (value, value[..., [a, b]]):
        for make in (
            lambda s, given=given: Patch(s, given, latents=[a, b]),
            lambda s, given=given: Ablate(s, [a, b], mode="resample", samples=given),
            lambda s, given=given: ProjectOut(s, [a, b]),
        ):
            with attach(model, make(sae), check=False):
                expected = logits_of(model)
            with attach(model, make(some), check=False):
                close(logits_of(model), expected, EXACT)


def test_a_site_and_an_edit_beside_a_patch_add_up():
    model = model_of("llama", DOUBLE)
    other, vector = capture(model, SITE, input_ids=OTHER)[SITE], torch.linspace(0, 1, 32).double()
    with hand_made(block(model, "llama"), lambda x: other + vector):
        expected = logits_of(model)
    with attach(model, Patch(SITE, other), Steer(SITE, vector)):
        close(logits_of(model), expected, EXACT)
    with pytest.raises(InputError, match="Both Patch and AblateSite"):
        attach(model, Patch(SITE, other), AblateSite(SITE))
