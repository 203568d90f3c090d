"""A verb is one file of the package, or one class that a user defines."""

from dataclasses import dataclass

import pytest
import torch

from hf_gated_sae import attach
from hf_gated_sae.errors import SAEError
from hf_gated_sae.interventions import AblateSite, Edit, Intervention, Replacement, interventions
from hf_gated_sae.sites import Site
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([[11, 54, 33]])


def test_every_verb_is_registered_under_its_name():
    assert {"Ablate", "AblateSite", "Clamp", "ProjectOut", "Scale", "Splice", "Steer"} <= set(interventions)
    assert all(issubclass(verb, (Edit, Replacement)) for verb in interventions.values())
    assert not {"Edit", "Intervention", "LatentEdit", "Replacement"} & set(interventions)


def test_verbs_are_frozen():
    with pytest.raises(AttributeError):
        AblateSite("resid_post.0").site = "resid_post.1"


@dataclass(frozen=True, eq=False)
class Double(Edit):
    """A user's own verb."""

    @property
    def first_site(self):
        return Site.parse("resid_post.1")

    def delta(self, run):
        return run.x


@dataclass(frozen=True, eq=False)
class Shapeless(Double):
    """A user's own verb with a mistake."""

    def delta(self, run):
        return run.x[:, :, :1].expand(-1, -1, 7)


def test_a_users_own_verb_needs_nothing_else():
    model = tiny_model("llama")
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        expected = model(IDS).logits
        handle.remove()
        with attach(model, Double()) as attached:
            assert torch.equal(model(IDS).logits, expected)
    assert attached.report().interventions[0].verb == "Double"
    assert "Double" in interventions


def test_a_verb_of_the_wrong_shape_is_an_error_and_leaves_nothing():
    model = tiny_model("llama")
    with torch.no_grad(), pytest.raises((SAEError, RuntimeError)), attach(model, Shapeless()):
        model(IDS)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_intervention_that_neither_adds_nor_replaces_is_refused():
    @dataclass(frozen=True, eq=False)
    class Neither(Intervention):
        @property
        def first_site(self):
            return Site.parse("resid_post.1")

    with pytest.raises(SAEError, match="Neither"):
        attach(tiny_model("llama"), Neither())
