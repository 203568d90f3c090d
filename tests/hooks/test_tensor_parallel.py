"""Tensor parallelism over two ranks: sites, activations and edits are those of the undivided model, on every rank."""

import pytest

from tests.hooks.distributed import tensor_parallel
from tests.hooks.distributed.ranks import launch, require_passed
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name, settings in tensor_parallel.MODELS.items():
        tiny_model(tensor_parallel.family(name), **settings).save_pretrained(folder / name)
    return launch(tensor_parallel.__name__, folder)


@pytest.mark.parametrize("check", tensor_parallel.CHECKS)
def test_on_two_ranks(ended, check):
    require_passed(ended, check)
