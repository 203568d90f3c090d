"""Examples of every verb; each file has the name of the file in ``hf_gated_sae/interventions`` that defines the verb.

Such a file has

* ``EXAMPLES``: `Example` by a name that begins with the verb's. Each makes the verb for an SAE and two of its
  latents, at all positions, and computes the resulting activations without the verb;
* ``plans(sae)``: instances with every kind of setting, which a plan must keep without loss;
* ``REFUSED``: calls that take an SAE and must fail, by what is wrong, with phrases of the message.

The tests of all verbs in `tests/interventions` and `tests/hooks` use them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hf_gated_sae import capture
from hf_gated_sae.interventions import Intervention, interventions
from tests.hooks.support import full_path

OTHER = torch.tensor([[70, 9, 25, 31, 66, 80], [12, 88, 50, 7, 42, 19]])
"""Another batch, with the shape of `tests.hooks.support.IDS`."""

VERBS = [name for name, verb in interventions.items() if verb.__module__.startswith("hf_gated_sae.")]
"""The verbs of this package, without those that other packages or tests register."""


class Example(NamedTuple):
    """A verb, and a reference for its effect.

    Attributes:
        make: ``make(sae, a, b, model)`` returns the verb for latents `a` and `b`.
        plain: ``plain(sae, a, b, model)`` returns a function of the activations ``[B, S, d]``.
        changes: whether the result differs from the model's own.
    """

    make: Callable[..., Intervention]
    plain: Callable[..., Callable[[Tensor], Tensor]]
    changes: bool = True


def of_latents(change: Callable[..., dict[int, Callable[[Tensor], Tensor]]]) -> Callable[..., Any]:
    """Return a `plain` for changed latents, which encodes and decodes everything.

    Args:
        change: ``change(sae, a, b, model)`` returns a function of the values of each latent that changes.
    """

    def plain(sae: Any, a: int, b: int, model: Any) -> Callable[[Tensor], Tensor]:
        def edit(latents: Tensor) -> None:
            for latent, new in change(sae, a, b, model).items():
                latents[..., latent] = new(latents[..., latent])

        return full_path(sae, edit)

    return plain


def samples_of(model: Any, sae: Any) -> Tensor:
    """Return the latents of the other batch."""
    return capture(model, sae, input_ids=OTHER)[sae]


def module_name(verb: str) -> str:
    """Return the name of the file that defines a verb, and of the one with its examples."""
    return interventions[verb].__module__.rpartition(".")[2]


def examples_of(verb: str) -> ModuleType:
    """Return the module with a verb's examples; the test fails if there is none."""
    name = f"{__name__}.{module_name(verb)}"
    if importlib.util.find_spec(name) is None:
        pytest.fail(
            f"The verb {verb!r} has no examples: write tests/interventions/examples/{module_name(verb)}.py, as the "
            "docstring of its __init__.py says."
        )
    return importlib.import_module(name)


def _all() -> list[ModuleType]:
    """Return the modules that exist: a missing one fails its own test, not all tests."""
    names = sorted({f"{__name__}.{module_name(verb)}" for verb in VERBS})
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def every_example() -> dict[str, Example]:
    """Return the examples of all verbs."""
    return {name: example for module in _all() for name, example in module.EXAMPLES.items()}


def every_plan(sae: Any) -> list[Intervention]:
    """Return instances of all verbs with every kind of setting."""
    return [each for module in _all() for each in module.plans(sae)]


def every_refusal() -> dict[str, tuple[Callable[[Any], Any], list[str]]]:
    """Return the calls that must fail, by the verb's file and what is wrong."""
    return {
        f"{module.__name__.rpartition('.')[2]}: {case}": refusal
        for module in _all()
        for case, refusal in module.REFUSED.items()
    }
