"""Every edit equals a hand-written hook that encodes all latents, edits them, decodes all and adds the error."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_gated_sae import Ablate, Clamp, ProjectOut, Scale, Splice, Steer, attach
from hf_gated_sae.architectures import architectures
from hf_gated_sae.interventions import AblateSite
from tests.hooks.support import (
    ARCHITECTURES,
    FAMILIES,
    IDS,
    active_latents,
    block,
    close,
    full_path,
    hand_made,
    logits_of,
    make_sae,
    model_of,
)

EXACT = 1e-12
DOUBLE = torch.float64


def put(latents, values):
    for latent, value in values.items():
        latents[..., latent] = value(latents[..., latent])


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_equal_the_full_path_in_each_family(family):
    # These run their experts with torch's grouped matrix product, which has no float64.
    dtype, exact = (torch.float32, 1e-4) if family in ("gpt_oss", "qwen3_moe") else (DOUBLE, EXACT)
    model, sae = model_of(family, dtype), make_sae(dtype=dtype)
    a, b = active_latents(model, sae)[:2]
    with hand_made(
        block(model, family), full_path(sae, lambda f: put(f, {a: lambda x: 0 * x, b: lambda x: 0 * x + 2}))
    ):
        expected = logits_of(model)
    with attach(model, Ablate(sae, [a]), Clamp(sae, {b: 2.0})):
        close(logits_of(model), expected, exact)
    assert (expected - logits_of(model)).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", ["gpt2", "opt", "mpt", "mamba"])
def test_splice_runs_the_model_on_the_reconstruction(family, architecture):
    model = model_of(family, DOUBLE)
    sae = make_sae(architecture, dtype=DOUBLE)
    with hand_made(block(model, family), lambda x: sae(x).reconstruction):
        expected = logits_of(model)
    with attach(model, Splice(sae)):
        close(logits_of(model), expected, EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_float32_sae_computes_in_float32_whatever_the_models_dtype(dtype):
    model, sae = model_of("llama", dtype), make_sae()
    with hand_made(block(model, "llama"), lambda x: sae(x.float()).reconstruction.to(dtype)):
        expected = logits_of(model)
    with attach(model, Splice(sae)):
        assert torch.equal(logits_of(model), expected)
    latent = active_latents(model, sae)[0]

    def by_hand(x):
        values = sae.encode(x.float())[..., latent : latent + 1]
        return (x.float() - values * sae.W_dec[latent]).to(dtype)

    with hand_made(block(model, "llama"), by_hand):
        expected = logits_of(model)
    with attach(model, Ablate(sae, [latent])):
        close(logits_of(model), expected, {torch.float32: 1e-5}.get(dtype, 0.02))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if architectures[name].elementwise])
def test_an_edit_of_a_few_latents_does_not_use_the_others(architecture):
    """Where latents do not depend on each other, NaN in the rows of all others has no effect."""
    model = model_of("llama", DOUBLE)
    sae = make_sae(architecture, dtype=DOUBLE)
    a, b = active_latents(model, sae)[:2]
    edits = [Scale(sae, {a: 3.0}, when={b: 0.0}), Ablate(sae, [b])]
    with attach(model, *edits):
        expected = logits_of(model)
    with torch.no_grad():
        for name, value in sae.named_parameters():
            if name != "b_dec":
                others = torch.tensor([i for i in range(len(value)) if i not in (a, b)])
                value[others] = torch.nan
    with attach(model, *edits):
        edited = logits_of(model)
    assert torch.isfinite(edited).all()
    close(edited, expected, EXACT)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("architecture", ["gated", "standard", "jumprelu", "batch_topk"])
def test_an_edit_of_n_latents_costs_n_encoder_and_n_decoder_rows(architecture, count):
    model, sae = model_of("llama"), make_sae(architecture)

    def product(x, weight, *_, **__):  # oneDNN's product, which the counter does not know
        return 2 * x[0] * x[1] * weight[0]

    known = {torch.ops.mkldnn._linear_pointwise: product}

    def operations(*edits):
        with FlopCounterMode(display=False, custom_mapping=known) as counter, attach(model, *edits):
            logits_of(model)
        return counter.get_total_flops()

    nothing = Steer(sae, 0, positions=[])  # adds a decoder row without a product
    operations(nothing)  # the first call also proves the site
    plain = operations(nothing)
    row = 2 * IDS.numel() * 32
    assert operations(Ablate(sae, range(count))) - plain == 2 * count * row
    assert operations(Clamp(sae, {0: 1.0}, when={5: 0.0})) - plain == 3 * row


def test_a_latent_named_twice_is_edited_once():
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    latent = active_latents(model, sae)[0]
    with attach(model, Ablate(sae, [latent])):
        expected = logits_of(model)
    with attach(model, Ablate(sae, [latent, latent])):
        assert torch.equal(logits_of(model), expected)


def test_several_interventions_add_up_in_any_order():
    model = model_of("gpt2", DOUBLE)
    first, second = make_sae(dtype=DOUBLE), make_sae("topk", seed=1, dtype=DOUBLE)
    a, b = active_latents(model, first)[0], active_latents(model, second)[0]
    direction = torch.randn(32)
    edits = [Ablate(first, [a]), Scale(second, {b: 3.0}), ProjectOut("resid_post.1", direction), Steer(first, b)]

    def together(x):
        unit = direction.double() / direction.double().norm()
        return (
            x
            - first.encode(x)[..., [a]] * first.W_dec[a]
            + 2.0 * second.encode(x)[..., [b]] * second.W_dec[b]
            - (x @ unit)[..., None] * unit
            + first.max_activation[b].double() * first.W_dec[b]
        )

    with hand_made(block(model, "gpt2"), together):
        expected = logits_of(model)
    for order in itertools.islice(itertools.permutations(edits), 0, None, 5):
        with attach(model, *order):
            close(logits_of(model), expected, EXACT)
        with attach(model, *order[:2]), attach(model, *order[2:]):  # nested, on the same site
            close(logits_of(model), expected, EXACT)


@pytest.mark.parametrize("splice_first", [True, False])
def test_edits_beside_a_splice_act_on_the_reconstruction(splice_first):
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    latent = active_latents(model, sae)[0]

    def by_hand(x):
        latents = sae.encode(x)
        latents[..., latent] = 5.0
        return sae.decode(latents)

    with hand_made(block(model, "llama"), by_hand):
        expected = logits_of(model)
    pair = [Splice(sae), Clamp(sae, {latent: 5.0})]
    with attach(model, *(pair if splice_first else reversed(pair))):
        close(logits_of(model), expected, EXACT)


def test_later_sites_see_the_edits_at_earlier_ones():
    model = model_of("llama", DOUBLE)
    early, late = make_sae(site="resid_post.0", dtype=DOUBLE), make_sae(site="mlp_out.2", seed=2, dtype=DOUBLE)
    with hand_made(block(model, "llama", 0), lambda x: early(x).reconstruction):
        with hand_made(block(model, "llama", 2).mlp, lambda x: late(x).reconstruction):
            expected = logits_of(model)
    with attach(model, Splice(late), Splice(early)):
        close(logits_of(model), expected, EXACT)
    with attach(model, Splice(late)), attach(model, Splice(early)):
        close(logits_of(model), expected, EXACT)


def test_two_names_of_one_tensor_are_one_site():
    """Interventions under either name read the clean activation."""
    model = model_of("llama", DOUBLE)
    named, by_path = make_sae(dtype=DOUBLE), make_sae(site="model.layers.1.output", seed=3, dtype=DOUBLE)
    a, b = active_latents(model, named)[0], active_latents(model, by_path)[0]

    def by_hand(x):
        return x - named.encode(x)[..., [a]] * named.W_dec[a] + (7.0 - by_path.encode(x)[..., [b]]) * by_path.W_dec[b]

    with hand_made(block(model, "llama"), by_hand):
        expected = logits_of(model)
    pair = [Ablate(named, [a]), Clamp(by_path, {b: 7.0})]
    for order in (pair, pair[::-1]):
        with attach(model, *order):
            close(logits_of(model), expected, EXACT)


def test_a_scaled_contribution_is_edited_in_the_units_of_the_stream():
    """Granite adds 0.22 times its MLP's output; mlp_out is the scaled output."""
    model = model_of("granite", DOUBLE)
    sae = make_sae(site="mlp_out.1", dtype=DOUBLE)
    factor = model.config.residual_multiplier
    assert factor != 1.0
    with hand_made(block(model, "granite").mlp, lambda x: sae(x * factor).reconstruction / factor):
        expected = logits_of(model)
    with attach(model, Splice(sae)):
        close(logits_of(model), expected, EXACT)


@pytest.mark.parametrize("value", [None, torch.linspace(-1, 1, 32)])
def test_a_site_is_ablated_to_zero_or_to_a_vector(value):
    model = model_of("opt", DOUBLE)
    constant = torch.zeros(32) if value is None else value
    with hand_made(block(model, "opt"), lambda x: constant.to(x).expand_as(x).clone()):
        expected = logits_of(model)
    with attach(model, AblateSite("resid_post.1", value)):
        assert torch.equal(logits_of(model), expected)


def test_conditions_hold_where_every_named_latent_exceeds_its_value():
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    a, b, c = active_latents(model, sae)[:3]

    def by_hand(x):
        latents = sae.encode(x)
        met = (latents[..., b] > 0.1) & (latents[..., c] > 0.0)
        assert met.any() and not met.all()
        return x + met[..., None] * (6.0 - latents[..., [a]]) * sae.W_dec[a]

    with hand_made(block(model, "llama"), by_hand):
        expected = logits_of(model)
    with attach(model, Clamp(sae, {a: 6.0}, when={b: 0.1, c: 0.0})):
        close(logits_of(model), expected, EXACT)


def test_a_splice_at_some_positions_leaves_the_others():
    model, sae = model_of("gpt2", DOUBLE), make_sae(dtype=DOUBLE)

    def by_hand(x):
        x = x.clone()
        x[:, 2:4] = sae(x[:, 2:4]).reconstruction
        return x

    with hand_made(block(model, "gpt2"), by_hand):
        expected = logits_of(model)
    with attach(model, Splice(sae, positions=[2, 3])):
        edited = logits_of(model)
    close(edited, expected, EXACT)
    assert torch.equal(edited[:, :2], logits_of(model)[:, :2])


def test_the_sae_may_be_changed_while_it_is_attached():
    model, sae = model_of("llama"), make_sae()
    with attach(model, Steer(sae, 3)):
        before = logits_of(model)
        sae.record_statistics(2 * sae.max_activation, sae.mean_activation, tokens=10)
        assert not torch.equal(logits_of(model), before)


def test_changing_the_arguments_of_an_intervention_afterwards_has_no_effect():
    model, sae = model_of("llama"), make_sae()
    latents, values, factors, places, bounds = [1, 2], {3: 4.0}, {7: 3.0}, [1], {3: -1.0}
    edits = [Ablate(sae, latents, positions=places), Clamp(sae, values), Scale(sae, factors, when=bounds)]
    with attach(model, *edits):
        before = logits_of(model)
        latents.append(5)
        values[3] = -9.0
        factors[8] = 50.0
        places[0] = 2
        bounds[3] = 1e9
        assert torch.equal(logits_of(model), before)


def test_an_iterator_of_latents_or_positions_works_like_a_list():
    model, sae = model_of("llama"), make_sae()
    with attach(model, Ablate(sae, [1, 5], positions=[1, 2])):
        expected = logits_of(model)
    with attach(model, Ablate(sae, iter([1, 5]), positions=iter([1, 2]))):
        assert torch.equal(logits_of(model), expected)
    with attach(model, Ablate(sae, torch.tensor([1, 5]), positions=torch.tensor([1, 2]))):
        assert torch.equal(logits_of(model), expected)


def test_embeddings_as_input_are_edited_as_ids_are():
    model, sae = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    with attach(model, Ablate(sae, active_latents(model, sae))):
        expected = logits_of(model)
        with torch.no_grad():
            close(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, expected, EXACT)
