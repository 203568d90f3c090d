"""What an edit of four latents costs a GPT-2-small-sized model, in a forward and per token of greedy decoding."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gated_sae import Ablate, GatedSAE, GatedSAEConfig, Splice, attach
from tests.benchmarks.measure import ratio, show

ROWS, COLUMNS, NEW_TOKENS = 4, 128, 32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(0)
    return GatedSAE(GatedSAEConfig(d_in=768, d_sae=24_576, site="resid_post.6")).eval()


@pytest.mark.benchmark
@torch.no_grad()
def test_an_edit_of_four_latents_is_almost_free(model, sae):
    ids = torch.randint(0, 50_000, (ROWS, COLUMNS))
    prompt = ids[:1, :16]

    def forward():
        model(ids, use_cache=False)

    def decode():
        model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)

    edit, splice = attach(model, Ablate(sae, [1, 2, 3, 4])), attach(model, Splice(sae))

    def within(attachment, run):
        def attached():
            with attachment:
                run()

        return attached

    rows = [
        ("Ablate of 4 latents, forward", ratio(within(edit, forward), forward, rounds=21), 1.03),
        ("Ablate of 4 latents, greedy decoding", ratio(within(edit, decode), decode, rounds=11), 1.05),
    ]
    splices = [
        ("Splice, forward (no limit)", ratio(within(splice, forward), forward, rounds=7), float("inf")),
        ("Splice, greedy decoding (no limit)", ratio(within(splice, decode), decode, rounds=5), float("inf")),
    ]
    show("GPT-2-small size, 768 x 24,576 Gated SAE; 1.0 = nothing attached", rows + splices)
    for what, measured, limit in rows:
        assert measured <= limit, what
