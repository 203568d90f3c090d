"""`capture` at layer L of N takes at most (L + 1) / N of a forward and a tenth of that more."""

import pytest
import torch

from hf_gated_sae import capture
from tests.benchmarks.measure import ratio, show
from tests.benchmarks.models import gpt2_small, llama_1b

ALLOWANCE = 1.10


@pytest.mark.benchmark
@pytest.mark.timeout(1200)
@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "batch", "layers", "rounds"), [(gpt2_small, 4, (0, 5, 11), 9), (llama_1b, 1, (0, 7, 15), 5)]
)
def test_capture_costs_its_share_of_a_forward(build, batch, layers, rounds):
    model = build()
    ids = torch.randint(3, 30_000, (batch, 128))
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
