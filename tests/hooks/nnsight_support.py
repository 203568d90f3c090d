"""nnsight models for the tests, separate from the shared ones: nnsight leaves its controllers on what it wraps."""

import functools

import torch
from nnsight import TransformersModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_models import tiny_model


@functools.cache
def tokenizer():
    words = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(97)}, unk_token="<3>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", unk_token="<3>", padding_side="left")


def wrap(model, **settings):
    return TransformersModel(model, tokenizer=tokenizer(), task="text-generation", **settings)


@functools.cache
def wrapped(family, dtype="float32"):
    """An nnsight model with the same weights as `model_of`."""
    return wrap(tiny_model(family).to(getattr(torch, dtype)))
