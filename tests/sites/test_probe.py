"""The model and the inputs of the probe; invalid ones are refused with an explanation."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchEncoding

from hf_gated_sae.errors import InputError, SAEError, SiteError
from hf_gated_sae.sites import read_name, resolve
from hf_gated_sae.sites.probe import make_subject
from tests.support.tiny_models import HIDDEN, tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("model", [None, "gpt2", 3, tiny_model])
def test_invalid_models_are_refused(model):
    for call in (resolve, lambda given: read_name("layers.1.mlp", "sparsify", model=given or 0)):
        with pytest.raises(InputError, match="expected a loaded one"):
            call(model)


@pytest.mark.parametrize(
    ("inputs", "error", "hint"),
    [
        ([1, 2], InputError, r"inputs are \[1, 2\]; expected keyword arguments"),
        (IDS, InputError, "expected keyword arguments"),
        ({}, SiteError, "must have 'input_ids' or 'inputs_embeds'"),
        ({"attention_mask": torch.ones_like(IDS)}, SiteError, "must have 'input_ids' or 'inputs_embeds'"),
        ({"input_ids": IDS.tolist()}, SiteError, r"expected a tensor \[B, S\].*return_tensors='pt'"),
        ({"input_ids": IDS[0]}, SiteError, r"a tensor \[5\]; expected \[B, S\]"),
        ({"input_ids": IDS[:0]}, SiteError, r"a tensor \[0, 5\].*not empty"),
        ({"input_ids": IDS[:, :1]}, SiteError, "2 x 1 tokens.*2 tokens or more"),
        ({"inputs_embeds": torch.ones(5, HIDDEN)}, SiteError, r"'inputs_embeds'.*expected \[B, S, width\]"),
        ({"input_ids": IDS, 3: 4}, SiteError, "keywords must be strings"),
    ],
)
def test_invalid_inputs_are_refused(llama, inputs, error, hint):
    with pytest.raises(error, match=hint) as caught:
        resolve(llama, inputs=inputs)
    assert isinstance(caught.value, SAEError)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


@pytest.mark.parametrize(
    "inputs",
    [
        BatchEncoding({"input_ids": IDS}),
        {"input_ids": IDS[:1, :2]},
        {"inputs_embeds": torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(0))},
    ],
)
def test_valid_inputs_are_accepted(llama, inputs):
    assert "resid_mid.1" in resolve(llama, inputs=inputs)


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("model.layers.0.mlp.down_proj.weight", float("nan"), "the output of model.layers.0.mlp.down_proj"),
        ("model.norm.weight", float("inf"), "the output of model.norm"),
        ("model.embed_tokens.weight", float("nan"), "the output of model.embed_tokens"),
    ],
)
def test_nan_in_the_model_itself_is_reported_after_one_forward(name, value, place):
    model = tiny_model("llama")
    weight = model.get_parameter(name)
    before = weight.detach().clone()
    weight.data.fill_(value)
    forwards = []
    counting = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    sites = resolve(model)
    counting.remove()
    assert len(forwards) == 1
    with pytest.raises(
        SiteError, match=f"because the model itself computes NaN or infinity, first seen at {place}, in"
    ):
        sites["resid_post.1"]
    assert sites["model.layers.0.output"].width == HIDDEN  # so that users can look for the cause
    weight.data.copy_(before)
    assert "resid_post.1" in resolve(model)


def test_logits_of_minus_infinity_are_allowed():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([3]), -torch.inf)
    )
    assert "because the model itself" not in resolve(model).evidence


@pytest.mark.parametrize("tokens", [1, 2, 3, 13])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mamba"])
def test_a_small_vocabulary_and_few_positions_are_enough(name, tokens):
    few = {"gpt2": {"n_positions": 4}, "mamba": {}}.get(name, {"max_position_embeddings": 4})
    special = {"bos_token_id": 0, "eos_token_id": tokens - 1, "pad_token_id": 0}
    small = tiny_model(name, vocab_size=tokens, **special, **few)
    assert resolve(small).names() == resolve(tiny_model(name)).names()


def test_a_large_vocabulary_is_probed_with_distinct_ordinary_tokens(llama):
    ids = make_subject(llama, None).ids
    assert ids.shape == (2, 7) and ids.unique().numel() == 14 and not {0, 1, 2} & set(ids.flatten().tolist())


def test_the_two_sequences_differ_in_a_small_vocabulary():
    for tokens, positions in ((2, 4), (3, 6), (4, 4), (5, 5)):
        ids = make_subject(tiny_model("gpt2", vocab_size=tokens + 3, n_positions=positions), None).ids
        assert ids.shape == (2, positions) and not torch.equal(*ids)
