"""Interventions attached to a model also act in compiled functions that call it."""

import gc
import threading

import pytest
import torch

from hf_gated_sae import Splice, Steer, attach
from hf_gated_sae.errors import AttachError
from tests.hooks.support import IDS, SITE, logits_of, make_sae, model_of
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch._dynamo.reset()


def steer():
    return Steer(SITE, torch.linspace(-1, 1, 32), strength=2.0)


def caller_of(model):
    @torch.compile(backend="eager")
    def call(ids):
        return model(ids).logits

    return call


def is_compiling_again():
    """Whether torch.compile compiles a function that is called now."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    return bool(graphs)


@torch.no_grad()
def test_a_function_compiled_before_the_block_is_edited_only_inside_it():
    model = model_of("llama")
    call = caller_of(model)
    clean = call(IDS)
    with attach(model, steer(), check=False) as handle:
        edited = call(IDS)
        expected = logits_of(model, IDS)
    assert torch.equal(edited, expected) and not torch.allclose(edited, clean, atol=1e-3)
    assert [entry.calls for entry in handle.report().interventions] == [2]
    assert torch.equal(call(IDS), clean)  # runs the code that was compiled before


@torch.no_grad()
def test_a_function_first_called_inside_the_block_keeps_no_edit():
    model = model_of("llama")
    clean, call = logits_of(model, IDS), caller_of(model)
    with attach(model, Splice(make_sae()), check=False):
        assert torch.equal(call(IDS), logits_of(model, IDS))
    torch.testing.assert_close(call(IDS), clean)


@torch.no_grad()
def test_a_compiled_part_of_the_model_is_edited():
    model = model_of("llama")
    layers = torch.compile(lambda ids: model.model(ids).last_hidden_state, backend="eager")
    clean = layers(IDS)
    with attach(model.model, Steer("layers.1.output", torch.ones(32), strength=9.0), check=False):
        assert not torch.allclose(layers(IDS), clean, atol=1e-3)
    assert torch.equal(layers(IDS), clean)


@torch.no_grad()
def test_compiled_functions_are_edited_between_enable_and_disable_in_any_order():
    model = model_of("llama")
    call = caller_of(model)
    clean = call(IDS)
    first, second = attach(model, steer(), check=False), attach(model, steer(), check=False)
    first.enable()
    second.enable()
    both = call(IDS)
    first.disable()
    one = call(IDS)
    assert not is_compiling_again()
    second.disable()
    second.disable()
    assert not torch.allclose(both, one, atol=1e-3) and not torch.allclose(one, clean, atol=1e-3)
    assert torch.equal(call(IDS), clean) and is_compiling_again()


@torch.no_grad()
def test_calls_from_other_threads_are_edited_with_all_threads():
    model = model_of("llama")
    call = caller_of(model)
    clean, found = call(IDS), []

    @torch.no_grad()
    def work():
        found.append(call(IDS))

    def run():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found.pop()

    with attach(model, steer(), check=False, all_threads=True):
        assert torch.equal(run(), logits_of(model, IDS))
    with attach(model, steer(), check=False):
        torch.testing.assert_close(run(), clean)
        call(IDS)
    assert torch.equal(run(), clean)


def test_the_compiler_stance_is_always_restored():
    model = model_of("llama")
    with pytest.raises(ZeroDivisionError), attach(model, steer(), check=False):
        _ = 1 / 0
    assert is_compiling_again()
    handle = attach(model, steer(), check=False)
    with handle, pytest.raises(AttachError, match="attached already"):
        handle.enable()
    assert is_compiling_again()
    with torch.compiler.set_stance("force_eager"):
        with attach(model, steer(), check=False):
            logits_of(model, IDS)
        assert not is_compiling_again()
    assert is_compiling_again()


def test_the_compiler_stance_is_restored_when_the_model_is_deleted():
    model = tiny_model("llama")
    handle = attach(model, steer(), check=False).enable()
    assert not is_compiling_again()
    del model
    gc.collect()
    assert is_compiling_again()
    handle.disable()
    assert is_compiling_again()


def test_attaching_inside_a_compiled_function_is_refused():
    model = model_of("llama")
    handle = attach(model, steer(), check=False)

    @torch.compile(backend="eager")
    def call(ids):
        with handle:
            return model(ids).logits

    with torch.no_grad(), pytest.raises(AttachError, match="inside a function that is being compiled"):
        call(IDS)
    assert not handle.enabled and is_compiling_again()
    with handle:
        logits_of(model, IDS)
