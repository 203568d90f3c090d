"""Interventions act only on calls from the thread or task that attached them, and from tasks begun there."""

import asyncio
import threading

import pytest
import torch

from hf_gated_sae import attach
from hf_gated_sae.errors import AttachError
from hf_gated_sae.hooks.dispatch import is_attached
from tests.hooks.support import IDS, hooks_on, is_clean, logits_of, model_of, steer
from tests.support.tiny_models import tiny_model


def test_threads_that_attach_at_once_leave_no_hooks():
    model = model_of("llama")
    clean = logits_of(model)
    failures = []

    def work(strength):
        try:
            for _ in range(20):
                with attach(model, steer(strength)):
                    assert torch.isfinite(logits_of(model)).all()
        except BaseException as error:  # pytest would not see an error in a thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert is_clean(model, clean)


def in_thread(function):
    """Run a function in another thread and return its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_plain_call_from_another_thread_is_untouched():
    model = model_of("llama")
    clean = logits_of(model)
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    written = model.generate(IDS, **settings)
    with attach(model, steer()) as handle:
        edited = logits_of(model)
        assert torch.equal(in_thread(lambda: logits_of(model)), clean)
        assert torch.equal(in_thread(lambda: model.generate(IDS, **settings)), written)
        with attach(model, steer(-2.0)):
            both = logits_of(model)
        assert handle.report().interventions[0].calls == 2

        def on_its_own():
            with attach(model, steer(-2.0)):
                return logits_of(model)

        own = in_thread(on_its_own)
        assert not torch.equal(own, both) and not torch.equal(own, clean)
        assert torch.equal(logits_of(model), edited)


def test_a_task_begun_inside_is_edited_and_one_begun_before_is_not():
    model = model_of("llama")
    clean = logits_of(model)

    async def main():
        begin, attached = asyncio.Event(), asyncio.Event()

        async def before():
            begin.set()
            await attached.wait()
            return await asyncio.to_thread(logits_of, model)

        task = asyncio.create_task(before())
        await begin.wait()
        with attach(model, steer()):
            attached.set()
            edited = logits_of(model)
            inside = await asyncio.create_task(asyncio.to_thread(logits_of, model))
            outside = await task
        return edited, inside, outside

    edited, inside, outside = asyncio.run(main())
    assert torch.equal(inside, edited) and not torch.equal(edited, clean)
    assert torch.equal(outside, clean)


def test_generate_in_a_thread_as_for_streamers_is_edited():
    model = model_of("llama")
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with attach(model, steer(positions="generated"), all_threads=True):
        expected = model.generate(IDS, **settings)
        assert torch.equal(in_thread(lambda: model.generate(IDS, **settings)), expected)
    assert not torch.equal(model.generate(IDS, **settings), expected)


def test_an_error_reports_that_only_other_threads_called_the_model():
    model = model_of("llama")
    with pytest.raises(AttachError, match="another thread.*all_threads=True"), attach(model, steer()):
        in_thread(lambda: logits_of(model))
    assert hooks_on(model) == ({}, [])


def test_a_failed_enable_leaves_the_model_unchanged():
    class Closed(type(model_of("llama"))):
        def __setattr__(self, name, value):
            if name == "generate":
                raise RuntimeError("closed")
            super().__setattr__(name, value)

    model = tiny_model("llama")
    clean = logits_of(model)
    handle = attach(model, steer())
    model.__class__ = Closed
    with pytest.raises(RuntimeError, match="closed"):
        handle.enable()
    assert not handle.enabled and not is_attached(model)
    assert is_clean(model, clean)
    model.__class__ = Closed.__base__
    with handle:
        assert not torch.equal(logits_of(model), clean)
