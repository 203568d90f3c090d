"""Verbs with wrong settings, edits outside of the batch, numbers that are not finite: one sentence each."""

import pytest
import torch

from hf_gated_sae import Ablate, Cap, Clamp, Floor, Patch, ProjectOut, Splice, Steer, attach
from hf_gated_sae.errors import AttachError, SAEError
from hf_gated_sae.hooks.attach_report import Record
from tests.hooks.support import SITE, block, hand_made, logits_of, make_sae, model_of

SAE = make_sae()
WRONG = {
    "resampling from nothing": (lambda: Ablate(SAE, [1], mode="resample"), ["needs samples="]),
    "samples that are not used": (lambda: Ablate(SAE, [1], samples=torch.ones(2, 1)), ["takes none"]),
    "samples of other latents": (
        lambda: Ablate(SAE, [1], mode="resample", samples=torch.ones(5, 3)),
        ["[5, 3]", "[N, 1] or [N, 64]"],
    ),
    "no samples": (lambda: Ablate(SAE, [1], mode="resample", samples=torch.ones(0, 1)), ["[0, 1]", "[N, d_sae]"]),
    "samples not finite": (
        lambda: Ablate(SAE, [1], mode="resample", samples=torch.full((2, 1), torch.nan)),
        ["NaN or infinite", "samples"],
    ),
    "half a seed": (
        lambda: Ablate(SAE, [1], mode="resample", samples=torch.ones(2, 1), seed=0.5),
        ["seed=0.5", "whole number"],
    ),
    "no bounds": (lambda: Floor(SAE, {}), ["Floor", "no latents"]),
    "a bound not finite": (lambda: Cap(SAE, {3: float("inf")}), ["inf", "latent 3", "finite number"]),
    "a vector's maximum": (lambda: Steer(SITE, torch.ones(32), unit="max"), ["unit='max'", "'norm'"]),
    "a vector not finite": (lambda: Steer(SITE, torch.full((32,), torch.nan)), ["NaN or infinite", "vector [d]"]),
    "several vectors": (lambda: Steer(SITE, torch.ones(2, 32)), ["[2, 32]", "a vector [d]"]),
    "a vector of nothing": (lambda: Steer(SITE, torch.zeros(32), unit="norm"), ["zeros", "no direction"]),
    "a latent of a site": (lambda: Steer(SITE, 3), ["a vector [d]"]),
    "a vector for an SAE": (lambda: Steer(SAE, torch.ones(32)), ["one latent with an SAE", SITE]),
    "a condition without an SAE": (lambda: Steer(SITE, torch.ones(32), when={3: 1.0}), ["when=", "without an SAE"]),
    "steering a model": (lambda: Steer(torch.nn.Linear(2, 2), 3), ["Linear", "expected an SAE, or a site"]),
    "patching one vector": (lambda: Patch(SITE, torch.ones(32)), ["[32]", "[B, S, d]"]),
    "patching other latents": (lambda: Patch(SAE, torch.ones(2, 6, 3), latents=[1]), ["[2, 6, 3]", "[B, S, 1]"]),
    "latents of a site": (lambda: Patch(SITE, torch.ones(2, 6, 32), latents=[1]), ["latents=(1,)", "no SAE"]),
    "patching nothing": (lambda: Patch(SAE, torch.ones(2, 6, 1), latents=[]), ["no latents"]),
    "projecting out no latents": (lambda: ProjectOut(SAE, []), ["no latents", "0 .. 63"]),
    "projecting out the same twice over": (
        lambda: ProjectOut(make_sae_with_equal_rows(), [1, 2]),
        ["2 directions", "only 1 dimensions"],
    ),
    "error neither kept nor lost": (lambda: Splice(SAE, error="yes"), ["error='yes'", "True or False"]),
    "special tokens neither": (lambda: Splice(SAE, special_tokens=1), ["special_tokens is 1", "True or False"]),
    "a vector of another width": (lambda: attach(model_of("llama"), Steer(SITE, torch.ones(31))), ["[31]", "32 wide"]),
    "a patch of another width": (
        lambda: attach(model_of("llama"), Patch(SITE, torch.ones(2, 6, 31))),
        ["[2, 6, 31]", "32 wide"],
    ),
}


def make_sae_with_equal_rows():
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[1] = 2 * sae.W_dec[2]
    return sae


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_say_what_to_do(case):
    call, phrases = WRONG[case]
    with pytest.raises(SAEError) as caught:
        call()
    message = str(caught.value)
    assert [phrase for phrase in phrases if phrase not in message] == [], message
    assert "\n" not in message and len(message) < 600


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
def test_what_lies_outside_of_the_batch_is_an_error(edit, phrases):
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
        lambda: Clamp(SAE, {3: 1.0}, when={4: 1e30}, rows=0),  # of an activation that is not finite itself
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


def test_numbers_that_are_not_finite_do_not_matter_where_nothing_is_meant():
    model = model_of("llama")
    with attach(model, Patch(SITE, torch.full((2, 6, 32), torch.nan), positions=[])):
        assert torch.isfinite(logits_of(model)).all()


# ------------------------------------------------------------------ numbers beyond what the model's type holds


@pytest.mark.parametrize("edit", [Steer(SITE, torch.ones(32), strength=1e5), Patch(SITE, torch.full((2, 6, 32), 1e5))])
def test_numbers_that_the_model_cannot_hold_are_an_error(edit):
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


def test_numbers_that_were_infinite_already_are_no_fault_of_an_edit():
    model = model_of("llama", torch.float16)
    with attach(model, Steer(SITE, torch.ones(32))), hand_made(block(model, "llama"), lambda x: x * torch.inf):
        logits_of(model)


def test_on_another_device_numbers_that_cannot_be_held_are_told_of_at_the_end():
    record = Record(Steer(SITE, torch.ones(32)))
    record.beyond, record.dtype = torch.tensor(True), torch.float16  # as it is kept there
    with pytest.raises(AttachError, match="float16"):
        record.require_sound()
    record.require_sound()  # said once
