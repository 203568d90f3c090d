"""One thread for tiny tensors; and after every test, the shared models are as they were."""

import pytest
import torch

from tests.hooks.support import SHARED, hooks_on


@pytest.fixture(autouse=True)
def nothing_left_behind():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for model in SHARED.values():
        assert hooks_on(model) == ({}, []), "a hook or a shadowed method was left on a model"
        assert not any(module.training for module in model.modules())
