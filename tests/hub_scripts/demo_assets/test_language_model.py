"""The shipped language model matches its `training.json`; its training works on a small scale."""

import json
import re

import pytest
import torch

from hf_gated_sae.demo import corpus
from hf_gated_sae.errors import InputError
from hub_scripts.demo_assets import language_model
from hub_scripts.demo_assets.language_model_report import (
    LineCount,
    count_python_lines,
    held_out_loss,
    sample,
    token_lengths,
)

pytestmark = pytest.mark.slow

TINY = language_model.LanguageModelRecipe(
    vocab_size=300,
    context=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    steps=40,
    batch_size=8,
    warmup_steps=5,
)


@pytest.fixture(scope="module")
def shipped():
    return language_model.load_language_model()


@pytest.fixture(scope="module")
def facts():
    return json.loads((language_model.ASSETS / "training.json").read_text(encoding="utf-8"))


def test_the_assets_are_small_and_name_no_machine():
    files = [path for path in language_model.ASSETS.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2.5e6
    for path in files:
        # An absolute path would have come from the machine that built the assets.
        assert not re.search(rb"(/root|/home|/usr|/tmp|/work|C:\\)", path.read_bytes()), path.name


def test_the_shipped_model_is_as_good_as_it_says(shipped, facts):
    model, tokenizer = shipped
    assert model.dtype == torch.float32 and not model.training
    stream = language_model.token_stream(tokenizer, corpus.texts("training", 300_000))
    loss = held_out_loss(model, tokenizer, corpus.texts("held_out", 60_000), stream)
    assert facts["held_out"]["share_of_unigram"] < 0.6
    # Another Python has other files, and this is only a part of them.
    assert loss.share_of_unigram == pytest.approx(facts["held_out"]["share_of_unigram"], abs=0.08)


def test_the_tokenizer_gives_every_text_back(shipped):
    _, tokenizer = shipped
    text = "def f(x):\n\n        return 'é → 字'  # done\t\n"
    encoding = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoding["input_ids"]) == text
    assert "".join(text[a:b] for a, b in encoding["offset_mapping"] if b > a).startswith("def f(x):\n\n        return")
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == language_model.END_OF_TEXT
    assert token_lengths(tokenizer)[encoding["input_ids"]].sum() == len(text.encode())


def test_samples_are_repeatable_and_leave_the_random_state_alone(shipped):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = sample(*shipped, count=2, tokens=12, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == sample(*shipped, count=2, tokens=12, seed=5)
    assert first != sample(*shipped, count=2, tokens=12, seed=6)


def test_training_is_repeatable_and_lowers_the_loss(tmp_path):
    texts = list(corpus.texts("training", 30_000))
    losses, states = [], []
    for _ in range(2):
        tokenizer = language_model.train_tokenizer(texts, TINY.vocab_size)
        model = language_model.build_model(tokenizer, TINY)
        stream = language_model.token_stream(tokenizer, texts)
        language_model.train(model, stream, TINY, lambda step, loss: losses.append(loss))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert losses[TINY.steps - 1] < losses[0] - 0.2
    language_model.save_language_model(model, tokenizer, tmp_path)
    loaded, _ = language_model.load_language_model(tmp_path)
    assert torch.equal(loaded.lm_head.weight, states[0]["lm_head.weight"].half().float())


def test_packing_drops_what_does_not_fill_a_sequence():
    stream = torch.arange(11)
    assert language_model.pack(stream, 4, offset=2).tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    with pytest.raises(InputError, match="do not fill one sequence"):
        language_model.pack(stream, 12)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="make_demo_assets"):
        language_model.load_language_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import os\nx = (1,\n", LineCount(2, 2, 1, 1)),
        ("x = 1\nthis line is prose\n", LineCount(2, 1, 2, 1)),
        ("    else:\n        return 1\n", LineCount(2, 2, 2, 2)),
        ("try:\n    pass\nexcept E as e:\n    raise\n", LineCount(4, 4, 4, 4)),
        ("@property\n# a comment\n\n'''text\n\nmore'''\n", LineCount(4, 4, 1, 1)),
        ("f(a,\n  b)\nx = 1\ny = 'cut", LineCount(3, 3, 3, 3)),
        ("x = (1]\ndef f(:\n", LineCount(2, 0, 1, 0)),
        ("x = 'open\ny = [)\n", LineCount(2, 0, 2, 0)),
        ('"""A text that\ngoes on\n', LineCount(2, 2, 0, 0)),
        ("no line break", LineCount()),
    ],
)
def test_lines_are_counted_as_python(text, expected):
    assert count_python_lines(text) == expected
