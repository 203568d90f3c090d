"""Two processes, each with a part of an SAE or of a batch, compute what one process with all of it does."""

import pytest

from tests.hooks.distributed.ranks import launch, require_passed
from tests.training.distributed import sharded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return launch(sharded.__name__, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("check", sharded.CHECKS)
def test_on_two_ranks(ended, check):
    require_passed(ended, check)
