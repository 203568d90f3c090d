"""Checks after every test that the shared models are unchanged."""

import pytest

from tests.hooks.support import SHARED, hooks_on


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    for model in SHARED.values():
        assert hooks_on(model) == ({}, []), "a hook or a shadowed method was left on a model"
        assert not any(module.training for module in model.modules())
