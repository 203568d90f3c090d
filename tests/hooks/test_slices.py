"""An SAE loaded with only a few latents edits them exactly as the full SAE does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gated_sae import Ablate, Clamp, SAEModel, Scale, Splice, Steer, attach
from hf_gated_sae.architectures import architectures
from hf_gated_sae.errors import InputError, LatentIndexError, SAEError
from tests.hooks.support import ARCHITECTURES, IDS, active_latents, close, hooks_on, logits_of, make_sae, model_of
from tests.support.example_saes import assert_same, example

EXACT = 1e-12
DOUBLE = torch.float64
SLICEABLE = [name for name in ARCHITECTURES if architectures[name].sliceable and architectures[name].elementwise]

VERBS = {
    "ablate": lambda sae, a, b, c: Ablate(sae, [a, b]),
    "ablate to the mean": lambda sae, a, b, c: Ablate(sae, [a, b], mode="mean"),
    "clamp": lambda sae, a, b, c: Clamp(sae, {a: 3.5, b: 0.25}),
    "clamp where another is active": lambda sae, a, b, c: Clamp(sae, {a: 3.5}, when={c: 0.1}),
    "clamp generated tokens": lambda sae, a, b, c: Clamp(sae, {a: 3.5}, positions="generated"),
    "scale": lambda sae, a, b, c: Scale(sae, {a: 2.0, b: -0.5}),
    "steer by maxima": lambda sae, a, b, c: Steer(sae, a, strength=-1.5),
    "steer by raw units": lambda sae, a, b, c: Steer(sae, b, strength=4.0, unit="raw"),
}


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Save an SAE and return its folder."""

    def save(sae: SAEModel) -> Path:
        sae.save_pretrained(tmp_path / "sae")
        return tmp_path / "sae"

    return save


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("architecture", SLICEABLE)
def test_an_edit_with_a_slice_equals_that_with_the_full_sae(architecture: str, verb: str, saved: Any) -> None:
    model, full = model_of("llama", DOUBLE), make_sae(architecture, dtype=DOUBLE)
    a, b, c = active_latents(model, full)[:3]
    some = SAEModel.from_pretrained(saved(full), latents=[c, 50, a, 3, b])
    clean, make = logits_of(model), VERBS[verb]
    with attach(model, make(full, a, b, c)):
        expected = logits_of(model)
    with attach(model, make(some, a, b, c)):
        got = logits_of(model)
    close(got, expected, EXACT)
    assert verb == "clamp generated tokens" or not torch.equal(expected, clean)


@pytest.mark.parametrize("verb", VERBS)
def test_generation_with_a_slice_equals_that_with_the_full_sae(verb: str, saved: Any) -> None:
    model, full = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE)
    a, b, c = active_latents(model, full)[:3]
    some = SAEModel.from_pretrained(saved(full), latents=[b, c, a])
    written = []
    for sae in (full, some):
        with attach(model, VERBS[verb](sae, a, b, c)):
            written.append(
                model.generate(
                    IDS, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
                )
            )
    assert torch.equal(written[0].sequences, written[1].sequences)
    for one, other in zip(written[0].logits, written[1].logits, strict=True):
        close(other, one, EXACT)


@pytest.mark.parametrize("normalization", ["center", "layer_norm", "unit_norm", "rms_norm"])
def test_a_normalised_sae(normalization: str, saved: Any) -> None:
    model, full = model_of("llama", DOUBLE), make_sae(dtype=DOUBLE, normalization=normalization)
    a, b = active_latents(model, full)[:2]
    some = SAEModel.from_pretrained(saved(full), latents=[b, a])
    with attach(model, Clamp(full, {a: 2.0}), Steer(full, b)):
        expected = logits_of(model)
    with attach(model, Clamp(some, {a: 2.0}), Steer(some, b)):
        close(logits_of(model), expected, EXACT)


def test_a_slice_of_a_slice_and_one_that_was_saved(saved: Any, tmp_path: Path) -> None:
    full = make_sae()
    some = SAEModel.from_pretrained(saved(full), latents=[60, 5, 17, 33])
    some.save_pretrained(tmp_path / "some")
    assert_same(SAEModel.from_pretrained(tmp_path / "some"), some)
    fewer = SAEModel.from_pretrained(tmp_path / "some", latents=[33, 60])
    assert_same(fewer, SAEModel.from_pretrained(tmp_path / "sae", latents=[33, 60]))
    assert torch.equal(fewer.W_dec, full.W_dec[[33, 60]]) and fewer.config.d_sae == full.config.d_sae
    assert fewer.config.recorded_tokens == 1000 and torch.equal(fewer.max_activation, full.max_activation[[33, 60]])
    with pytest.raises(LatentIndexError, match="holds 4 of 64 latents, and latent 7 is not among them"):
        SAEModel.from_pretrained(tmp_path / "some", latents=[33, 7])


@pytest.mark.parametrize("make", [
    lambda sae: Ablate(sae, [5, 7]), lambda sae: Clamp(sae, {7: 1.0}), lambda sae: Scale(sae, {7: 1.0}),
    lambda sae: Steer(sae, 7), lambda sae: Clamp(sae, {5: 1.0}, when={7: 0.0}),
    lambda sae: sae.encode(torch.zeros(32), [7]),
])  # fmt: skip
def test_a_latent_that_was_not_loaded_is_refused(make: Any, saved: Any) -> None:
    some = SAEModel.from_pretrained(saved(make_sae()), latents=[5])
    with pytest.raises(LatentIndexError, match=r"Latent 7 was not loaded: .*1 of its 64 .*latents=\[..., 7\]"):
        make(some)


@pytest.mark.parametrize("latents", [[64], [-1], [3, 3], [2**40], [1.5], ["x"], [None], "12", [True]])
def test_latents_that_do_not_exist_are_refused(latents: Any, saved: Any) -> None:
    with pytest.raises(SAEError):
        SAEModel.from_pretrained(saved(make_sae()), latents=latents)


def test_no_latents(saved: Any) -> None:
    none = SAEModel.from_pretrained(saved(make_sae()), latents=[])
    assert none.W_dec.shape == (0, 32)
    with pytest.raises(InputError, match="given no latents"):
        Ablate(none, [])


def test_a_splice_is_refused_before_anything_is_hooked(saved: Any) -> None:
    model = model_of("llama")
    some = SAEModel.from_pretrained(saved(make_sae()), latents=[5, 6])
    with pytest.raises(LatentIndexError, match="load the SAE without latents="), attach(model, Splice(some)):
        raise AssertionError("attached")
    with pytest.raises(LatentIndexError, match="without latents="), attach(model, Ablate(some, [5]), Splice(some)):
        raise AssertionError("attached")
    assert hooks_on(model) == ({}, [])
    with pytest.raises(LatentIndexError, match="without latents="):
        some.decode(torch.zeros(1, 2))
    with pytest.raises(LatentIndexError, match="without latents="):
        some(torch.zeros(1, 32))


@pytest.mark.parametrize("architecture", [name for name in architectures if not architectures[name].sliceable])
def test_architectures_that_cannot_be_loaded_in_part_are_refused(architecture: str, saved: Any) -> None:
    with pytest.raises(InputError, match="cannot hold only some of its latents: load it without latents="):
        SAEModel.from_pretrained(saved(example(architecture)), latents=[1])


def test_bytes_read(saved: Any) -> None:
    full = make_sae()
    folder = saved(full)
    whole = SAEModel.from_pretrained(folder).checkpoint.bytes_read
    some = SAEModel.from_pretrained(folder, latents=[5]).checkpoint.bytes_read
    file = (folder / "model.safetensors").stat().st_size
    assert file <= whole <= 2 * file and some < whole
