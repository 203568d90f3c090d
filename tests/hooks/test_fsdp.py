"""Fully sharded data parallelism over two ranks: edits and captures are those of one process, on every rank."""

import pytest

from tests.hooks.distributed import fully_sharded
from tests.hooks.distributed.ranks import launch, require_passed
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fully_sharded")
    tiny_model("llama").save_pretrained(folder / "llama")
    return launch(fully_sharded.__name__, folder)


@pytest.mark.parametrize("check", fully_sharded.CHECKS)
def test_on_two_ranks(ended, check):
    require_passed(ended, check)
