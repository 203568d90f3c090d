"""`SAETrainer` trains the same SAEs in several processes as in one."""

import pytest
import torch

from tests.hooks.distributed.ranks import launch, require_passed
from tests.training.distributed import data_parallel, failing, grid

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with the results of every run in one process."""
    folder = tmp_path_factory.mktemp("data_parallel")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data_parallel.alone(folder)
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    return launch(data_parallel.__name__, folder)


@pytest.mark.parametrize("check", data_parallel.CHECKS)
def test_on_two_ranks(ended, check):
    require_passed(ended, check)


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    return launch(failing.__name__, tmp_path_factory.mktemp("failing"))


@pytest.mark.parametrize("check", failing.CHECKS)
def test_what_stops_two_ranks(failed, check):
    require_passed(failed, check)


@pytest.fixture(scope="module")
def in_a_grid(folder):
    place = folder / "grid"
    place.mkdir()
    return launch(grid.__name__, place, count=grid.RANKS)


@pytest.mark.parametrize("check", grid.CHECKS)
def test_on_four_ranks(in_a_grid, check):
    require_passed(in_a_grid, check, grid.RANKS)
