"""What every registered verb must do. A new file in `interventions/` is tested here through its examples.

`tests/hooks/test_verbs.py` compares each verb with a hand-written hook for every architecture; plans are in
`test_plan.py`.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_gated_sae import attach
from hf_gated_sae.errors import SAEError
from hf_gated_sae.interventions import interventions
from tests.hooks.support import IDS, SITE, active_latents, block, close, hand_made, logits_of, make_sae, model_of

from .examples import VERBS, Example, every_example, every_refusal, examples_of

EXAMPLES = every_example()
SAE = make_sae()
SPECIAL = IDS.clone()
SPECIAL[:, 0], SPECIAL[1, 4] = 1, 2  # BOS in both rows, EOS in the second
POSITIONS = {
    "some": ({"positions": [1, -2]}, [1, 4], [0, 1]),
    "a slice": ({"positions": slice(2, 4)}, [2, 3], [0, 1]),
    "the last of the prompt": ({"positions": "last_prompt"}, [5], [0, 1]),
    "one row": ({"rows": 1}, [0, 1, 2, 3, 4, 5], [1]),
    "some of one row": ({"rows": [0], "positions": [0, 3]}, [0, 3], [0]),
    "none": ({"positions": []}, [], [0, 1]),
}
every_verb = pytest.mark.parametrize("verb", VERBS)
every_case = pytest.mark.parametrize("name", EXAMPLES)


def is_edited_where(example: Example, settings: dict, where: torch.Tensor, ids: torch.Tensor = IDS) -> None:
    """Fail unless a verb equals a hook that changes only the tokens of a mask ``[B, S]``."""
    model, sae = model_of("llama", torch.float64), make_sae(dtype=torch.float64)
    a, b = active_latents(model, sae)[:2]
    edit, plain = dataclasses.replace(example.make(sae, a, b, model), **settings), example.plain(sae, a, b, model)
    with hand_made(block(model, "llama"), lambda x: torch.where(where[..., None], plain(x), x)):
        expected = logits_of(model, ids)
    with attach(model, edit, check=False):
        close(logits_of(model, ids), expected, 1e-12)
    assert torch.equal(expected, logits_of(model, ids)) == (not example.changes or not where.any())


@every_verb
def test_it_has_examples(verb: str) -> None:
    module = examples_of(verb)
    assert [name for name in module.EXAMPLES if name.split()[0] == verb]
    assert interventions[verb] in {type(each) for each in module.plans(SAE)}
    assert module.REFUSED


def test_a_verb_without_examples_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nudge(interventions["Steer"], is_verb=False):  # type: ignore[misc]
        pass

    Nudge.__module__ = "hf_gated_sae.interventions.nudge"
    monkeypatch.setitem(interventions._entries, "Nudge", Nudge)
    with pytest.raises(pytest.fail.Exception, match=r"write tests/interventions/examples/nudge\.py"):
        examples_of("Nudge")


@pytest.mark.parametrize("case", POSITIONS)
@every_case
def test_it_acts_at_the_positions_and_rows_that_it_is_given(name: str, case: str) -> None:
    settings, positions, rows = POSITIONS[case]
    where = torch.zeros(IDS.shape, dtype=torch.bool)
    for row in rows:
        where[row, positions] = True
    is_edited_where(EXAMPLES[name], settings, where)


@pytest.mark.parametrize("special_tokens", [True, False])
@every_case
def test_it_leaves_special_tokens_alone_by_default(name: str, special_tokens: bool) -> None:
    where = (SPECIAL > 2) | torch.tensor(special_tokens)
    is_edited_where(EXAMPLES[name], {"special_tokens": special_tokens}, where, SPECIAL)


@every_case
def test_it_is_frozen(name: str) -> None:
    edit = EXAMPLES[name].make(SAE, 3, 5, model_of("llama"))
    for field in dataclasses.fields(edit):
        with pytest.raises(AttributeError):
            setattr(edit, field.name, None)


REFUSED = {
    "mistyped positions": ({"positions": "generatd"}, ["generatd", "Did you mean 'generated'"]),
    "positions of no type": ({"positions": None}, ["positions is None", "'all'"]),
    "special tokens neither": ({"special_tokens": 1}, ["special_tokens is 1", "True or False"]),
    "half a row": ({"rows": 0.5}, ["rows", "0.5"]),
}


@pytest.mark.parametrize("case", REFUSED)
@every_case
def test_it_refuses_invalid_settings(name: str, case: str) -> None:
    settings, phrases = REFUSED[case]
    edit = EXAMPLES[name].make(SAE, 3, 5, model_of("llama"))
    refuses(lambda: dataclasses.replace(edit, **settings), phrases)


OUTSIDE = {
    "a row": ({"rows": [0, 2]}, ["row 2", "0 .. 1"]),
    "a position": ({"positions": 500}, ["positions [500]", "never reached"]),
    "rows of a mask": ({"positions": torch.ones(3, 6) > 0}, ["3 rows", "the batch has 2"]),
}


@pytest.mark.parametrize("case", OUTSIDE)
@every_case
def test_it_refuses_edits_outside_the_batch_and_leaves_no_hooks(name: str, case: str) -> None:
    settings, phrases = OUTSIDE[case]
    model = model_of("llama")
    clean = logits_of(model)
    edit = dataclasses.replace(EXAMPLES[name].make(SAE, 3, 5, model), **settings)

    def run() -> None:
        with attach(model, edit, check=False):
            logits_of(model)

    refuses(run, phrases)
    assert torch.equal(logits_of(model), clean)


@every_case
def test_it_refuses_a_model_without_its_site(name: str) -> None:
    """`SITE` is in the second layer; the model is cut to one."""
    edit = EXAMPLES[name].make(SAE, 3, 5, model_of("llama"))
    assert str(edit.first_site) == SITE
    model = model_of("llama")
    layers, model.model.layers = model.model.layers, model.model.layers[:1]
    try:
        refuses(lambda: attach(model, edit, check=False), [SITE])
    finally:
        model.model.layers = layers


@pytest.mark.parametrize("case", every_refusal())
def test_its_own_wrong_settings_say_what_to_do(case: str) -> None:
    call, phrases = every_refusal()[case]
    refuses(lambda: call(SAE), phrases)


def refuses(call, phrases: list[str]) -> None:
    with pytest.raises(SAEError) as caught:
        call()
    message = str(caught.value)
    assert [phrase for phrase in phrases if phrase not in message] == [], message
    assert "\n" not in message and len(message) < 600
