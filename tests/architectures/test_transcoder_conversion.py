"""A gated transcoder and its JumpReLU twin."""

import torch

from hf_gated_sae import GatedSAE
from tests.support.example_saes import build, randomised


def test_the_skip_connection_is_converted_too() -> None:
    place = {"site": "resid_mid.0", "site_out": "mlp_out.0", "apply_b_dec_to_input": False}
    gated = randomised(build("gated", d_out=5, skip_connection=True, **place)).double()
    x = torch.randn(32, gated.config.d_in, dtype=torch.float64)
    other = gated.to_jumprelu().double()
    for twin in (other, GatedSAE.from_jumprelu(other)):
        torch.testing.assert_close(twin(x).reconstruction, gated(x).reconstruction)
