"""Error rates of attach()'s site check for trained SAEs, on three kinds of text and at every site."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gated_sae import SAEModel
from hf_gated_sae.architectures.topk import TopKSAE, TopKSAEConfig
from hf_gated_sae.demo import corpus
from hf_gated_sae.demo.bundled import MODEL, SAES
from hf_gated_sae.training import SAETrainer, SAETrainingArguments, collect
from hub_scripts.demo_assets import dictionaries
from hub_scripts.demo_assets.language_model import pack, token_stream
from tests.hooks import check_rates

pytestmark = pytest.mark.slow

MOST_FALSE_ALARMS, MOST_MISSES = 0.02, 0.1
FRESH = "resid_post.2"
BUNDLED = sorted(str(path.parent.relative_to(SAES)) for path in SAES.glob("*/*/config.json"))


@pytest.fixture(scope="module")
def language_model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def texts():
    return check_rates.texts(AutoTokenizer.from_pretrained(MODEL), lengths=(128,), seeds=(0,))


def freshly_trained(model, site, folder):
    """An SAE trained for a few seconds on a few files, with the metrics that the trainer records."""
    tokens = pack(token_stream(AutoTokenizer.from_pretrained(MODEL), list(corpus.texts("training"))[:8]), 256)[:100]
    x = collect(model, [site], tokens.split(10))[site]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = TopKSAEConfig(d_in=x.shape[-1], d_sae=512, k=16, site=site, base_model=dictionaries.BASE_MODEL)
        sae = TopKSAE(config)
        arguments = SAETrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=200,
            activation_batch_size=512,
            learning_rate=3e-3,
            warmup_steps=10,
            logging_steps=200,
            recorded_activations=8192,
            disable_tqdm=True,
        )
        SAETrainer(sae, arguments, x).train()
    assert 0 < sae.config.recorded_fvu < 0.5
    return sae


@pytest.fixture(scope="module")
def rates_of(language_model, texts, tmp_path_factory):
    """A function that returns the rates of one SAE, measured once."""

    @functools.cache
    def rates_of(name):
        if name in BUNDLED:
            sae = SAEModel.from_pretrained(SAES / name)
        else:
            sae = freshly_trained(language_model, name, tmp_path_factory.mktemp("trained")).eval()
        rates = check_rates.count(language_model, {name: sae}, texts)
        assert rates.right == len(texts) and rates.wrong > 30 * len(texts)
        return rates

    return rates_of


@pytest.mark.parametrize("name", BUNDLED)
def test_false_alarms_and_misses_are_few(rates_of, name):
    rates = rates_of(name)
    assert rates.false_alarm_rate <= MOST_FALSE_ALARMS, str(rates)
    assert rates.miss_rate <= MOST_MISSES, str(rates)


def test_a_freshly_trained_sae_gives_no_false_alarm(rates_of):
    """Its recorded FVU is that on its training text; on other text FVU is much higher."""
    rates = rates_of(FRESH)
    assert not rates.false_alarms, str(rates)


def test_the_total_rates_are_low(rates_of):
    every = [rates_of(name) for name in (*BUNDLED, FRESH)]
    total = sum(every[1:], start=every[0])
    assert total.false_alarm_rate <= MOST_FALSE_ALARMS, str(total)
    assert total.miss_rate <= MOST_MISSES, str(total)
