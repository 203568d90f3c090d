"""Models with quantised weights, whose activations are ordinary tensors: hooks work as in other models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from hf_gated_sae import Ablate, Clamp, Splice, Steer, attach, capture, resolve
from hf_gated_sae.sites.multi_rank import must_finish
from tests.hooks.support import IDS, active_latents, block, close, hand_made, hooks_on, logits_of, make_sae
from tests.support.tiny_models import tiny_model

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit weights are scaled in blocks of 64
FAMILIES = ("llama", "gemma2")


def bits_and_bytes(**settings):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**settings)


def torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)())


# Each kind: its configuration, the model's dtype, and the class of a quantised weight.
KINDS = {
    "int8": (lambda: bits_and_bytes(load_in_8bit=True), torch.float16, "Int8Params"),
    "nf4": (
        lambda: bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        torch.bfloat16,
        "Params4bit",
    ),
    "torchao weights": (lambda: torchao("Int8WeightOnlyConfig"), torch.float32, "Int8Tensor"),
    "torchao weights and activations": (
        lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        torch.float32,
        "Int8Tensor",
    ),
}


@pytest.fixture(scope="module", params=[(kind, family) for kind in KINDS for family in FAMILIES], ids="-".join)
def quantised(request, tmp_path_factory):
    """A quantised model, its family, and the model before quantisation."""
    kind, family = request.param
    make, dtype, weight = KINDS[kind]
    plain = tiny_model(family, **WIDE).to(dtype)
    folder = tmp_path_factory.mktemp("model")
    plain.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=make(), device_map="cpu", dtype=dtype)
    assert type(model.model.layers[1].self_attn.o_proj.weight).__name__ == weight
    logits_of(model)  # the first forward packs weights
    yield model, family, plain
    assert hooks_on(model) == ({}, [])


def sae_at(model, site, **settings):
    return make_sae(site=site, d_in=resolve(model)[site].width, **settings)


def test_the_sites_are_those_of_the_unquantised_model(quantised):
    model, _, plain = quantised
    found, expected = resolve(model), resolve(plain)
    assert found.names() == expected.names() and "attn_z.1" in found and "mlp_neurons.1" in found
    assert [str(found[name].tensor_path) for name in found.names()] == [
        str(expected[name].tensor_path) for name in found.names()
    ]
    assert [found[name].width for name in found.names()] == [expected[name].width for name in found.names()]


def test_activations_are_ordinary_tensors_near_those_of_the_unquantised_model(quantised):
    model, _, plain = quantised
    names = resolve(model).names()
    found, expected = (capture(each, names, input_ids=IDS) for each in (model, plain))
    assert not must_finish(model)
    for name in names:
        assert type(found[name]) is torch.Tensor and found[name].dtype == model.dtype
        assert found[name].shape == expected[name].shape
    assert not torch.equal(found["attn_out.0"], expected["attn_out.0"])  # something is quantised
    close(found["attn_out.0"].float(), expected["attn_out.0"].float(), 0.3)


def test_idle_interventions_change_no_bit(quantised):
    model, _, _ = quantised
    clean = logits_of(model)
    for site in ("resid_post.1", "attn_z.1", "mlp_neurons.0"):
        sae = sae_at(model, site)
        latents = active_latents(model, sae)
        with attach(model, Ablate(sae, latents, positions=[]), Clamp(sae, {3: 9.0}, when={latents[0]: 1e9})) as handle:
            assert torch.equal(logits_of(model), clean)
            assert handle.report().interventions[0].calls == 1
        with attach(model, Clamp(sae, {latents[0]: 50.0})):
            assert not torch.equal(logits_of(model), clean)
    assert torch.equal(logits_of(model), clean)


def test_a_splice_equals_a_hand_written_hook(quantised):
    model, family, _ = quantised
    sae = sae_at(model, "resid_post.1")
    with hand_made(block(model, family), lambda x: sae(x.float()).reconstruction.to(x.dtype)):
        expected = logits_of(model)
    with attach(model, Splice(sae)):
        assert torch.equal(logits_of(model), expected)
    assert not torch.equal(expected, logits_of(model))


@pytest.mark.parametrize(("site", "reader"), [("attn_z.1", "self_attn.o_proj"), ("mlp_neurons.1", "mlp.down_proj")])
def test_the_input_of_a_quantised_projection_can_be_edited(quantised, site, reader):
    model, family, _ = quantised
    sae = sae_at(model, site)
    step = 4.0 * sae.W_dec[3]
    handle = (
        block(model, family)
        .get_submodule(reader)
        .register_forward_pre_hook(lambda _, args: ((args[0].float() + step).to(args[0].dtype),))
    )
    expected = logits_of(model)
    handle.remove()
    with attach(model, Steer(sae, 3, strength=4.0, unit="raw")):
        assert torch.equal(logits_of(model), expected)
    assert not torch.equal(expected, logits_of(model))


def test_generation_is_the_same_with_and_without_cache(quantised):
    model, _, _ = quantised
    sae = sae_at(model, "resid_post.1")
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    settings |= dict(output_scores=True, return_dict_in_generate=True)
    clean = model.generate(IDS, **settings)
    with attach(model, Steer(sae, 3, strength=6.0, positions="generated")) as handle:
        cached = model.generate(IDS, **settings, use_cache=True)
        assert handle.report().interventions[0].positions == {0: [6, 7, 8], 1: [6, 7, 8]}
        recomputed = model.generate(IDS, **settings, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)
    scores, others = (torch.stack(each.scores)[..., 3:].float() for each in (cached, recomputed))
    close(scores, others, 0.05)
    assert not torch.equal(cached.scores[-1], clean.scores[-1])
