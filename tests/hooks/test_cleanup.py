"""Whatever happens inside a block, the model is restored afterwards; blocks nest in any order."""

import copy
import gc
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig

from hf_gated_sae import Ablate, Clamp, ProjectOut, Splice, Steer, attach, capture
from hf_gated_sae.errors import AttachError, InputError, SAEError, ShapeError, SiteError
from hf_gated_sae.interventions import AblateSite, Edit
from hf_gated_sae.sites import Site
from tests.hooks.support import IDS, block, close, hooks_on, is_clean, logits_of, make_sae, model_of, steer
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.slow


class Boom(Exception):
    pass


@dataclass(frozen=True, eq=False)
class Fails(Edit):
    """An intervention with a mistake in it."""

    error: BaseException

    @property
    def first_site(self):
        return Site.parse("resid_post.1")

    def delta(self, run):
        raise self.error


@pytest.mark.parametrize("error", [Boom(), KeyboardInterrupt(), SystemExit(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("where", ["block", "forward", "intervention", "generate"])
def test_an_exception_leaves_no_hooks(where, error):
    model = model_of("llama")
    clean = logits_of(model)

    def fail(*_):
        raise error

    handle = block(model, "llama", 2).register_forward_hook(fail) if where == "forward" else None
    with pytest.raises(type(error)):
        with attach(model, steer(), *([Fails(error)] if where in ("intervention", "generate") else [])):
            if where == "generate":
                model.generate(IDS, max_new_tokens=2)
            if where != "block":
                logits_of(model)
            raise error
    if handle:
        handle.remove()
    assert is_clean(model, clean)
    with attach(model, steer()) as again:  # attaching still works
        assert not torch.equal(logits_of(model), clean)
        assert again.report().interventions[0].calls == 1
    assert is_clean(model, clean)


def test_interventions_stay_attached_after_an_exception_in_the_forward():
    model = model_of("llama")
    with attach(model, steer()):
        expected = logits_of(model)
        with pytest.raises(SAEError):
            model(input_ids=IDS[:, :0])
        with pytest.raises(TypeError):
            model(*[IDS] * 40)
        with pytest.raises(IndexError):
            model(input_ids=IDS + 1000)
        assert torch.equal(logits_of(model), expected)
        with pytest.raises(AttachError, match="was not called"):
            model.model(IDS)  # the call that failed is over


def test_a_model_that_is_called_within_its_own_forward():
    """Each call keeps its own positions."""
    model = tiny_model("llama")
    inner = []

    def call_again(module, args):
        if not inner:
            inner.append(None)
            inner[0] = logits_of(model, IDS[:1, :3])

    with attach(model, steer(positions=[-1])):
        expected, short = logits_of(model), logits_of(model, IDS[:1, :3])
        block(model, "llama", 0).register_forward_pre_hook(call_again)
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(inner[0], short)


def test_a_generator_that_is_abandoned_half_way():
    model = model_of("llama")
    clean = logits_of(model)

    def stream():
        with attach(model, steer()):
            while True:
                yield logits_of(model)

    running = stream()
    assert not torch.equal(next(running), clean)
    del running
    gc.collect()
    assert is_clean(model, clean)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: Ablate(make_sae(site="resid_post.77"), [1]), SiteError),
        (lambda: Ablate(make_sae(site="no.such.module.output"), [1]), SiteError),
        (lambda: Ablate(make_sae(d_in=16), [1]), ShapeError),
        (lambda: ProjectOut("resid_post.1", torch.ones(31)), ShapeError),
        (lambda: AblateSite("resid_post.1", torch.ones(31)), ShapeError),
        (lambda: "not an intervention", InputError),
    ],
)
def test_attaching_fails_as_a_whole(wrong, error):
    model = model_of("llama")
    clean = logits_of(model)
    with pytest.raises(error):
        attach(model, steer(), wrong())
    assert is_clean(model, clean)


def test_a_model_that_changed_since_attach_is_left_as_it_is():
    """The second site is gone when the block is entered: the first must not stay hooked."""
    model = tiny_model("llama")
    prepared = attach(model, steer(), steer(site="resid_post.2"))
    model.model.layers = model.model.layers[:2]
    with pytest.raises(SiteError):
        prepared.enable()
    assert hooks_on(model) == ({}, [])
    assert not prepared.enabled


def test_nested_blocks_add_up_and_come_off_one_by_one():
    model = model_of("gpt2")
    clean = logits_of(model)
    outer, inner, other = steer(6.0), steer(-2.0), steer(3.0, site="mlp_out.0")
    with attach(model, steer(4.0), other):
        both = logits_of(model)
    with attach(model, outer):
        only_outer = logits_of(model)
        with attach(model, inner):
            with attach(model, other):
                close(logits_of(model), both, 1e-5)
        assert torch.equal(logits_of(model), only_outer)
    assert is_clean(model, clean)


def test_handles_may_be_disabled_in_any_order():
    model = model_of("gpt2")
    clean = logits_of(model)
    first, second = attach(model, steer(6.0)), attach(model, steer(-2.0))
    with second:
        only_second = logits_of(model)
    first.enable()
    second.enable()
    first.disable()
    assert torch.equal(logits_of(model), only_second)
    assert second.enabled and not first.enabled
    second.disable()
    second.disable()  # the second time does nothing
    assert is_clean(model, clean)


def test_a_handle_can_be_used_again_but_not_within_itself():
    model = model_of("gpt2")
    handle = attach(model, steer())
    with handle:
        expected = logits_of(model)
        with pytest.raises(AttachError, match="attached already"):
            handle.enable()
        with pytest.raises(AttachError, match="attached already"), handle:
            pass
        assert torch.equal(logits_of(model), expected)
    with handle:
        assert torch.equal(logits_of(model), expected)
    assert handle.report().interventions[0].calls == 3


def test_preparing_does_not_touch_the_model():
    model = model_of("gpt2")
    clean = logits_of(model)
    handle = attach(model, steer())
    assert is_clean(model, clean)
    assert not handle.enabled


def test_two_replacements_of_one_site_exclude_each_other():
    model = model_of("llama")
    with pytest.raises(InputError, match=r"Both Splice and AblateSite replace resid_post\.1"):
        attach(model, Splice(make_sae()), AblateSite("resid_post.1"))
    with pytest.raises(InputError, match="Both Splice and AblateSite replace"):
        attach(model, Splice(make_sae()), AblateSite("model.layers.1.output"))
    with attach(model, Splice(make_sae())):
        expected = logits_of(model)
        with pytest.raises(InputError, match="Both Splice and Splice replace"):
            attach(model, steer(), Splice(make_sae())).enable()
        assert torch.equal(logits_of(model), expected)


def test_users_own_hooks_and_methods_survive():
    model = tiny_model("llama")
    seen = []
    block(model, "llama").register_forward_hook(lambda *_: seen.append("own"))
    own = model.generate
    model.generate = lambda *args, **kwargs: (seen.append("generate"), own(*args, **kwargs))[1]
    mine = model.generate
    with attach(model, steer(positions="generated")) as handle:
        model.generate(IDS, max_new_tokens=2, min_new_tokens=2)
        assert handle.report().interventions[0].positions[0] == [6]
    assert model.generate is mine
    assert seen.count("generate") == 1 and seen.count("own") >= 2
    assert len(block(model, "llama")._forward_hooks) == 1


# ------------------------------------------------------------------ compiled models


def test_a_compiled_model_is_refused():
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    for function in (lambda: attach(compiled, steer()), lambda: capture(compiled, "resid_post.1", input_ids=IDS)):
        with pytest.raises(AttachError, match="compiled"):
            function()
    model.compile(backend="eager")
    with pytest.raises(AttachError, match="compiled"):
        attach(model, steer())


def test_a_model_compiled_beside_the_attached_one_is_edited_or_reported():
    model = tiny_model("llama")
    clean = logits_of(model)
    compiled = torch.compile(model, backend="eager")
    try:
        with torch.no_grad():
            with attach(model, steer()):
                expected = logits_of(model)
            try:
                compiled(IDS)  # compiled without hooks
                with attach(model, steer()):
                    edited = compiled(IDS).logits
                assert torch.equal(edited, expected)
            except AttachError as error:
                assert "never reached" in str(error)
            close(compiled(IDS).logits, clean, 1e-5)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("given", ["keywords", "config", "positional config"])
def test_a_generation_does_not_run_code_that_was_compiled_without_the_edits(given):
    """transformers compiles by itself on a GPU with a static cache."""
    model = tiny_model("llama")
    compilation = CompileConfig(backend="eager", fullgraph=False)
    compilation._compile_all_devices = True
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=2)
    compiled = {"cache_implementation": "static", "compile_config": compilation}
    config = GenerationConfig(**settings, **compiled)
    generate = {
        "keywords": lambda: model.generate(IDS, **settings, **compiled),
        "config": lambda: model.generate(IDS, generation_config=config),
        "positional config": lambda: model.generate(IDS, config),
    }[given]
    with attach(model, steer(positions="generated")):
        expected = model.generate(IDS, **settings)
    clean = model.generate(IDS, **settings)
    assert not torch.equal(clean, expected)
    try:
        assert torch.equal(generate(), clean)
        with attach(model, steer(positions="generated")):
            assert torch.equal(generate(), expected)
        assert torch.equal(generate(), clean)
        assert not config.disable_compile  # the user's config is unchanged
    finally:
        torch._dynamo.reset()


# ------------------------------------------------------------------ memory


class Bare(nn.Module):
    """A model so small that ten thousand calls take a second."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.head = nn.Linear(4, 40)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def test_ten_thousand_calls_do_not_grow_memory():
    model, edit = Bare(), Steer(make_sae(site="embed.output", d_in=4), 3, positions=[0, 1])
    ids = torch.tensor([[5, 6, 7]])
    with attach(model, edit) as handle, torch.no_grad():
        for _ in range(5000):
            model(ids)
        before = sys.getallocatedblocks()
        for _ in range(5000):
            model(ids)
        grown = sys.getallocatedblocks() - before
        entry = handle.report().interventions[0]
    assert entry.calls == 10_000 and entry.edited == 20_000
    assert grown < 1000, f"{grown} objects in 5,000 calls"


def test_large_calls_are_counted_but_not_all_listed():
    model = Bare()
    early, late = torch.full((512, 2), 5), torch.full((1, 1024), 5)
    edit = Steer(make_sae(site="embed.output", d_in=4), 3, positions=range(0, 1024, 2))
    with attach(model, edit) as handle, torch.no_grad():
        model(early)
        for _ in range(1200):
            model(late)
        entry = handle.report().interventions[0]
    assert entry.edited == 512 + 1200 * 512
    assert list(entry.positions) == [0]  # the first call's rows are no longer listed


def test_an_enabled_handle_does_not_keep_the_model_alive():
    model = tiny_model("llama")
    handle = attach(model, steer()).enable()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(AttachError):
        copy.copy(handle).enable()
    handle.disable()
    with pytest.raises(AttachError, match="no longer exists"):
        handle.enable()


def test_clamps_in_nested_blocks_add_up():
    """Both read the clean activation, so their order does not matter."""
    model, sae = model_of("llama", torch.float64), make_sae(dtype=torch.float64)
    with attach(model, Clamp(sae, {3: 2.0}), Clamp(sae, {3: 5.0})):
        expected = logits_of(model)
    with attach(model, Clamp(sae, {3: 5.0})), attach(model, Clamp(sae, {3: 2.0})):
        close(logits_of(model), expected, 1e-12)
