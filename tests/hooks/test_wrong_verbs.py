"""Errors of verbs: edits outside the batch, and numbers that are not finite or too large for the model."""

import pytest
import torch

from hf_gated_sae import Ablate, Clamp, Patch, Splice, Steer, attach
from hf_gated_sae.errors import AttachError, SAEError
from hf_gated_sae.hooks.attach_report import Record
from tests.hooks.support import SITE, block, hand_made, logits_of, make_sae, model_of

SAE = make_sae()


@pytest.mark.parametrize(
    ("edit", "phrases"),
    [
        (lambda: Patch(SITE, torch.ones(3, 6, 32)), ["3 rows", "the batch has 2"]),
        (lambda: Splice(SAE, positions=torch.ones(3, 6) > 0), ["3 rows", "the batch has 2"]),
        (lambda: Ablate(SAE, [1], rows=[0, 2]), ["row 2", "0 .. 1"]),
        (lambda: Patch(SITE, torch.ones(2, 9, 32)), ["9 columns", "through 6"]),
        (lambda: Splice(SAE, positions=torch.ones(2, 7) > 0), ["7 columns", "through 6"]),
        (lambda: Splice(SAE, positions=500), ["positions [500]", "never reached", "longest row had 6 tokens"]),
        (lambda: Splice(SAE, positions=[1, 6, 7]), ["positions [6, 7]", "6 tokens"]),
        (lambda: Splice(SAE, positions=slice(6, 9)), ["positions [6]", "never reached"]),
        (lambda: Splice(SAE, positions=[-7]), ["(-7,)", "6 tokens"]),
    ],
)
def test_edits_outside_the_batch_are_an_error(edit, phrases):
    model = model_of("llama")
    clean = logits_of(model)
    with pytest.raises(SAEError) as caught, attach(model, edit(), check=False):
        logits_of(model)
    assert [phrase for phrase in phrases if phrase not in str(caught.value)] == [], str(caught.value)
    assert torch.equal(logits_of(model), clean)


# ------------------------------------------------------------------ numbers that are not finite


def broken(**settings):
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[3] = torch.nan
        sae.b_dec[0] = torch.nan
    return sae


@pytest.mark.parametrize(
    "edit",
    [
        lambda: Steer(broken(), 3),
        lambda: Clamp(broken(), {3: 1.0}),
        lambda: Splice(broken()),
        lambda: Patch(SITE, torch.full((2, 6, 32), torch.inf)),
        lambda: Clamp(SAE, {3: 1.0}, when={4: 1e30}, rows=0),  # the activation itself is not finite
    ],
)
def test_numbers_that_are_not_finite_are_an_error(edit):
    model, given = model_of("llama"), edit()
    verb = type(given).__name__
    clean = logits_of(model)
    handle = attach(model, given, check=False)
    with pytest.raises(AttachError, match=rf"{verb} put NaN or infinite numbers in at resid_post.1"), handle:
        if given.rows:
            with hand_made(block(model, "llama", 0), lambda x: x * torch.nan):
                logits_of(model)
        else:
            logits_of(model)
    assert torch.equal(logits_of(model), clean)


def test_numbers_that_are_not_finite_do_not_matter_where_nothing_is_edited():
    model = model_of("llama")
    with attach(model, Patch(SITE, torch.full((2, 6, 32), torch.nan), positions=[])):
        assert torch.isfinite(logits_of(model)).all()


# ------------------------------------------------------------------ numbers too large for the model's dtype


@pytest.mark.parametrize("edit", [Steer(SITE, torch.ones(32), strength=1e5), Patch(SITE, torch.full((2, 6, 32), 1e5))])
def test_numbers_too_large_for_the_models_dtype_are_an_error(edit):
    model = model_of("llama", torch.float16)
    clean = logits_of(model)
    handle = attach(model, edit)
    with (
        pytest.raises(AttachError, match=rf"{type(edit).__name__} put in at resid_post\.1 .*float16, .* 65504"),
        handle,
    ):
        logits_of(model)
    assert torch.equal(logits_of(model), clean)
    with attach(model_of("llama", torch.bfloat16), edit):
        logits_of(model_of("llama", torch.bfloat16))


def test_activations_that_were_already_infinite_are_not_blamed_on_an_edit():
    model = model_of("llama", torch.float16)
    with attach(model, Steer(SITE, torch.ones(32))), hand_made(block(model, "llama"), lambda x: x * torch.inf):
        logits_of(model)


def test_on_another_device_numbers_too_large_are_reported_at_the_end():
    record = Record(Steer(SITE, torch.ones(32)))
    record.beyond, record.dtype = torch.tensor(True), torch.float16  # as recorded on another device
    with pytest.raises(AttachError, match="float16"):
        record.require_sound()
    record.require_sound()  # raised only once
