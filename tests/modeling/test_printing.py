"""The repr of an SAE."""

import torch

from hf_gated_sae import GatedSAE, GatedSAEConfig, SAEModel, TopKSAE, TopKSAEConfig
from tests.support.example_saes import example


def test_a_loaded_sae_shows_its_origin(tmp_path):
    example("gated", site="resid_post.2", base_model="acme/lm").save_pretrained(tmp_path / "one")
    sae = SAEModel.from_pretrained(tmp_path, "one", dtype=torch.bfloat16)
    first, *below = repr(sae).splitlines()
    assert first == f"GatedSAE(resid_post.2, d_in={sae.config.d_in}, d_sae={sae.config.d_sae}, bfloat16 on cpu)"
    text = " ".join("".join(below).split())
    assert f"{tmp_path}/one" in text.replace(" ", "") or str(tmp_path) in text
    assert "layout native" in text and "base model acme/lm" in text


def test_a_partly_loaded_sae():
    assert "2 latents held" in repr(GatedSAE(GatedSAEConfig(d_in=4, d_sae=8, kept_latents=[1, 3])))


def test_a_transcoder_with_k_that_was_not_loaded():
    sites = {"site": "mlp_in.1", "site_out": "mlp_out.1", "apply_b_dec_to_input": False}
    sae = TopKSAE(TopKSAEConfig(d_in=4, d_out=6, d_sae=8, k=2, **sites))
    assert repr(sae).splitlines() == [
        "TopKSAE(mlp_in.1 > mlp_out.1, d_in=4, d_out=6, d_sae=8, k=2, float32 on cpu)",
        "    not loaded from a checkpoint",
    ]


def test_an_sae_of_several_sites():
    assert "resid_post.1, resid_post.2" in repr(example("cross_layer"))
    assert len(repr(example("cross_layer")).splitlines()) <= 10
