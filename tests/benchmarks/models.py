"""Models of real sizes with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def gpt2_small() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def llama_1b() -> Any:
    """16 layers of 2048 in bfloat16, as Llama 3.2 1B; the vocabulary is small because only the blocks matter."""
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
        for name, parameter in model.named_parameters():  # drawing them all would take a minute
            repeated = values.repeat(-(-parameter.numel() // len(values)))[: parameter.numel()]
            parameter.fill_(1.0) if "norm" in name else parameter.copy_(repeated.view_as(parameter))
        rotary = model.model.rotary_emb
        for name, buffer in type(rotary)(config=config).named_buffers():
            rotary.get_buffer(name).copy_(buffer)
    return model.eval()
