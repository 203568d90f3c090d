"""SAEs that write at other sites than they read, or at several, compared with hand-written hooks."""

import contextlib

import pytest
import torch
from torch import nn

from hf_gated_sae import Ablate, Clamp, Patch, ProjectOut, Scale, Splice, Steer, attach, capture
from hf_gated_sae.architectures.cross_layer import CrossLayerSAE, CrossLayerSAEConfig
from hf_gated_sae.errors import InputError
from tests.hooks.support import IDS, active_latents, block, checkpoint_layers, close, logits_of, make_sae, model_of
from tests.support.tiny_models import HIDDEN, tiny_model

DOUBLE = torch.float64
EXACT = 1e-12
OTHER = torch.tensor([[70, 9, 25, 31, 66, 80], [12, 88, 50, 7, 42, 19]])


def transcoder(site="mlp_in.1", site_out="mlp_out.1", *, dtype=DOUBLE, **settings):
    settings = {"apply_b_dec_to_input": False, **settings}
    return make_sae("gated", site=site, site_out=site_out, dtype=dtype, **settings)


def cross_layer(sites, sites_out=None, *, dtype=DOUBLE, **settings):
    config = CrossLayerSAEConfig(d_in=HIDDEN, d_sae=24, sites=sites, sites_out=sites_out, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = CrossLayerSAE(config).eval()
        with torch.no_grad():
            for name, value in sae.named_parameters():
                value.copy_(torch.randn_like(value) * (0.2 if value.ndim > 1 else 0.1))
                if name == "threshold":
                    value.abs_()
    sae.requires_grad_(False)
    sae.record_statistics(torch.full((24,), 1.5), torch.full((24,), 0.5), tokens=10)
    return sae.to(dtype)


CLT = (["mlp_in.0", "mlp_in.1", "mlp_in.2"], ["mlp_out.0", "mlp_out.1", "mlp_out.2"])
STREAM = ["resid_post.0", "resid_post.1", "resid_post.2"]


@contextlib.contextmanager
def mlp_by_hand(model, compute, *, layer=1, norm=None):
    """Replace an MLP's output, or that of the norm after it, by ``compute(the MLP's input)``."""
    mlp, seen = block(model, "llama", layer).mlp, {}
    handles = [mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))]
    handles.append((norm or mlp).register_forward_hook(lambda *_: compute(seen["x"])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------ transcoders


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_transcoder_replaces_the_mlp(family, skip):
    """Gemma 2 normalises the MLP's output before adding it; mlp_out is the normalised output."""
    model, sae = model_of(family, DOUBLE), transcoder(skip_connection=skip)
    norm = block(model, family).post_feedforward_layernorm if family == "gemma2" else None
    with mlp_by_hand(model, lambda x: sae(x).reconstruction, norm=norm):
        expected = logits_of(model)
    with attach(model, Splice(sae), check=False):
        close(logits_of(model), expected, EXACT)
    assert (expected - logits_of(model)).abs().max() > 1e-3


EDITS = {
    "ablate": (lambda s, a: Ablate(s, [a]), lambda f, s, a: 0 * f),
    "clamp": (lambda s, a: Clamp(s, {a: 4.0}), lambda f, s, a: 0 * f + 4),
    "steer": (lambda s, a: Steer(s, a, strength=-2.0), lambda f, s, a: f - 2 * s.max_activation[a].double()),
    "scale where it is active": (lambda s, a: Scale(s, {a: 3.0}, when={a: 0.0}), lambda f, s, a: 3 * f),
}


@pytest.mark.parametrize("spliced", [False, True])
@pytest.mark.parametrize("verb", EDITS)
def test_edits_of_a_transcoder_change_what_its_latents_write(verb, spliced):
    model, sae = model_of("llama", DOUBLE), transcoder()
    latent = active_latents(model, sae)[0]
    make, plain = EDITS[verb]
    mlp = block(model, "llama").mlp
    real = type(mlp).forward

    def by_hand(x):
        latents = sae.encode(x)
        changed = latents.clone()
        changed[..., latent] = plain(latents[..., latent], sae, latent)
        return sae.decode(changed) + (0 if spliced else real(mlp, x) - sae.decode(latents))

    with mlp_by_hand(model, by_hand):
        expected = logits_of(model)
    with attach(model, make(sae, latent), *([Splice(sae)] if spliced else []), check=False):
        close(logits_of(model), expected, EXACT)
    assert (expected - logits_of(model)).abs().max() > 1e-4


@pytest.mark.parametrize("edited", [False, True])
def test_a_transcoder_may_read_the_stream_and_normalise_it_itself(edited):
    """Layouts that fold the norm's gain into the encoder read resid_mid and normalise each token."""
    model = model_of("llama", DOUBLE)
    plain, sae = transcoder(), transcoder(site="resid_mid.1", normalization="rms_norm", normalization_eps=1e-3)
    norm, mlp = block(model, "llama").post_attention_layernorm, block(model, "llama").mlp
    stream, real = {}, type(mlp).forward
    handle = norm.register_forward_pre_hook(lambda module, args: stream.update(x=args[0]))

    def by_hand(x):
        read = stream["x"] / (stream["x"].square().mean(-1, keepdim=True) + 1e-3).sqrt()
        if not edited:
            return plain(read).reconstruction
        return real(mlp, x) - 2.0 * plain.encode(read)[..., [latent]] * plain.W_dec[latent]

    latent = active_latents(model, sae)[0]
    with mlp_by_hand(model, by_hand):
        expected = logits_of(model)
    handle.remove()
    with attach(model, Scale(sae, {latent: -1.0}) if edited else Splice(sae), check=False):
        close(logits_of(model), expected, EXACT)
    assert (expected - logits_of(model)).abs().max() > 1e-4


def test_other_verbs_act_where_a_transcoder_writes():
    model, sae = model_of("llama", DOUBLE), transcoder()
    a, b = active_latents(model, sae)[:2]
    mlp, values = block(model, "llama").mlp, capture(model, sae, input_ids=OTHER)[sae]
    real = type(mlp).forward
    unit = torch.linalg.qr(sae.W_dec[[a, b]].T).Q
    row = sae.W_dec[a] / sae.W_dec[a].norm()

    def patched(x):
        latents = sae.encode(x)
        return real(mlp, x) + (values[..., [a, b]] - latents[..., [a, b]]) @ sae.W_dec[[a, b]]

    cases = [
        (ProjectOut(sae, [a, b]), lambda x: real(mlp, x) - real(mlp, x) @ unit @ unit.T),
        (
            Steer(sae, a, strength=0.5, unit="norm"),
            lambda x: real(mlp, x) + 0.5 * real(mlp, x).norm(dim=-1, keepdim=True) * row,
        ),
        (Patch(sae, values, latents=[a, b]), patched),
    ]
    for edit, by_hand in cases:
        with mlp_by_hand(model, by_hand):
            expected = logits_of(model)
        with attach(model, edit, check=False):
            close(logits_of(model), expected, EXACT)


def test_a_transcoder_trains_through_gradient_checkpointing():
    sae, found = transcoder(dtype=torch.float32), []
    latent = 3
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            checkpoint_layers(model, reentrant=False)
        with attach(model, Splice(sae), Clamp(sae, {latent: 2.0}), check=False) as handle:
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert all(entry.calls == 1 for entry in handle.report().interventions)
        found.append(model.model.embed_tokens.weight.grad)
    close(found[1], found[0], 1e-5)


# ------------------------------------------------------------------ several sites


@contextlib.contextmanager
def each_mlp(model, compute):
    """Replace each MLP's output by ``compute(layer, inputs so far, output)``."""
    seen, handles = [], []

    def before(module, args):
        seen.append(args[0])

    for number in range(3):
        mlp = block(model, "llama", number).mlp
        handles.append(mlp.register_forward_pre_hook(before))

        def after(module, args, output, number=number):
            new = compute(number, seen, output)
            if number == 2:
                seen.clear()
            return new

        handles.append(mlp.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pieces(sae, inputs):
    """Latents of each source so far, from their equations."""
    first, found = 0, []
    for source, x in enumerate(inputs):
        n = sae.latents_per_site[source]
        pre = nn.functional.linear(x, sae.encoders[source]) + sae.b_enc[first : first + n]
        found.append(pre * (pre > sae.threshold[first : first + n]) if hasattr(sae, "threshold") else pre.relu())
        first += n
    return found


def assembled(sae, latents, output, x=None):
    written = sae.b_dec[output].clone()
    for source, own in enumerate(latents):
        written = written + own @ sae.decoders[source][:, output - source]
    return written if x is None else written + x @ sae.skips[output].T


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_a_cross_layer_transcoder_replaces_all_mlps(activation, skip):
    model = model_of("llama", DOUBLE)
    sae = cross_layer(*CLT, activation=activation, skip_connection=skip)

    def by_hand(number, inputs, _):
        return assembled(sae, pieces(sae, inputs), number, inputs[-1] if skip else None)

    with each_mlp(model, by_hand):
        expected = logits_of(model)
    with attach(model, Splice(sae), check=False):
        close(logits_of(model), expected, EXACT)


@pytest.mark.parametrize("spliced", [False, True])
@pytest.mark.parametrize("latents", [[2], [9, 3], [20, 1, 12]], ids=str)
def test_edits_of_a_cross_layer_transcoder_write_at_every_output_from_their_own_layer_on(latents, spliced):
    model, sae = model_of("llama", DOUBLE), cross_layer(*CLT, activation="relu")

    def by_hand(number, inputs, output):
        clean = pieces(sae, inputs)
        changed = [own.clone() for own in clean]
        for latent in latents:
            if latent // 8 <= number:
                changed[latent // 8][..., latent % 8] = 3.0
        new = assembled(sae, changed, number)
        return new if spliced else output + new - assembled(sae, clean, number)

    with each_mlp(model, by_hand):
        expected = logits_of(model)
    edits = [Clamp(sae, dict.fromkeys(latents, 3.0)), *([Splice(sae)] if spliced else [])]
    with attach(model, *edits, check=False) as handle:
        close(logits_of(model), expected, EXACT)
    assert (expected - logits_of(model)).abs().max() > 1e-4
    assert [entry.site for entry in handle.report().interventions[:3]] == CLT[1]


def test_a_latent_of_the_last_layer_leaves_the_earlier_outputs_alone():
    model, sae = model_of("llama", DOUBLE), cross_layer(*CLT, activation="relu")
    with attach(model, Clamp(sae, {20: 3.0}), check=False):
        edited = capture(model, ["mlp_out.0", "mlp_out.1", "mlp_out.2"], input_ids=IDS)
    clean = capture(model, ["mlp_out.0", "mlp_out.1", "mlp_out.2"], input_ids=IDS)
    same = [torch.equal(edited[site], clean[site]) for site in clean]
    assert same == [True, True, False]


@contextlib.contextmanager
def each_block(model, compute):
    """Replace each block's output by ``compute(layer, outputs so far)``."""
    seen, handles = [], []
    for number in range(3):

        def after(module, args, output, number=number):
            seen.append(output if isinstance(output, torch.Tensor) else output[0])
            new = compute(number, seen)
            if number == 2:
                seen.clear()
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        handles.append(block(model, "llama", number).register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("edited", [False, True])
def test_a_crosscoder_replaces_each_of_its_sites(edited):
    model, sae = model_of("llama", DOUBLE), cross_layer(STREAM, activation="relu")

    def by_hand(number, activations):
        latents = pieces(sae, activations)
        for latent in (5, 17) if edited else ():
            if latent // 8 <= number:
                latents[latent // 8][..., latent % 8] = 2.5
        return assembled(sae, latents, number)

    with each_block(model, by_hand):
        expected = logits_of(model)
    edits = [Clamp(sae, {5: 2.5, 17: 2.5})] if edited else []
    with attach(model, Splice(sae), *edits, check=False):
        close(logits_of(model), expected, EXACT)


def several():
    clt, crosscoder = cross_layer(*CLT, dtype=torch.float32), cross_layer(STREAM, dtype=torch.float32)
    one = transcoder(dtype=torch.float32)
    return {
        "transcoder": [Splice(one)],
        "edit of a transcoder": [Clamp(one, {3: 2.0}, positions="generated", when={5: 0.0}, window=3)],
        "cross-layer transcoder": [Splice(clt)],
        "edit of a cross-layer transcoder": [Clamp(clt, {3: 2.0, 20: 1.0}, positions="generated")],
        "crosscoder": [Splice(crosscoder), Scale(crosscoder, {3: 0.0}, positions=[2, 7])],
    }


@pytest.mark.parametrize("case", several())
def test_generation_is_the_same_with_and_without_cache(case):
    model, edits = model_of("llama"), several()[case]
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, output_scores=True)
    settings["return_dict_in_generate"] = True
    with attach(model, *edits, check=False):
        cached = model.generate(IDS, **settings)
        for way in ({"use_cache": False}, {"prefill_chunk_size": 4}):
            other = model.generate(IDS, **settings, **way)
            assert torch.equal(other.sequences, cached.sequences)
            for one, two in zip(cached.scores, other.scores, strict=True):
                finite = torch.isfinite(two)
                close(one[finite], two[finite], 1e-4)
    assert not torch.equal(model.generate(IDS, **settings).scores[-1], cached.scores[-1])


# ------------------------------------------------------------------ refused


def test_edits_of_a_crosscoder_need_its_splice():
    model, sae, other = model_of("llama"), cross_layer(STREAM), cross_layer(STREAM)
    for edits in (
        [Clamp(sae, {3: 1.0})],
        [Clamp(sae, {3: 1.0}), Splice(other)],
        [Clamp(sae, {3: 1.0}), Splice(sae, error=True)],
    ):
        with pytest.raises(InputError, match=r"Clamp was given a crosscoder.*Attach Splice of the same SAE"):
            attach(model, *edits, check=False)


@pytest.mark.parametrize(("site", "site_out"), [("mlp_in.2", "mlp_out.1"), ("resid_post.1", "mlp_out.1")])
def test_reading_after_the_site_that_is_written_is_refused(site, site_out):
    with pytest.raises(InputError, match=rf"Splice reads {site} to write {site_out}.*computes.*first"):
        attach(model_of("llama"), Splice(transcoder(site, site_out, dtype=torch.float32)), check=False)


def test_a_condition_on_latents_of_a_later_site_is_refused():
    sae = cross_layer(*CLT)
    Clamp(sae, {12: 1.0}, when={3: 0.0, 9: 0.0})
    with pytest.raises(InputError, match=r"when=\{20: 0.0\}, latents of a later site"):
        Clamp(sae, {12: 1.0}, when={20: 0.0})
