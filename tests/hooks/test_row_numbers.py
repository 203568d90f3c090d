"""One number per row of the batch: every row is edited as it would be if its number were given for all."""

import pytest
import torch

from hf_gated_sae import Clamp, InterventionPlan, SAEModel, Steer, attach
from hf_gated_sae.errors import AttachError, InputError
from hf_gated_sae.interventions import interventions
from hf_gated_sae.interventions._per_latent_values import LatentValueEdit
from tests.hooks.support import IDS, SITE, close, logits_of, make_sae, model_of

PAIR = (0.4, 1.7)
VECTOR = torch.linspace(-1, 1, make_sae().config.d_in)
VERBS = {
    "Steer in maxima": lambda sae, number: Steer(sae, 3, strength=number),
    "Steer raw": lambda sae, number: Steer(sae, 3, strength=number, unit="raw"),
    "Steer by the norm": lambda sae, number: Steer(sae, 3, strength=number, unit="norm"),
    "Steer along a vector": lambda sae, number: Steer(SITE, VECTOR, strength=number),
    "Steer along a vector by the norm": lambda sae, number: Steer(SITE, VECTOR, strength=number, unit="norm"),
    **{
        name: lambda sae, number, verb=verb: verb(sae, {3: number, 5: 0.1})
        for name, verb in interventions.items()
        if issubclass(verb, LatentValueEdit)
    },
}


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
@pytest.mark.parametrize("verb", VERBS)
def test_each_row_is_edited_with_its_own_number(verb, kind):
    model, sae = model_of("llama"), make_sae()
    plain = logits_of(model, IDS)
    alone = []
    for row, number in enumerate(PAIR):
        with attach(model, VERBS[verb](sae, number), check=False):
            alone.append(logits_of(model, IDS)[row])
    with attach(model, VERBS[verb](sae, kind(PAIR)), check=False):
        together = logits_of(model, IDS)
    close(together, torch.stack(alone), 1e-6)
    assert (together - plain).abs().amax((1, 2)).min() > 1e-4, "a row was not edited"


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_in_a_generation_all_sequences_of_a_row_have_its_number(way):
    model, sae = model_of("llama"), make_sae()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **way}

    def written(strength):
        torch.manual_seed(0)
        with attach(model, Steer(sae, 3, strength=strength, unit="raw"), check=False) as handle:
            ids = model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
        assert handle.report().interventions[0].positions
        return ids.view(2, -1, ids.shape[-1])

    together, weak, strong = written([0.0, 40.0]), written(0.0), written(40.0)
    if not way.get("do_sample"):  # samples of a row depend on those before it
        assert torch.equal(together[0], weak[0]) and torch.equal(together[1], strong[1])
    assert not torch.equal(together[1], weak[1])


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_number_of_rows_is_refused(verb):
    model, sae = model_of("llama"), make_sae()
    with attach(model, VERBS[verb](sae, [1.0, 2.0, 3.0]), check=False):
        with pytest.raises(InputError, match="3 numbers, and the batch has 2 rows"):
            model(IDS)


def test_numbers_per_row_are_refused_for_packed_sequences():
    model = model_of("llama")
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "cu_seq_lens_q": torch.tensor([0, 3, 6])}
    with attach(model, Steer(make_sae(), 3, strength=[1.0]), check=False):
        with pytest.raises(AttachError, match="packs several sequences"), torch.no_grad():
            model(IDS[:1], **packed)


@pytest.mark.parametrize("number", [[], [1.0, float("nan")], [1.0, "2"], [True, 1.0], [[1.0], [2.0]], "12"])
@pytest.mark.parametrize("verb", ["Steer raw", "Clamp", "Scale"])
def test_values_that_are_not_numbers_or_lists_of_numbers_are_refused(verb, number):
    with pytest.raises(InputError, match="expected"):
        VERBS[verb](make_sae(), number)


def test_latents_with_numbers_for_different_numbers_of_rows_are_refused():
    with pytest.raises(InputError, match="for 2 and for 3 rows"):
        Clamp(make_sae(), {3: [1.0, 2.0], 4: [1.0, 2.0, 3.0]})


def test_a_condition_has_one_number():
    with pytest.raises(InputError, match="latent 4"):
        Clamp(make_sae(), {3: 1.0}, when={4: [1.0, 2.0]})


def test_a_plan_keeps_numbers_per_row(tmp_path):
    make_sae().save_pretrained(tmp_path / "sae")
    sae = SAEModel.from_pretrained(tmp_path / "sae")
    InterventionPlan([VERBS[verb](sae, PAIR) for verb in VERBS]).save(tmp_path / "plan.json")
    read = InterventionPlan.load(tmp_path / "plan.json")
    assert [each.strength for each in read[:5]] == [PAIR] * 5
    assert [each.numbers[3] for each in read[5:]] == [PAIR] * (len(VERBS) - 5)
    assert {"Cap", "Clamp", "Floor", "Scale"} <= set(VERBS)
