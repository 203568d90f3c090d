"""Gradient checkpointing recomputes each forward in backward() with the interventions that acted on it."""

import gc
import threading
import weakref

import pytest
import torch

from hf_gated_sae import Splice, Steer, attach, capture
from hf_gated_sae.errors import AttachError
from hf_gated_sae.hooks.dispatch import paused
from tests.hooks.support import IDS, checkpoint_layers, close, make_sae
from tests.support.tiny_models import HIDDEN, tiny_model

OTHER = IDS[:1, :4]


def steer(strength=3.0, **settings):
    return Steer("attn_out.1", torch.ones(HIDDEN), strength=strength, **settings)


def loss(model, ids=IDS):
    return model(ids).logits.square().sum()


def train(step, checkpointing):
    """Return a model's gradients after a training step."""
    model = tiny_model("llama").train()
    if checkpointing is not None:
        checkpoint_layers(model, reentrant=checkpointing)
        model.enable_input_require_grads()
    step(model)
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def plain_before(model):
    plain = loss(model)
    with attach(model, steer()):
        loss(model)
        plain.backward()


def plain_before_and_steered(model):
    plain = loss(model)
    with attach(model, steer(positions=[0, -1])):
        (plain + loss(model, OTHER)).backward()


def several_in_one_block(model):
    with attach(model, steer(positions=[0, -1])):
        (loss(model) + loss(model, OTHER) + loss(model, IDS[:, :3])).backward()


def two_backwards_in_reverse_order(model):
    with attach(model, steer(positions=[-1])):
        first, second = loss(model), loss(model, OTHER)
        second.backward()
        first.backward()


def paused_within(model):
    with attach(model, steer()):
        with paused():
            plain = loss(model)
        steered = loss(model)
        (plain + 2 * steered).backward()


def nested_blocks(model):
    with attach(model, steer()):
        outer = loss(model)
        with attach(model, steer(-2.0, positions=[1])):
            (outer + loss(model)).backward()


def with_a_capture_between(model):
    with attach(model, steer()):
        steered = loss(model)
        capture(model, "attn_out.1", input_ids=IDS)
        steered.backward()


def plain_from_an_earlier_block(model):
    with attach(model, steer()):
        with paused():
            plain = loss(model)
    with attach(model, steer()):
        plain.backward()


STEPS = [
    plain_before,
    plain_before_and_steered,
    several_in_one_block,
    two_backwards_in_reverse_order,
    paused_within,
    nested_blocks,
    with_a_capture_between,
    plain_from_an_earlier_block,
]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_each_forward_is_recomputed_as_it_was(step, reentrant):
    expected, found = train(step, None), train(step, reentrant)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        close(found[name], value, 1e-5)


def in_threads(model, count):
    """Return the losses of forwards that each run in another thread."""
    found = []
    for _ in range(count):
        thread = threading.Thread(target=lambda: found.append(loss(model)))
        thread.start()
        thread.join()
    return found


def test_a_plain_forward_of_another_thread_is_recomputed_without_edits():
    def step(model):
        with attach(model, steer()):
            (plain,) = in_threads(model, 1)
            with torch.no_grad():
                loss(model)
            plain.backward()

    expected = train(lambda model: loss(model).backward(), None)
    for name, value in train(step, False).items():
        close(value, expected[name], 1e-5)


def test_forwards_of_two_threads_that_cannot_be_told_apart_are_refused():
    def step(model):
        with attach(model, steer(), all_threads=True), pytest.raises(AttachError, match="several threads"):
            sum(in_threads(model, 2)).backward()

    train(step, False)


@pytest.mark.parametrize("again", [False, True])
def test_a_forward_whose_edit_was_detached_is_refused(again):
    def step(model):
        handle = attach(model, steer()).enable()
        steered = loss(model)
        handle.disable()
        with attach(model, steer(1.0)) if again else handle, pytest.raises(AttachError, match="detached since"):
            loss(model)
            steered.backward()

    train(step, False)


def test_too_many_forwards_before_one_backward_are_refused():
    def step(model):
        with attach(model, steer()), pytest.raises(AttachError, match="too long ago"):
            first = loss(model, OTHER)
            for _ in range(256):
                loss(model, OTHER[:, :1])
            first.backward()

    train(step, False)


def test_an_ended_attachment_is_not_kept_alive_by_an_outer_one():
    model = tiny_model("llama").train()
    with attach(model, steer()):
        with attach(model, Splice(make_sae())) as inner:
            steered = loss(model)
        ended = weakref.ref(inner)
        del inner
        gc.collect()
        assert ended() is None
    assert steered.requires_grad
