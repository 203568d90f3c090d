"""Fidelity of SAEs that normalise each token; SAEs that cannot be evaluated or trained are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_gated_sae import Splice, attach, evaluate
from hf_gated_sae.errors import InputError
from hf_gated_sae.functional.normalization import NORMALIZATIONS
from hf_gated_sae.modeling import SAEModel
from hf_gated_sae.training import SAETrainer, SAETrainingArguments
from tests.support.example_saes import build, randomised
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def made(**settings: Any) -> SAEModel:
    """Return an SAE as wide as the tiny models."""
    width = tiny_model("llama").config.hidden_size
    return randomised(build("jumprelu", d_in=width, **{"site": "resid_post.0", **settings}))


@pytest.mark.parametrize("normalization", list(NORMALIZATIONS))
def test_a_normalised_sae_is_measured_in_the_units_of_the_model(normalization: str) -> None:
    """Compared with the equations: normalise, encode, decode, undo the normalisation."""
    model = tiny_model("llama")
    sae = made(normalization=normalization, apply_b_dec_to_input=False).double()
    plain = made(apply_b_dec_to_input=False).double()  # the same weights, no normalisation
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(input_ids=IDS)
    handle.remove()
    x = seen[0][0].double()
    frame = NORMALIZATIONS[normalization](x, sae.config.normalization_eps)
    normalised = (x - frame.shift) / frame.divisor
    written = plain.decode(plain.encode(normalised)) * frame.scale + frame.shift
    constant = plain.b_dec * frame.scale + frame.shift
    report = evaluate(model, sae, [IDS])
    mean = x.mean(0)
    assert report.metrics.fvu == pytest.approx(
        float((x - written).square().sum() / (x - mean).square().sum()), rel=1e-5
    )
    y, z = written - constant, x - constant
    centred = float(y.square().sum() / (y * z).sum())
    assert report.metrics.relative_reconstruction_bias_centred == pytest.approx(centred, rel=1e-5)
    with attach(model, Splice(sae)):
        spliced = model(input_ids=IDS, labels=IDS).loss
    assert report.loss_spliced == pytest.approx(float(spliced), rel=1e-5)


REFUSED = [
    ({"site_out": "mlp_out.0", "apply_b_dec_to_input": False}, "is a transcoder"),
    ({"kept_latents": [1, 4]}, "holds only 2 of"),
]


@pytest.mark.parametrize("settings, phrase", REFUSED)
def test_saes_that_cannot_be_evaluated_are_refused(settings: dict[str, Any], phrase: str) -> None:
    with pytest.raises(InputError, match=phrase):
        evaluate(tiny_model("llama"), made(**settings), [IDS])


@pytest.mark.parametrize(
    "settings, phrase",
    [*REFUSED, ({"normalization": "layer_norm"}, "normalises each token"), ({"skip_connection": True}, "transcoder")],
)
def test_saes_that_cannot_be_trained_are_refused(settings: dict[str, Any], phrase: str, tmp_path: Any) -> None:
    sae = made(**settings)
    with pytest.raises(InputError, match=phrase):
        SAETrainer(sae, SAETrainingArguments(output_dir=str(tmp_path)), torch.randn(8, sae.config.d_in))
