"""An edited trace gives the same results on a machine that has only torch and nnsight."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nnsight import NNsight
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend

from hf_gated_sae import Ablate, AblateSite, Clamp, ProjectOut, Scale, Splice, Steer, attach
from hf_gated_sae.errors import AttachError, InputError, ShapeError
from hf_gated_sae.hooks.nnsight import edit, sae_envoys
from hf_gated_sae.interventions import Patch
from tests.hooks.nnsight_support import wrap, wrapped
from tests.hooks.support import D_SAE, IDS, SITE, active_latents, close, logits_of, make_sae, model_of
from tests.support.tiny_models import HIDDEN, tiny_model

pytestmark = pytest.mark.slow

PADDED = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
MASK = (PADDED != 0).long()
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


class Outbox(Backend):
    """Keeps what nnsight would send."""

    def __call__(self, tracer):
        self.blob = RequestModel.serialize(tracer)


def payload(edited, ids=IDS, **inputs):
    outbox = Outbox()
    with edited.trace(ids, backend=outbox, **inputs):
        result = edited.output.logits.save()  # noqa: F841  # the receiver looks it up by this name
    return outbox.blob


def payload_of_generate(edited, ids, **settings):
    outbox = Outbox()
    with edited.trace(ids, fn=edited.generate, backend=outbox, **settings) as tracer:
        result = tracer.result.save()  # noqa: F841
    return outbox.blob


def payload_of_a_model_without_weights(held):
    with torch.device("meta"):
        lm = NNsight(tiny_model("llama"))
    edited, outbox = edit(lm, held, proven_on=tiny_model("llama", hidden_size=16)), Outbox()
    with edited.trace(input_ids=IDS, backend=outbox):
        result = edited.output.logits.save()  # noqa: F841
    return outbox.blob


def test_a_trace_with_sae_envoys_is_not_sent():
    inner = tiny_model("llama")
    lm = wrap(inner, envoys=sae_envoys(inner, make_sae()))
    with pytest.raises(AttachError, match=r"use edit\(\)"):
        payload(lm)


def test_proven_on_needs_a_model_of_the_same_class_and_widths():
    with torch.device("meta"):
        lm = NNsight(tiny_model("llama"))
    with pytest.raises(InputError, match="same class"):
        edit(lm, Steer(make_sae(), 3, unit="raw"), proven_on=tiny_model("gpt2"))
    with pytest.raises(InputError, match="not hidden_size"):
        edit(lm, ProjectOut("mlp_neurons.1", torch.ones(48)), proven_on=tiny_model("llama", hidden_size=16))
    with pytest.raises(ShapeError, match="16"):
        edit(lm, Steer(make_sae(d_in=16), 3, unit="raw"), proven_on=tiny_model("llama", hidden_size=16))


def cases():
    """Families and interventions, also at sites in inputs, in tuples, scaled, flattened, and with transforms."""
    sae = make_sae()
    one, other, third, _ = active_latents(model_of("llama"), sae)
    yield "llama", [Clamp(sae, {one: 5.0, other: 0.0}, when={third: 0.01}, positions=[0, -1, 3])]
    yield "llama", [Splice(sae), Scale(sae, {one: 2.0}), Ablate(make_sae("topk", site="resid_post.2"), [3, 4])]
    yield "llama", [Splice(make_sae("standard", site="mlp_in.1", site_out="mlp_out.1"))]
    yield "llama", [ProjectOut("attn_z.0", torch.ones(HIDDEN)), AblateSite("mlp_out.1|center", torch.ones(HIDDEN))]
    yield "bloom", [Steer(sae, 5, strength=3.0, unit="raw"), ProjectOut("resid_mid.1", torch.ones(HIDDEN))]
    yield "opt", [ProjectOut("mlp_out.1", torch.ones(HIDDEN)), Ablate(sae, [1, 2, 3])]
    yield "granite", [ProjectOut("mlp_out.1", torch.ones(HIDDEN))]


def test_a_sent_trace_gives_the_same_without_this_package(tmp_path):
    requests, expected = [], []
    for family, held in cases():
        requests.append((family, payload(edit(wrapped(family), *held))))
        with attach(model_of(family), *held):
            expected.append(logits_of(model_of(family)))
        assert not torch.equal(expected[-1], logits_of(model_of(family)))
    requests.append(("llama", payload_of_a_model_without_weights(Steer(make_sae(), 3, strength=6.0, unit="raw"))))
    with attach(model_of("llama"), Steer(make_sae(), 3, strength=6.0, unit="raw")):
        expected.append(logits_of(model_of("llama")))
    for positions in ("generated", "prompt", [0, -1, 7]):
        held, model = Steer(make_sae(), 3, strength=6.0, unit="raw", positions=positions), model_of("llama")
        edited, settings = edit(wrapped("llama"), held), {"attention_mask": MASK, **GENERATE}
        requests.append(("llama", payload_of_generate(edited, PADDED, **settings)))
        with attach(model, held):
            expected.append(model.generate(PADDED, **settings))
    held = Steer(make_sae(), 3, strength=6.0, unit="raw", positions=[3])
    requests.append(("llama float64", payload(edit(wrapped("llama", "float64"), held))))
    out = tmp_path / "results.pt"
    command = [sys.executable, "-m", "tests.hooks.receive_trace", str(out)]
    subprocess.run(command, input=pickle.dumps(requests), check=True, cwd=Path(__file__).parents[2])
    *results, wide = torch.load(out)
    for result, wanted in zip(results, expected, strict=True):
        # The last bit of MKL's products depends on the memory addresses of the operands, which differ there.
        torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-5)
    model = model_of("llama", torch.float64)
    assert torch.equal(wide[:, :3], logits_of(model)[:, :3])  # other tokens are bit-identical
    with attach(model, held):
        close(wide, logits_of(model), 1e-6)
    assert (wide[:, 3:] != logits_of(model)[:, 3:]).any(-1).all()


def test_only_the_rows_of_edited_latents_are_sent():
    sae = make_sae()
    sizes = [len(payload(edit(wrapped("llama"), Ablate(sae, list(range(count)))))) for count in (1, 2, 34)]
    row = 4 * (2 * HIDDEN + 3)  # bytes per latent: encoder row, decoder row, and three scalars
    assert abs(sizes[2] - sizes[1] - 32 * row) < 0.1 * 32 * row
    assert len(payload(edit(wrapped("llama"), Splice(sae)))) > D_SAE * row
    assert sizes[0] < 40_000


@pytest.mark.parametrize(
    "held",
    [
        Ablate(make_sae(), [3], rows=0),
        Ablate(make_sae(), [3], when={4: 0.0}, window=3),
        Patch(SITE, torch.ones(2, 3, HIDDEN)),
        Ablate(make_sae(), [3], positions=torch.ones(2, 6, dtype=torch.bool)),
        Ablate(make_sae(), [3], mode="resample", samples=torch.ones(5, 1)),
    ],
)
def test_edits_that_depend_on_more_than_the_token_are_refused(held):
    edited = edit(wrapped("llama"), held)
    with pytest.raises(AttachError, match="cannot be sent"):
        payload(edited)
    with torch.no_grad(), edited.trace(IDS):
        logits = edited.output.logits.save()
    with attach(model_of("llama"), held):
        assert torch.equal(logits, logits_of(model_of("llama")))
