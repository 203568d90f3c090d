"""Models on several devices, and models with offloaded weights."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_gated_sae import Ablate, Splice, Steer, attach, capture, resolve
from hf_gated_sae.errors import SiteError
from hf_gated_sae.sites.multi_rank import must_finish
from tests.hooks.support import IDS, block, close, hooks_on, logits_of, make_sae, model_of
from tests.support.tiny_models import tiny_model


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def device_map(model, *places):
    """Return a device map with each block at its place and everything else on the CPU."""
    inside = [name for name, module in model.named_modules() if any(module is each for each in blocks(model))]
    leaves = [name for name, module in model.named_modules() if name and not module._modules]
    around = [name for name in leaves if not name.startswith(tuple(f"{path}." for path in inside))]
    return dict.fromkeys(around, "cpu") | dict(zip(inside, places, strict=True))


def by_map(model, folder):
    """Dispatch a model as ``device_map="auto"`` does if not all weights fit."""
    where = device_map(model, "cpu", "disk", "cpu")
    return dispatch_model(model, where, main_device="cpu", offload_dir=folder, force_hooks=True)


def saved_and_loaded(model, folder):
    model.save_pretrained(folder / "model")
    where = device_map(model, "cpu", "disk", "disk")
    return AutoModelForCausalLM.from_pretrained(folder / "model", device_map=where, offload_folder=folder / "away")


OFFLOADED = {
    "a map with disk": by_map,
    "from_pretrained with disk": saved_and_loaded,
    "all on the CPU": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "all on disk": lambda model, folder: disk_offload(model, str(folder), execution_device=torch.device("cpu")),
}


@pytest.fixture(params=OFFLOADED)
def offload(request, tmp_path):
    return lambda model: OFFLOADED[request.param](model, tmp_path)


def edits():
    return [
        Splice(make_sae()),
        Steer(make_sae("jumprelu", site="mlp_out.2"), 3, strength=3.0),
        Ablate(make_sae(site="attn_z.1"), [1, 2, 3]),
    ]


def offloaded(model):
    return sorted(name for name, value in model.named_parameters() if value.is_meta)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sites_activations_and_edits_are_those_of_the_whole_model(offload, family):
    plain = model_of(family)
    model = offload(tiny_model(family))
    assert offloaded(model), "nothing is offloaded"
    hooks, elsewhere = hooks_on(model), offloaded(model)
    found, expected = resolve(model), resolve(plain)
    assert found.names() == expected.names()
    assert [found[name].width for name in found.names()] == [expected[name].width for name in found.names()]
    names = [*found.names(), "resid_mid.1|norm_no_gain"]  # reads the norm's weights, which may be offloaded
    seen, wanted = capture(model, names, input_ids=IDS), capture(plain, names, input_ids=IDS)
    assert all(torch.equal(seen[name], wanted[name]) for name in names)
    clean = logits_of(plain)
    with attach(plain, *edits()):
        edited = logits_of(plain)
    with attach(model, *edits()) as handle:
        assert torch.equal(logits_of(model), edited)
        assert all(entry.calls == 1 for entry in handle.report().interventions)
    assert not torch.equal(edited, clean)
    assert torch.equal(logits_of(model), clean)
    assert offloaded(model) == elsewhere
    assert hooks_on(model) == hooks


def test_weights_are_offloaded_again_after_a_capture(offload):
    model = offload(tiny_model("llama"))
    elsewhere = offloaded(model)
    assert must_finish(model)
    for site in ("embed", "attn_z.0", "resid_post.1"):
        capture(model, site, input_ids=IDS)
        assert offloaded(model) == elsewhere


def test_a_capture_stops_early_where_weights_stay_on_their_devices():
    """As on several GPUs, where accelerate's hooks only move activations and offload no weights."""
    model, ran = tiny_model("llama"), []
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(model, "_hf_hook")
    assert not must_finish(model)
    capture(model, "resid_post.1", input_ids=IDS)  # proves sites and calls
    block(model, "llama", 2).register_forward_hook(lambda *_: ran.append(2))
    found = capture(model, "resid_post.1", input_ids=IDS)["resid_post.1"]
    assert not ran
    assert torch.equal(found, capture(model_of("llama"), "resid_post.1", input_ids=IDS)["resid_post.1"])
    logits_of(model)
    assert ran


def test_idle_interventions_change_no_bit_of_an_offloaded_model(offload):
    model = offload(tiny_model("gemma2"))
    clean = logits_of(model)
    idle = Ablate(make_sae(), [1, 2], positions=[]), Steer(make_sae(site="mlp_out.1"), 3, when={5: 1e9})
    with attach(model, *idle):
        assert torch.equal(logits_of(model), clean)


def test_the_sae_stays_on_its_device_though_weights_are_on_meta(offload):
    model, sae = offload(tiny_model("llama")), make_sae()
    before = {name: (value.device, value.data_ptr()) for name, value in sae.named_parameters()}
    with attach(model, Splice(sae), Steer(sae, 3)):
        logits_of(model)
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert {name: (value.device, value.data_ptr()) for name, value in sae.named_parameters()} == before


def test_generation_with_a_cache_is_that_of_the_whole_model(offload):
    plain, model = model_of("llama"), offload(tiny_model("llama"))
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    settings |= dict(output_scores=True, return_dict_in_generate=True)
    edit = Steer(make_sae(), 3, strength=6.0, positions="generated")
    clean = plain.generate(IDS, **settings)
    with attach(plain, edit):
        expected = plain.generate(IDS, **settings)
    with attach(model, edit):
        found = model.generate(IDS, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))
    assert not torch.equal(clean.scores[-1], expected.scores[-1])


def test_gradients_flow_through_an_offloaded_model(tmp_path):
    def gradient(model, embeds):
        with attach(model, Splice(make_sae())):
            loss = model(inputs_embeds=embeds).logits.logsumexp(-1).sum()
        return torch.autograd.grad(loss, embeds)[0]

    plain = model_of("llama")
    embeds = plain.get_input_embeddings()(IDS).detach().requires_grad_()
    model = by_map(tiny_model("llama"), tmp_path)
    close(gradient(model, embeds), gradient(plain, embeds), 1e-6)
    sae = make_sae()
    latents = capture(model, sae, grad=True, inputs_embeds=embeds)[sae]
    assert torch.autograd.grad(latents.sum(), embeds)[0].abs().sum() > 0


@pytest.mark.parametrize(
    "use", [lambda model: attach(model, Splice(make_sae())), lambda model: capture(model, "embed")]
)
def test_data_parallel_is_refused(use):
    model = model_of("llama")
    clean = logits_of(model)
    with pytest.raises(SiteError, match=r"DataParallel runs hooks in several threads at once; use DDP or device_map"):
        use(nn.DataParallel(model))
    assert hooks_on(model) == ({}, [])
    assert torch.equal(logits_of(model), clean)


def test_pipeline_stages_are_refused():
    model = tiny_model("llama")
    model.config.distributed_config = {"pp_size": 2}
    with pytest.raises(SiteError, match="split into 2 pipeline stages"):
        attach(model, Splice(make_sae()))
    assert hooks_on(model) == ({}, [])
