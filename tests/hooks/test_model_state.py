"""Attached models still work as usual: copies, checkpoints, gradients, autocast, training, offloading."""

import copy
import io
import pickle

import peft
import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from hf_gated_sae import Ablate, Clamp, ProjectOut, Splice, Steer, attach, capture
from hf_gated_sae.errors import AttachError
from tests.hooks.support import (
    IDS,
    SHARED,
    active_latents,
    block,
    checkpoint_layers,
    close,
    hand_made,
    logits_of,
    make_sae,
    model_of,
    steer,
)
from tests.support.tiny_models import tiny_model


def edits():
    return [Splice(make_sae()), Steer(make_sae(seed=4), 3, strength=3.0), Ablate(make_sae(site="mlp_out.2"), [1, 2])]


def test_parameters_buffers_and_state_are_not_touched():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()], [name for name, _ in model.named_parameters()]
    with attach(model, *edits()):
        logits_of(model)
        assert [name for name, _ in model.named_modules()] == names[0]
        assert [name for name, _ in model.named_parameters()] == names[1]
        assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == set(vars(tiny_model("llama")))


def copies(model, folder):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    yield torch.load(saved, weights_only=False)
    model.save_pretrained(folder)
    yield AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_a_copy_of_an_attached_model_has_nothing_attached(family, tmp_path):
    model = tiny_model(family)
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    clean, text = logits_of(model), model.generate(IDS, **settings)
    with attach(model, *(edits() if family == "llama" else edits()[:2])) as handle:
        edited = logits_of(model)
        for other in copies(model, tmp_path):
            calls = handle.report().interventions[0].calls
            assert torch.equal(logits_of(other), clean)
            assert torch.equal(other.generate(IDS, **settings), text)
            assert handle.report().interventions[0].calls == calls
            with attach(other, Steer(make_sae(), 3, strength=5.0, positions="generated")) as own:  # works on a copy
                other.generate(IDS, **settings)
                assert own.report().interventions[0].positions == {0: [6, 7], 1: [6, 7]}
            assert torch.equal(copy.deepcopy(other).generate(IDS, **settings), text)
        assert torch.equal(logits_of(model), edited)
    assert torch.equal(logits_of(model), clean)


def test_a_copy_outlives_the_model_and_its_block():
    model = tiny_model("llama")
    clean = logits_of(model)
    with attach(model, *edits()):
        other = copy.deepcopy(model)
    del model
    assert torch.equal(logits_of(other), clean)


# ------------------------------------------------------------------ precision


def test_autocast_leaves_the_sae_in_its_own_dtype():
    model, sae = model_of("llama"), make_sae()
    with torch.autocast("cpu", torch.bfloat16):
        with hand_made(block(model, "llama"), no_autocast(lambda x: sae(x.float()).reconstruction.to(x.dtype))):
            expected = logits_of(model)
        with attach(model, Splice(sae)):
            assert torch.equal(logits_of(model), expected)
        latents = active_latents(model, sae)
        with attach(model, Clamp(sae, {latents[0]: 3.0}, when={latents[1]: 0.0})):
            assert logits_of(model).dtype == expected.dtype


def no_autocast(edit):
    def run(x):
        with torch.autocast("cpu", enabled=False):
            return edit(x)

    return run


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_model_and_sae_may_differ_in_dtype(model_dtype, sae_dtype):
    model, sae = model_of("llama", model_dtype), make_sae(dtype=sae_dtype)
    for edit in (
        Splice(sae),
        Ablate(sae, [1]),
        Steer(sae, 3, when={5: 0.0}),
        ProjectOut("resid_post.1", torch.ones(32)),
    ):
        with attach(model, edit):
            assert logits_of(model).dtype == model_dtype


# ------------------------------------------------------------------ gradients and training


def test_gradients_flow_through_a_splice_and_an_edit():
    model, sae = model_of("llama", torch.float64), make_sae(dtype=torch.float64)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with hand_made(block(model, "llama"), lambda x: sae(x).reconstruction + 2.0 * sae.W_dec[3]):
        (expected,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.logsumexp(-1).sum(), embeds)
    with attach(model, Splice(sae), Steer(sae, 3, strength=2.0, unit="raw")):
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.logsumexp(-1).sum(), embeds)
    close(gradient, expected, 1e-10)
    assert gradient.abs().max() > 0


def test_an_sae_can_be_trained_through_the_model():
    model, sae = model_of("llama"), make_sae().requires_grad_(True)
    with attach(model, Splice(sae)):
        model(IDS, labels=IDS).loss.backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in (sae.W_dec, sae.W_enc_T, sae.b_dec))
    model.zero_grad()


def test_training_works_after_inference_mode():
    model, sae = model_of("llama"), make_sae().requires_grad_(True)
    with attach(model, Splice(sae)) as handle:
        expected = logits_of(model)
        with torch.inference_mode():
            assert torch.equal(model(IDS).logits, expected)
        model(IDS, labels=IDS).loss.backward()  # tensors cached in inference mode must not matter
        assert handle.report().interventions[0].edited == 36
    model.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.1", "attn_out.0"])
def test_gradient_checkpointing_gives_the_same_gradients(site, reentrant):
    def gradients(checkpointing, steps=2):
        model, sae = tiny_model("llama").train(), make_sae(site=site)
        if checkpointing:
            checkpoint_layers(model, reentrant=reentrant)
            model.enable_input_require_grads()
        edit = Clamp(sae, {3: 4.0, 5: 0.0}, positions=[1, -1])
        with attach(model, edit, Steer(sae, 7, strength=2.0, positions=range(3))) as handle:
            for step in range(steps):  # the two batches differ in shape
                ids = IDS if step else IDS[:1, :5]
                model(ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
            report = handle.report()
        return {name: value.grad for name, value in model.named_parameters()}, report

    (plain, reported), (checkpointed, again) = gradients(False), gradients(True)
    for name, value in plain.items():
        close(checkpointed[name], value, 1e-5)
    assert again == reported  # recomputation in backward() is not counted


def test_training_mode_and_random_numbers_are_kept():
    model = tiny_model("gpt2").train()
    torch.manual_seed(11)
    expected = logits_of(model)
    torch.manual_seed(11)
    with attach(model, Ablate(make_sae(), [1], positions=[])):
        assert torch.equal(logits_of(model), expected)
    assert all(module.training for module in model.modules())
    torch.manual_seed(11)
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(model), expected)  # there is dropout


def test_recorded_hidden_states_are_the_edited_ones():
    """Also if the model has recorded before, which leaves its own hooks on it."""
    model = tiny_model("llama")
    logits_of(model, output_hidden_states=True)
    with attach(model, Steer(make_sae(), 3, strength=5.0)), torch.no_grad():
        recorded = model(IDS, output_hidden_states=True).hidden_states[2]
        assert torch.equal(recorded, capture(model, "resid_post.1", input_ids=IDS)["resid_post.1"])
    assert not torch.equal(recorded, capture(model, "resid_post.1", input_ids=IDS)["resid_post.1"])


def test_a_forward_that_is_interrupted_leaves_nothing_running():
    """Ctrl-C in a notebook: torch runs no hook after the call, and the traceback keeps its frames alive."""
    model = tiny_model("llama")
    clean = logits_of(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    x = torch.randn(2, 6, 32)
    rotary = model.model.rotary_emb(x, torch.arange(6)[None])
    with attach(model, Steer(make_sae(), 3, strength=5.0, positions=[0])) as handle:
        expected = logits_of(model)
        raising = model.model.layers[0].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:
            model(IDS, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]] * 2))
        raising.remove()
        with pytest.raises(AttachError, match="was not called"):
            model.model.layers[1](x, position_embeddings=rotary)
        assert torch.equal(logits_of(model), expected)
        with pytest.raises(AttachError, match="was not called"):
            model.model.layers[1](x, position_embeddings=rotary)
        assert handle.report().interventions[0].positions == {0: [0], 1: [0]}
    assert kept.value is not None
    assert torch.equal(logits_of(model), clean)


# ------------------------------------------------------------------ offloading and wrappers


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_make_no_difference(place, attach_first, tmp_path):
    model = tiny_model("llama")
    with attach(model, *edits()):
        expected = logits_of(model)
        text = model.generate(IDS, max_new_tokens=3, do_sample=False)
    clean = logits_of(model)
    handle = attach(model, *edits())
    if attach_first:
        handle.enable()
    devices = {"model.embed_tokens": "cpu", "model.layers.0": place, "model.layers.1": place}
    devices |= {"model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if not attach_first:
        handle.enable()
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), text)
    handle.disable()
    assert torch.equal(logits_of(model), clean)
    capture(model, "resid_post.0", input_ids=IDS)
    assert torch.equal(logits_of(model), clean)


def test_a_model_wrapped_as_by_ddp():
    """DDP and similar wrappers call the model that they hold; the sites are those of that model."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    model = model_of("llama")
    with attach(model, *edits()):
        expected = logits_of(model)
    with attach(Wrapper(model), *edits()) as handle:
        assert torch.equal(logits_of(Wrapper(model)), expected)
        assert torch.equal(logits_of(model), expected)
        assert handle.report().interventions[0].calls == 2


def test_shared_models_are_checked():
    """If SHARED were empty, the check in conftest.py after every test would check nothing."""
    model_of("llama")
    assert ("llama", torch.float32) in SHARED


class Adapter(torch.nn.Module):
    """Wraps a model as PEFT does: `generate` bypasses the wrapper's own forward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_base_model(self):
        return self.inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)


@pytest.mark.parametrize("given", ["wrapper", "inner"])
def test_wrappers_that_delegate_generate(given):
    model = model_of("llama")
    wrapper = Adapter(model)
    target = wrapper if given == "wrapper" else model
    with attach(target, Steer(make_sae(), 3, strength=5.0, positions="generated")) as handle:
        for caller in (wrapper, model):
            caller.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3)
        assert handle.report().interventions[0].positions == {0: [6, 7], 1: [6, 7]}
        assert handle.report().interventions[0].edited == 8


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
        peft.AdaLoraConfig(target_modules=["q_proj"], init_lora_weights=False, total_step=10),
        peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=lambda adapter: str(adapter.peft_type.value),
)
def test_peft(adapter):
    model = peft.get_peft_model(tiny_model("llama"), adapter).eval()
    clean = logits_of(model)
    with attach(model, Steer(make_sae(), 3, strength=5.0, positions="generated")) as handle:
        model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3)
        assert handle.report().interventions[0].positions[0] == [6, 7]
    with attach(model, Steer(make_sae(), 3, strength=5.0, positions=[1, 2])) as handle:
        edited = logits_of(model)
        assert torch.equal(edited[:, 0], clean[:, 0]) and not torch.equal(edited[:, 1], clean[:, 1])
        cache = model(input_ids=IDS[:, :2], use_cache=True).past_key_values
        torch.testing.assert_close(model(input_ids=IDS[:, 2:], past_key_values=cache).logits, edited[:, 2:])
        entry = handle.report().interventions[0]
        assert (entry.calls, entry.edited, entry.positions) == (3, 8, {0: [1, 2], 1: [1, 2]})
        assert torch.equal(logits_of(model.get_base_model()), edited)  # the same model, called directly
    assert torch.equal(logits_of(model), clean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("site", ["attn_z.1", "model.layers.1.self_attn.o_proj.output"])
def test_replacing_a_module_while_it_is_attached_to_is_an_error(site):
    """LoRA's branch would not read the edited input, or its output would not be edited."""
    model = tiny_model("llama")
    with attach(model, steer(site=site), check=False):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"]))
        with pytest.raises(AttachError, match=r"o_proj' at .* was replaced by a Linear.*attach\(\) again"):
            logits_of(model)
    with attach(model, steer(site="attn_z.1"), check=False) as handle:
        logits_of(model)
    assert handle.report().interventions[0].edited == 12
