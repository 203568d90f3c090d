"""Sites that the forward does not reach are reported."""

import pytest
import torch
from torch import nn

from hf_gated_sae import Steer, attach, capture
from hf_gated_sae.errors import AttachError
from tests.hooks.support import IDS, hooks_on, logits_of, make_sae, model_of, steer
from tests.support.tiny_models import tiny_model


class Boom(Exception):
    pass


def test_a_site_that_the_forward_does_not_reach_is_reported():
    model = tiny_model("llama")
    prepared = attach(model, steer(), steer(site="resid_post.2"))
    skipped = model.model.layers[2]
    skipped.forward, forward = lambda hidden_states, **_: hidden_states, skipped.forward
    with prepared:  # the module still runs, so there is no error
        logits_of(model)
    skipped.forward = forward
    model.model.config.num_hidden_layers = 2  # llama then runs only the first two layers
    with pytest.raises(AttachError, match=r"never reached resid_post\.2"):
        with prepared:
            logits_of(model)
    assert hooks_on(model) == ({}, [])
    with prepared:
        pass  # the model did not run


def test_a_forward_that_reaches_no_site_is_reported():
    model = tiny_model("llama")
    prepared = attach(model, steer(site="resid_post.2"))
    model.model.config.num_hidden_layers = 2
    with pytest.raises(AttachError, match=r"The model ran, but never reached resid_post\.2"):
        with prepared:
            logits_of(model)
    with pytest.raises(AttachError, match="never reached"):
        with prepared:
            model.generate(IDS, max_new_tokens=2)
    with pytest.raises(Boom):  # an earlier error is not hidden by this one
        with prepared:
            logits_of(model)
            raise Boom


def test_disable_raises_the_same_errors_as_the_end_of_a_block():
    model = model_of("llama")
    handle = attach(model, steer(positions=[0, 500])).enable()
    logits_of(model)
    with pytest.raises(AttachError, match=r"positions \[500\] .* never reached"):
        handle.disable()
    assert not handle.enabled and hooks_on(model) == ({}, [])
    handle.disable()  # the second time does nothing
    with pytest.raises(AttachError, match=r"positions \[500\]"):
        with handle:
            logits_of(model)
            handle.disable()


def test_disabling_does_not_hide_an_exception():
    model = model_of("llama")
    handle = attach(model, steer(positions=[0, 500]))
    with pytest.raises(Boom) as caught:
        handle.enable()
        try:
            logits_of(model)
            raise Boom
        finally:
            handle.disable()
    assert caught.value.__context__ is None and hooks_on(model) == ({}, [])
    try:
        raise Boom
    except Boom:  # a block that ends normally raises its error even inside `except`
        with pytest.raises(AttachError, match=r"positions \[500\]"), handle:
            logits_of(model)


def test_probing_and_stopped_captures_do_not_count_as_running():
    model = tiny_model("llama")
    with attach(model, steer(site="resid_post.2")):
        capture(model, "resid_post.0", input_ids=IDS)
        model.register_module("later", nn.Identity())  # so that the model has to be probed again
        attach(model, steer(site="embed"))


def test_calling_only_a_part_of_the_attached_model_is_refused():
    model = model_of("llama")
    with pytest.raises(AttachError, match="was not called"), attach(model, steer()), torch.no_grad():
        model.model(IDS)


def test_attaching_to_the_part_that_is_called_works():
    model = model_of("llama")
    with attach(model, steer()):
        expected = logits_of(model)
    with attach(model.model, Steer(make_sae(site="layers.1.output"), 3, strength=6.0, unit="raw")):
        assert torch.equal(logits_of(model), expected)
    assert hooks_on(model.model) == ({}, [])
