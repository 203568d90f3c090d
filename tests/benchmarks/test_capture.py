"""What `capture` at layer L of N costs: within a tenth of (L + 1) / N of a forward."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_gated_sae import capture
from tests.benchmarks.measure import ratio, show

ALLOWANCE = 1.10


def gpt2_small():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval(), torch.randint(0, 50_000, (4, 128))


def llama_1b():
    """16 layers of 2048, as Llama 3.2 1B, with a small vocabulary: what is compared with is the blocks."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=32_000,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    values = torch.empty(1 << 22, dtype=torch.bfloat16).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():  # normal numbers for a billion parameters would take a minute
            parameter.copy_(
                values.repeat(-(-parameter.numel() // len(values)))[: parameter.numel()].view_as(parameter)
            )
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
        rotary = model.model.rotary_emb
        fresh = type(rotary)(config=config)
        for name, buffer in fresh.named_buffers():
            rotary.get_buffer(name).copy_(buffer)
    return model.eval(), torch.randint(0, 32_000, (1, 128))


@pytest.mark.benchmark
@pytest.mark.timeout(1200)
@torch.no_grad()
@pytest.mark.parametrize(("build", "layers", "rounds"), [(gpt2_small, (0, 5, 11), 9), (llama_1b, (0, 7, 15), 5)])
def test_capture_costs_its_part_of_a_forward(build, layers, rounds):
    model, ids = build()
    count = model.config.num_hidden_layers
    rows = [
        (
            f"resid_post.{layer} of {count}",
            ratio(
                lambda layer=layer: capture(model, f"resid_post.{layer}", input_ids=ids),
                lambda: model(ids, use_cache=False),
                rounds=rounds,
            ),
            ALLOWANCE * (layer + 1) / count,
        )
        for layer in layers
    ]
    show(f"capture in {type(model).__name__}, {list(ids.shape)} tokens; 1.0 = a whole forward", rows)
    for what, measured, limit in rows:
        assert measured <= limit, what
