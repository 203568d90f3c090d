"""Values are read from, and written to, whatever container a module uses."""

import collections
import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_gated_sae import AblateSite, Patch, attach
from hf_gated_sae.errors import SiteError
from hf_gated_sae.sites.site import Site
from hf_gated_sae.sites.slots import Slot, TensorPath, get_tensor, put_tensor, tensors_in
from tests.support.tiny_models import tiny_model

Pair = collections.namedtuple("Pair", ["hidden", "other"])


class Wraps(nn.Module):
    """Returns its input plus one in a container."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, hidden, mask=None):
        return self.wrap(hidden + 1)


class Holder(nn.Module):
    """Passes its arguments to one module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


OTHER = torch.arange(3)
CONTAINERS = {
    "tensor": (lambda x: x, ()),
    "tuple": (lambda x: (OTHER, x, None), (1,)),
    "one-tuple": (lambda x: (x,), (0,)),
    "list": (lambda x: [x, OTHER], (0,)),
    "namedtuple": (lambda x: Pair(x, OTHER), (0,)),
    "dict": (lambda x: {"other": OTHER, "hidden": x}, ("hidden",)),
    "model output": (
        lambda x: BaseModelOutputWithPast(last_hidden_state=x),
        ("last_hidden_state",),
    ),
    "nested": (lambda x: (OTHER, (x, OTHER)), (1, 0)),
}


def make(name, port="output", keys=None, **place):
    wrap, out_keys = CONTAINERS[name]
    holder = Holder(Wraps(wrap))
    settings = {"rank": 3, "width": 4, "order": 0} | place
    slot = Slot(
        Site("inner", port=port), TensorPath("inner", port, out_keys if keys is None else keys, **settings), holder
    )
    return holder, slot, out_keys


@pytest.mark.parametrize("name", CONTAINERS)
def test_output_containers(name):
    holder, slot, keys = make(name)
    x = torch.randn(2, 3, 4)
    plain = holder(x)
    handle = slot.register(lambda value: value * 2)
    edited = holder(x)
    handle.remove()
    assert type(edited) is type(plain)
    assert torch.equal(get_tensor(edited, keys), get_tensor(plain, keys) * 2)
    others = [t for k, t in tensors_in(edited) if k != keys]
    assert all(t is OTHER for t in others)
    assert not holder.inner._forward_hooks
    assert torch.equal(get_tensor(holder(x), keys), get_tensor(plain, keys))


def test_an_edit_that_returns_none_keeps_the_object_itself():
    result = []
    holder, slot, _ = make("tuple")
    holder.inner.wrap = lambda x: result.append((OTHER, x, None)) or result[-1]
    slot.register(lambda value: None)
    assert holder(torch.randn(2, 3, 4)) is result[0]


def test_put_does_not_change_the_original():
    first, second = torch.zeros(1), torch.ones(1)
    for packed, keys in (([first], (0,)), ({"a": (first,)}, ("a", 0)), (Pair(first, None), (0,))):
        changed = put_tensor(packed, keys, second)
        assert get_tensor(packed, keys) is first
        assert get_tensor(changed, keys) is second
        assert type(changed) is type(packed)


@pytest.mark.parametrize("keyword", [False, True])
def test_input_positional_or_keyword(keyword):
    holder, slot, _ = make("tensor", "input", ("kwargs", "hidden") if keyword else ("args", 0))
    x = torch.randn(2, 3, 4)
    slot.register(lambda value: value * 2)
    edited = holder(hidden=x, mask=OTHER) if keyword else holder(x, mask=OTHER)
    assert torch.equal(edited, x * 2 + 1)
    with pytest.raises(SiteError, match=r"'inner.input'.*\[B, S, 4\].*another way"):
        holder(x) if keyword else holder(hidden=x)


@pytest.mark.parametrize("shape", [(2, 3, 5), (6, 4)])
def test_other_shapes_are_refused(shape):
    holder, slot, _ = make("tensor")
    slot.register(lambda value: None)
    with pytest.raises(SiteError, match="inner.output"):
        holder(torch.randn(shape))


def test_edit_must_keep_the_shape():
    holder, slot, _ = make("tensor")
    slot.register(lambda value: value[:1])
    with pytest.raises(SiteError, match=r"returned \[1, 3, 4\] for \[2, 3, 4\]"):
        holder(torch.randn(2, 3, 4))


def test_flattened_rows():
    holder, slot, _ = make("tensor", rank=2)
    x = torch.randn(6, 4)
    seen = []
    handle = slot.register(lambda value: seen.append(value.shape) or value * 2, tokens=lambda: (2, 3))
    assert torch.equal(holder(x), (x + 1) * 2)
    assert seen == [(2, 3, 4)]
    handle.remove()
    slot.register(lambda value: None, tokens=lambda: (2, 4))
    with pytest.raises(SiteError, match="6 rows, which are not the 2 x 4 tokens"):
        holder(x)
    holder.inner._forward_hooks.clear()
    slot.register(lambda value: None)
    with pytest.raises(SiteError, match="register with tokens="):
        holder(x)


def test_a_scaled_tensor_path_reads_and_writes_the_scaled_value():
    holder, slot, _ = make("tensor", scale=0.22)
    x = torch.randn(2, 3, 4)
    handle = slot.register(lambda value: value.clone())
    assert torch.equal(holder(x), x + 1)
    handle.remove()
    slot.register(lambda value: value + 0.22)
    torch.testing.assert_close(holder(x), x + 2)


def test_in_place_write_reaches_other_holders_and_keeps_gradients():
    holder, slot, _ = make("tensor", "input", ("args", 0), in_place=True)
    leaf = torch.randn(2, 3, 4, requires_grad=True)
    x = leaf * 1
    slot.register(lambda value: value**2)
    result = holder(x) + x
    torch.testing.assert_close(result, 2 * leaf.detach() ** 2 + 1)
    result.sum().backward()
    torch.testing.assert_close(leaf.grad, 4 * leaf.detach())


@pytest.mark.parametrize("rank", [2, 3])
def test_the_model_does_not_write_into_what_an_edit_returns(rank):
    class Adds(nn.Module):
        def forward(self, x):
            given = self.inner(x)
            given += 1
            return given

    holder, slot, _ = make("tensor", rank=rank)
    adding = Adds()
    adding.inner = holder.inner
    source = torch.randn(2, 3, 4)
    kept = source.clone()
    slot.register(lambda value: source, tokens=lambda: (2, 3))
    result = adding(torch.randn(2, 3, 4) if rank == 3 else torch.randn(6, 4))
    assert torch.equal(result.reshape(2, 3, 4), kept + 1)
    assert torch.equal(source, kept)


@pytest.mark.parametrize(("edit", "shape"), [(AblateSite, (32,)), (Patch, (2, 5, 32))])
def test_a_family_that_adds_in_place_does_not_change_interventions(edit, shape):
    model, ids = tiny_model("falcon"), torch.arange(5, 15).view(2, 5)
    edits = edit("mlp_out.1", torch.ones(shape), special_tokens=True)  # at every token, as they are
    with torch.no_grad(), attach(model, edits, check=False):
        first = model(ids, use_cache=False).logits
        assert torch.equal(model(ids, use_cache=False).logits, first)


def test_dtype_of_the_model_is_kept():
    holder, slot, _ = make("tensor")
    slot.register(lambda value: value.double() * 2)
    assert holder(torch.randn(2, 3, 4)).dtype == torch.float32


def test_hook_runs_before_existing_hooks():
    holder, slot, _ = make("tensor")
    seen = []
    holder.inner.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    slot.register(lambda value: value * 0)
    holder(torch.randn(2, 3, 4))
    assert not seen[0].any()


def test_copies_of_the_model_are_not_edited():
    holder, slot, _ = make("tensor")
    slot.register(lambda value: value * 0)
    x = torch.randn(2, 3, 4)
    assert torch.equal(copy.deepcopy(holder)(x), x + 1)
    hook = next(iter(holder.inner._forward_hooks.values()))
    assert pickle.loads(pickle.dumps(hook))(holder, (x,), x) is None
    assert not holder(x).any()


def test_slot_outlives_neither_model_nor_module():
    holder, slot, _ = make("tensor")
    del holder.inner
    with pytest.raises(SiteError, match="is no longer in the model"):
        slot.register(lambda value: None)
    del holder
    with pytest.raises(SiteError, match="no longer exists"):
        slot.register(lambda value: None)
