"""Errors of wrong calls: their class, and what their messages say."""

import pytest
import torch

from hf_gated_sae import Ablate, Clamp, ProjectOut, Scale, Splice, Steer, attach, capture
from hf_gated_sae.errors import SAEError
from hf_gated_sae.interventions import AblateSite
from tests.hooks.support import IDS, hooks_on, logits_of, make_sae, model_of

SAE = make_sae()
UNRECORDED = make_sae(recorded=False)


def with_site(site):
    sae = make_sae()
    sae.config.site = site
    return sae


def run(*interventions, ids=IDS, **inputs):
    def call(model):
        with attach(model, *interventions):
            logits_of(model, ids, **inputs)

    return call


def generate(*interventions, ids):
    def call(model):
        with attach(model, *interventions):
            model.generate(ids, max_new_tokens=2)

    return call


# The call, the builtin class that a caller would expect, and phrases that the message must contain.
WRONG = {
    # --- arguments of attach()
    "no model": (
        lambda m: attach("gpt2", Splice(SAE)),
        ValueError,
        ["attach()", "str", "expected a transformers model"],
    ),
    "no interventions": (lambda m: attach(m), ValueError, ["no interventions", "Splice(sae)"]),
    "an SAE instead of an intervention": (lambda m: attach(m, SAE), ValueError, ["GatedSAE", "Splice(sae)"]),
    "a list of interventions": (
        lambda m: attach(m, [Splice(SAE)]),
        ValueError,
        ["given list", "expected interventions"],
    ),
    "two replacements": (
        lambda m: attach(m, Splice(SAE), Splice(SAE, positions=[1])),
        ValueError,
        ["Both Splice and Splice", "resid_post.1", "only one"],
    ),
    "wrong d_in": (
        lambda m: attach(m, Splice(make_sae(d_in=24))),
        ValueError,
        ["d_in = 24", "resid_post.1", "32 wide"],
    ),
    "a transcoder": (
        lambda m: attach(m, Splice(make_sae(d_out=24, apply_b_dec_to_input=False))),
        ValueError,
        ["d_out = 24", "resid_post.1", "32 wide"],
    ),
    "directions of another width": (
        lambda m: attach(m, ProjectOut("resid_post.1", torch.ones(2, 31)[:1])),
        ValueError,
        ["31 wide", "resid_post.1 is 32 wide"],
    ),
    "value of another width": (
        lambda m: attach(m, AblateSite("resid_post.1", torch.ones(31))),
        ValueError,
        ["[31]", "resid_post.1 is 32 wide"],
    ),
    # --- sites
    "mistyped site": (
        lambda m: attach(m, Splice(with_site("resid_pst.1"))),
        LookupError,
        ["resid_pst", "Did you mean", "resid_post"],
    ),
    "site without a layer": (
        lambda m: attach(m, ProjectOut("mlp_out", torch.ones(32))),
        LookupError,
        ["mlp_out", "layer"],
    ),
    "layer that does not exist": (
        lambda m: attach(m, Splice(with_site("resid_post.12"))),
        LookupError,
        ["resid_post.12", "3 layers", "0 to 2"],
    ),
    "mistyped module path": (
        lambda m: attach(m, Splice(with_site("model.layer.1.output"))),
        LookupError,
        ["model.layer.1", "Did you mean", "model.layers.1"],
    ),
    "an SAE without a site": (lambda m: Splice(with_site(None)), ValueError, ["names no site", "sae.config.site"]),
    "site of another type": (lambda m: attach(m, AblateSite(12)), LookupError, ["12", "named by a string"]),
    # --- latents
    "no SAE": (lambda m: Ablate("my-sae", [1]), ValueError, ["Ablate", "str", "my-sae", "from_pretrained"]),
    "the model instead of the SAE": (
        lambda m: Splice(m),
        ValueError,
        ["Splice", "LlamaForCausalLM", "expected an SAE"],
    ),
    "latent beyond the last": (lambda m: Ablate(SAE, [3, 64]), IndexError, ["Latent 64", "d_sae = 64", "0 .. 63"]),
    "negative latent": (lambda m: Clamp(SAE, {-1: 2.0}), IndexError, ["Latent -1", "0 .. 63"]),
    "latent beyond the last in a condition": (
        lambda m: Scale(SAE, {1: 2.0}, when={640: 1.0}),
        IndexError,
        ["Latent 640"],
    ),
    "latent beyond the last to steer": (lambda m: Steer(SAE, 64), IndexError, ["Latent 64", "0 .. 63"]),
    "no latents": (lambda m: Ablate(SAE, []), ValueError, ["Ablate", "no latents", "0 .. 63"]),
    "no values": (lambda m: Clamp(SAE, {}), ValueError, ["Clamp", "no latents"]),
    "half a latent": (lambda m: Ablate(SAE, [1.5]), ValueError, ["Ablate", "1.5", "indices of latents"]),
    "latent as text": (lambda m: Steer(SAE, "3"), ValueError, ["Steer", "'3'", "indices of latents"]),
    "a mask of latents": (lambda m: Ablate(SAE, torch.ones(64) > 0), ValueError, ["Ablate", "indices of latents"]),
    "yes and no as latents": (lambda m: Ablate(SAE, [True, False]), ValueError, ["Ablate", "indices of latents"]),
    "several latents to steer": (lambda m: Steer(SAE, [3, 4]), ValueError, ["Steer", "[3, 4]", "one latent"]),
    "values without latents": (lambda m: Clamp(SAE, [1.0, 2.0]), ValueError, ["Clamp", "[1.0, 2.0]", "{3: 1.5}"]),
    "values by name": (lambda m: Scale(SAE, {"a": 1.0}), ValueError, ["Scale", "numbers by latent"]),
    "value as text": (lambda m: Clamp(SAE, {3: "8"}), ValueError, ["Clamp", "'8'", "latent 3", "finite number"]),
    "value not a number": (lambda m: Clamp(SAE, {3: float("nan")}), ValueError, ["nan", "latent 3", "finite number"]),
    "infinite factor": (lambda m: Scale(SAE, {3: float("inf")}), ValueError, ["inf", "latent 3", "finite number"]),
    "condition not a number": (
        lambda m: Ablate(SAE, [1], when={3: float("nan")}),
        ValueError,
        ["nan", "latent 3", "finite number"],
    ),
    "condition without a bound": (lambda m: Ablate(SAE, [1], when=[3]), ValueError, ["[3]", "numbers by latent"]),
    "strength not a number": (
        lambda m: Steer(SAE, 3, strength=None),
        ValueError,
        ["None", "latent 3", "finite number"],
    ),
    # --- settings
    "mistyped mode": (lambda m: Ablate(SAE, [1], mode="mena"), ValueError, ["mena", "Did you mean 'mean'"]),
    "mistyped unit": (lambda m: Steer(SAE, 1, unit="mx"), ValueError, ["mx", "Did you mean 'max'"]),
    "mistyped positions": (
        lambda m: Ablate(SAE, [1], positions="generatd"),
        ValueError,
        ["generatd", "Did you mean 'generated'"],
    ),
    "positions between tokens": (lambda m: Ablate(SAE, [1], positions=[1.5]), ValueError, ["[1.5]", "'last_prompt'"]),
    "positions of no type": (lambda m: Splice(SAE, positions=None), ValueError, ["positions is None", "'all'"]),
    "a mask of numbers": (lambda m: Splice(SAE, positions=torch.ones(2, 6)), ValueError, ["positions is", "'all'"]),
    "a mask of three axes": (lambda m: Splice(SAE, positions=IDS[None] > 5), ValueError, ["[1, 2, 6]", "[B, S]"]),
    "mean of an unrecorded SAE": (
        lambda m: Ablate(UNRECORDED, [1], mode="mean"),
        ValueError,
        ["none recorded", "evaluate", "record=True", "mode='zero'"],
    ),
    "steering by an unrecorded maximum": (
        lambda m: Steer(UNRECORDED, 5),
        ValueError,
        ["latent 5", "nothing was recorded", "record=True", "unit='raw'"],
    ),
    # --- directions and values
    "direction zero": (
        lambda m: ProjectOut("resid_post.1", torch.zeros(32)),
        ValueError,
        ["1 directions", "only 0 dimensions"],
    ),
    "directions that depend on each other": (
        lambda m: ProjectOut("resid_post.1", torch.ones(2, 32)),
        ValueError,
        ["2 directions", "only 1 dimensions", "linearly independent"],
    ),
    "direction not finite": (
        lambda m: ProjectOut("resid_post.1", torch.full((32,), torch.inf)),
        ValueError,
        ["finite"],
    ),
    "direction as text": (
        lambda m: ProjectOut("resid_post.1", "up"),
        ValueError,
        ["ProjectOut", "'up'", "[d] or [n, d]"],
    ),
    "directions of three axes": (
        lambda m: ProjectOut("resid_post.1", torch.ones(2, 2, 32)),
        ValueError,
        ["[2, 2, 32]", "[n, d]"],
    ),
    "value that is no tensor": (
        lambda m: AblateSite("resid_post.1", 0.0),
        ValueError,
        ["AblateSite", "0.0", "None for zeros"],
    ),
    # --- inputs of the model
    "empty prompt": (run(Splice(SAE), ids=IDS[:, :0]), ValueError, ["empty prompt", "[2, 0]", "at least one token"]),
    "empty prompt of a generation": (
        generate(Splice(SAE), ids=IDS[:, :0]),
        ValueError,
        ["empty prompt", "at least one token"],
    ),
    "ids of one axis": (run(Splice(SAE), ids=IDS[0]), ValueError, ["[6]", "batch axis"]),
    "nothing": (run(Splice(SAE), ids=None), ValueError, ["without input_ids or inputs_embeds"]),
    "capture of nothing": (
        lambda m: capture(m, [], input_ids=IDS),
        ValueError,
        ["given no sites or SAEs", "expected at least one"],
    ),
    "capture without a model": (lambda m: capture("gpt2", "embed", input_ids=IDS), ValueError, ["capture()", "str"]),
    "capture of a mistyped site": (
        lambda m: capture(m, "resid_pots.1", input_ids=IDS),
        LookupError,
        ["Did you mean", "resid_post"],
    ),
    "capture with an SAE of another width": (
        lambda m: capture(m, make_sae(d_in=24), input_ids=IDS),
        ValueError,
        ["d_in = 24", "resid_post.1", "32 wide"],
    ),
    "capture without inputs": (lambda m: capture(m, "embed"), ValueError, ["without input_ids or inputs_embeds"]),
    "capture of a list in a list": (
        lambda m: capture(m, [["embed"]], input_ids=IDS),
        ValueError,
        ["list", "sites or SAEs"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_what_to_do_and_leave_nothing(case):
    call, builtin, phrases = WRONG[case]
    model = model_of("llama")
    clean = logits_of(model)
    with pytest.raises(SAEError) as caught:
        call(model)
    message = str(caught.value)
    assert isinstance(caught.value, builtin)
    assert [phrase for phrase in phrases if phrase not in message] == [], message
    assert "\n" not in message and len(message) < 600
    assert hooks_on(model) == ({}, [])
    assert torch.equal(logits_of(model), clean)
