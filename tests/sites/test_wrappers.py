"""Sites of models inside wrappers: adapters, data parallelism, sharding, and vision-language models."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_gated_sae.sites import resolve
from tests.support.tiny_models import randomise, tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def read(model, *sites, run=None, edits=None):
    """Return the logits of a forward through the wrapper, and the values at some sites."""
    found = {}
    proven = resolve(model)

    def note(site):
        def hook(value):
            found[site] = value.detach().clone()
            return (edits or {}).get(site, lambda x: None)(value)

        return hook

    handles = [proven[site].register(note(site)) for site in (*sites, *(edits or {}))]
    try:
        with torch.no_grad():
            logits = (run or model)(input_ids=IDS, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, found


@pytest.fixture
def alone():
    """A process group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel(alone):
    model = tiny_model("llama")
    wrapped = DistributedDataParallel(model)
    assert resolve(wrapped) is resolve(model)
    logits, found = read(wrapped, "resid_post.1", "attn_z.0")
    plain, expected = read(model, "resid_post.1", "attn_z.0")
    assert torch.equal(logits, plain)
    assert all(torch.equal(found[site], expected[site]) for site in expected)
    edited, _ = read(wrapped, edits={"resid_post.1": lambda x: x * 0})
    assert not torch.equal(edited, plain)


def test_fully_sharded(alone):
    """FSDP2 renames the class of every sharded module; blocks are not recognised by class names."""
    plain, expected = read(tiny_model("llama"), "resid_mid.1", "mlp_out.2", "resid_mid.1|norm_no_gain")
    model = tiny_model("llama")
    names = resolve(model).names()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert type(model.model.layers[0]).__name__ == "FSDPLlamaDecoderLayer"
    assert resolve(model).names() == names
    logits, found = read(model, *expected)
    assert torch.equal(logits, plain)
    assert all(torch.equal(found[site], expected[site]) for site in expected)
    edit = {"attn_out.1": lambda x: x * 2}
    assert torch.equal(read(model, edits=edit)[0], read(tiny_model("llama"), edits=edit)[0])


def test_class_names_mean_nothing():
    model, other = tiny_model("gemma2"), tiny_model("gemma2")
    expected = resolve(other)
    for module in model.modules():
        module.__class__ = type("Thing", (type(module),), {})
    sites = resolve(model)
    assert sites.names() == expected.names()
    assert [sites[name].tensor_path for name in sites.names()] == [
        expected[name].tensor_path for name in expected.names()
    ]
    assert sites["resid_mid.1|norm_no_gain"].tensor_path == expected["resid_mid.1|norm_no_gain"].tensor_path


def test_a_vision_language_model_with_as_many_blocks_in_its_vision_tower():
    from transformers import AutoModelForImageTextToText, LlavaConfig

    text = tiny_model("llama").config.to_dict() | {"vocab_size": 97}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"intermediate_size": 48, "image_size": 8, "patch_size": 4}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=90, vision_feature_layer=-1)
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model)
    sites = resolve(model)
    assert sites.n_layers == 3
    assert {row.tensor_path for row in sites.rows() if row.name == "resid_post"} == {
        "model.language_model.layers.L.output"
    }
    logits, found = read(model, "resid_post.2", "resid_post.2|norm_no_gain", "final_norm")
    gain = model.model.language_model.norm.weight.detach()
    torch.testing.assert_close(found["resid_post.2|norm_no_gain"] * gain, found["final_norm"])
    assert torch.equal(model.lm_head(found["final_norm"]), logits)

    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 90, 90, 90, 90, 6, 7]])
    seen = []
    handle = sites["resid_post.2"].register(lambda value: seen.append(value.shape))
    model(input_ids=ids, pixel_values=image)
    handle.remove()
    assert seen == [(1, 7, 32)], "the text's blocks once, the vision tower's never"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT still asks for it
class TestPeft:
    """Real adapters, where PEFT is installed."""

    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def adapted(self, peft, model):
        config = peft.LoraConfig(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    def test_lora_is_part_of_what_is_added_to_the_stream(self, peft):
        model = tiny_model("llama")
        before = resolve(model)
        plain, clean = read(model, "attn_z.0", "attn_out.0")
        wrapped = self.adapted(peft, model)
        sites = resolve(wrapped)
        assert sites is resolve(model) and sites is not before, "the modules have changed"
        assert sites.names() == before.names()
        z = sites["attn_z.0"]
        assert str(z.tensor_path) == "model.layers.0.self_attn.o_proj.input"
        assert hasattr(z.module, "base_layer"), "the adapted module, not the one inside"
        logits, found = read(wrapped, "attn_z.0", "attn_out.0")
        assert not torch.equal(logits, plain)
        assert torch.equal(found["attn_z.0"], clean["attn_z.0"])
        assert not torch.equal(found["attn_out.0"], clean["attn_out.0"])
        with torch.no_grad():
            assert torch.equal(z.module(found["attn_z.0"]), found["attn_out.0"])

    def test_writes_reach_the_adapter(self, peft):
        wrapped = self.adapted(peft, tiny_model("llama"))
        _, found = read(wrapped, "attn_out.0", edits={"attn_z.0": torch.zeros_like})
        assert not found["attn_out.0"].any()
        assert torch.equal(read(wrapped, edits={"attn_z.0": torch.clone})[0], read(wrapped)[0])

    def test_switched_off_and_merged(self, peft):
        model = tiny_model("llama")
        wrapped = self.adapted(peft, model)
        edit = {"mlp_neurons.1": lambda x: x * 0.5}
        active, _ = read(wrapped, edits=edit)
        with wrapped.disable_adapter():
            off, _ = read(wrapped, edits=edit)
        assert torch.equal(off, read(tiny_model("llama"), edits=edit)[0])
        merged = wrapped.merge_and_unload()
        assert str(resolve(merged)["mlp_neurons.1"].tensor_path) == "model.layers.1.mlp.down_proj.input"
        torch.testing.assert_close(read(merged, edits=edit)[0], active)

    def test_prompt_tuning_puts_virtual_tokens_first(self, peft):
        model = tiny_model("llama")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        wrapped = peft.get_peft_model(model, config).eval()
        assert resolve(wrapped) is resolve(model)
        _, found = read(wrapped, "resid_post.1", "resid_mid.1|center")
        assert found["resid_post.1"].shape == found["resid_mid.1|center"].shape == (2, 9, 32)
        assert torch.equal(read(wrapped, edits={"resid_post.1": torch.clone})[0], read(wrapped)[0])

    def test_within_another_wrapper(self, peft, alone):
        wrapped = self.adapted(peft, tiny_model("llama"))
        assert resolve(DistributedDataParallel(wrapped)) is resolve(wrapped)

    def test_a_norm_in_modules_to_save_is_proven(self, peft):
        model = tiny_model("llama")
        config = peft.LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["post_attention_layernorm"])
        wrapped = peft.get_peft_model(model, config).eval()
        sites = resolve(wrapped)
        assert sites["resid_mid.1|norm_no_gain"].tensor_path.transforms[0].name == "rms_norm"


def test_a_model_may_be_a_part_of_another():
    """For a user's own wrapper, pass the model inside: its hooks fire in calls of the wrapper."""

    class Policy(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.lm, self.value = model, nn.Linear(32, 1)

        def forward(self, **inputs):
            return self.lm(**inputs)

    model = tiny_model("llama")
    policy = Policy(model)
    logits, found = read(model, "resid_post.2", run=policy)
    plain, expected = read(model, "resid_post.2")
    assert torch.equal(logits, plain) and torch.equal(found["resid_post.2"], expected["resid_post.2"])
