"""Private names of other libraries are used in `hf_gated_sae/upstream/` only, and behave as expected.

Seen in torch 2.9 and 2.13, transformers 5.16 and 5.24, nnsight 0.8.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_gated_sae.errors import VersionError
from hf_gated_sae.training import SAETrainer
from hf_gated_sae.upstream import torch_private, trainer_private
from hf_gated_sae.upstream.pickle_private import Unpickler

PACKAGE = Path(torch_private.__file__).parents[1]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "upstream")
ALLOWED = {"sys._getframe"}
"""Documented in the standard library, for CPython."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(source: str) -> set[str]:
    """Return the private names that a file uses of modules and objects imported from other packages."""
    found, imported = set(), set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            found |= {alias.name for alias in node.names if any(map(is_private, alias.name.split(".")))}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            imported |= {alias.asname or alias.name for alias in node.names}
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if any(map(is_private, name.split(".")))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in imported:
                found.add(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_other_libraries_are_in_upstream_only(path):
    assert private_names(path.read_text(encoding="utf-8")) <= ALLOWED


def test_a_private_name_is_found():
    source = "import torch\nfrom pickle import _Unpickler\ntorch._C._x()\ntorch.nn.functional.linear\n"
    assert private_names(source) == {"pickle._Unpickler", "torch._C._x", "torch._C"}


def test_overridden_names_of_the_trainer_are_listed():
    ours = [each for each in SAETrainer.__mro__ if each.__module__.startswith("hf_gated_sae.")]
    names = {name for each in ours for name in vars(each) if is_private(name) and hasattr(Trainer, name)}
    assert names == set(trainer_private.OVERRIDDEN)


def test_a_trainer_that_lost_a_name_is_refused():
    trainer_private.require_trainer(Trainer)

    class Renamed(Trainer):
        _save_rng_state = None

    with pytest.raises(VersionError, match="has no _save_rng_state"):
        trainer_private.require_trainer(Renamed)


def test_the_product_by_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    assert torch_private.onednn_linear is not None
    torch.testing.assert_close(torch_private.onednn_linear(x, weight), x @ weight.T)


def test_inner_products_of_pairs():
    rows, others = torch.randn(4, 6), torch.randn(5, 6)
    row, other = torch.tensor([0, 2, 2, 3]), torch.tensor([4, 0, 1, 1])
    assert torch_private.pair_dots is not None
    torch.testing.assert_close(torch_private.pair_dots(rows, others, row, other), (rows @ others.T)[row, other])


def test_holders_of_memory_are_counted():
    tensor = torch.empty(4)
    assert torch_private.storage_holders is not None
    alone = torch_private.storage_holders(tensor)
    view = tensor[1:]
    assert torch_private.storage_holders(tensor) != alone
    del view
    assert torch_private.storage_holders(tensor) == alone


def test_without_private_operations_the_plain_path_is_used(monkeypatch):
    from hf_gated_sae.functional.cpu import products, sparse_support
    from hf_gated_sae.functional.linear import linear

    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "onednn_linear", None)
    monkeypatch.setattr(sparse_support, "pair_dots", None)
    x, weight = torch.randn(1024, 16), torch.randn(2048, 16)
    assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))
    assert not sparse_support.SparseSupport.serves(x, weight)


def test_function_transforms_are_detected():
    seen = []

    def look(each):
        seen.append(torch_private.is_functorch_wrapped(each))
        seen.append(torch_private.functorch_unwrapped(each).shape)
        return each

    torch.func.vmap(look)(torch.ones(3, 2))
    assert seen == [True, (3, 2)] and not torch_private.is_functorch_wrapped(torch.ones(1))


def test_nodes_and_backwards_are_numbered():
    assert torch_private.current_backward() == -1 and torch_private.current_node_number() is None
    start, numbers = torch_private.next_node_number(), []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(
        lambda grad: numbers.append((torch_private.current_backward(), torch_private.current_node_number()))
    )
    (y * 3).backward()
    assert torch_private.next_node_number() > start
    [(backward, node)] = numbers
    assert backward >= 0 and node is not None and node >= start


def test_a_call_of_a_module_is_on_the_stack():
    frames = []

    class Looking(nn.Module):
        def forward(self):
            frame = inspect.currentframe()
            while frame is not None:
                frames.append(frame.f_code)
                frame = frame.f_back

    Looking()()
    assert torch_private.MODULE_CALL in frames


def test_a_compiled_module_is_seen():
    module = nn.Linear(2, 2)
    assert not torch_private.is_compiled(module)
    module.compile()
    assert torch_private.is_compiled(module)


def test_the_unpickler_has_a_table_of_instructions():
    assert callable(Unpickler.dispatch[ord("N")])
