"""OpenAI's ``sparse_autoencoder`` (Gao et al. 2024, arXiv 2406.04093): SAEs of GPT-2 small."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..architectures.standard import StandardSAE
from ..architectures.topk import TopKSAE
from ..errors import CheckpointError
from ..hub import index
from ..hub.location import Location
from ..modeling import SAEConfig, SAEModel
from ..modeling.checkpoint import Checkpoint
from ._config_values import integer, mapping, one_of
from ._folders import mapped_again
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, selected_file, widths

SITES = {
    "mlp_post_act": "mlp_neurons",
    "resid_delta_attn": "attn_out",
    "resid_delta_mlp": "mlp_out",
    "resid_post_attn": "resid_mid",
    "resid_post_mlp": "resid_post",
}
"""Sites by the location in the name of the folder."""
ALWAYS = {"pre_bias", "latent_bias", "encoder.weight"}
UNTIED, TIED = "decoder.weight", "decoder.linear.weight"
BESIDES = (
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
    "activation",
    "activation_state_dict",
    "activation.k",
    "activation.postact_fn",
)
BASE_MODEL = "openai-community/gpt2"

_FILE = re.compile(r"(?!final_sparse_autoencoder_)[^/]*\.pt")
_ADDRESS = re.compile(r"(?:.*/)?(?P<location>" + "|".join(SITES) + r")(?:_v\w+)?/autoencoders/(?P<layer>\d+)\.pt")


class OpenAIFormat(CheckpointFormat):
    """Written by OpenAI: ``<location>[_v4|_v5_32k|_v5_128k]/autoencoders/<layer>.pt``, without a configuration.

    The tensors are ``encoder.weight [d_sae, d_in]``, ``pre_bias``, ``latent_bias`` and a decoder. TopK SAEs normalise
    each token (mean and standard deviation, undone after decoding), as OpenAI's loader assumes; those with a ReLU do
    not. The site is read from the names of folder and file, and is unknown for a file with another path.

    Source: openai/sparse_autoencoder.
    """

    name: ClassVar[str] = "openai"
    files = ("*.pt",)
    any_name: ClassVar[bool] = True

    def addresses(self, location: Location) -> list[str]:
        """Return the files with a path of this layout."""
        prefix = f"{location.subfolder}/" if location.subfolder else ""
        return [file for file in location.files if _ADDRESS.fullmatch(f"{prefix}{file}")]

    def claims(self, location: Location) -> bool:
        """Whether there is one ``.pt`` file, and it has these tensors."""
        file = selected_file(location, _FILE)
        return file is not None and set(location.content(file)) >= ALWAYS

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, the activation from the file, and the site from its path."""
        file = selected_file(location, _FILE)
        if file is None:
            raise CheckpointError(f"{location} is not a .pt file; expected one, such as 'autoencoders/5.pt'.")
        content, where = location.content(file), f"{file} of {location}"
        model_class, settings = _activation(content, where)
        tied = TIED in content
        names = {"W_enc_T": "encoder.weight", "W_dec": TIED if tied else f"{UNTIED}.T"}
        names |= {"b_enc": "latent_bias", "b_dec": "pre_bias"}
        stored = renamed(content, names, where, besides=BESIDES)
        if tied:  # the two names share one matrix
            stored["W_dec"] = mapped_again(stored["W_dec"], location, file)
        d_sae, d_in, d_out = widths(stored)
        address = location.address if location.file else "/".join(filter(None, (location.subfolder, file)))
        config_class: Any = model_class.config_class
        config: SAEConfig = config_class(
            d_in=d_in, d_sae=d_sae, d_out=d_out, **settings, **_site_fields(location, address)
        )
        return Checkpoint(model_class, config, location.origin(self.name, [file]), stored)

    def examples(self, root: Path) -> list[Example]:
        """Write one SAE of every location and version, tied and untied."""
        made = [
            Example("acme/openai-gpt2-small", "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"),
            Example("acme/openai-gpt2-small", "gpt2-small/resid_post_attn_v5_128k/autoencoders/0.pt"),
            Example("acme/openai-gpt2-small", "gpt2-small/resid_delta_attn_v5_32k/autoencoders/3.pt"),
            Example("acme/openai-gpt2-small", "gpt2-small/resid_delta_mlp_v4/autoencoders/1.pt"),
            Example("acme/openai-gpt2-small", "gpt2-small/mlp_post_act/autoencoders/11.pt"),
        ]
        for seed, example in enumerate(made):
            d, s, generator = 6 + seed, 16, torch.Generator().manual_seed(seed)
            state: dict[str, Any] = {
                "pre_bias": torch.randn(d, generator=generator),
                "latent_bias": torch.randn(s, generator=generator),
                "stats_last_nonzero": torch.zeros(s, dtype=torch.int64),
                "latents_activation_frequency": torch.ones(s),
                "latents_mean_square": torch.ones(s),
                "encoder.weight": torch.randn(s, d, generator=generator),
            }
            if "mlp_post_act" in example.address:
                state[TIED] = state["encoder.weight"]
            else:
                # As the real files have it: training starts from a transposed view of the encoder.
                state[UNTIED] = torch.randn(s, d, generator=generator).T
            if "_v5" in example.address:
                state |= {"activation.k": 5, "activation.postact_fn": "ReLU", "activation": "TopK"}
                state["activation_state_dict"] = {"k": 5, "postact_fn": "ReLU"}
            else:
                state["activation"] = "ReLU"
            path = root / example.repo / example.address
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path)
        return made


def _activation(content: dict[str, Any], where: str) -> tuple[type[SAEModel], dict[str, Any]]:
    """Return the architecture, and its settings.

    Raises:
        CheckpointError: if the activation is not one of the published SAEs'.
    """
    if one_of(content, "activation", where, ("ReLU", "TopK"), "ReLU") == "ReLU":
        return StandardSAE, {}
    state = mapping(content, "activation_state_dict", where)
    one_of(state, "postact_fn", where, ("ReLU",), "ReLU")
    return TopKSAE, {"k": integer(state, "k", where), "normalization": "layer_norm"}


def _site_fields(location: Location, address: str) -> dict[str, Any]:
    """Return the fields for site and base model that index and names determine."""
    facts = index.known_facts(location.repo_id, address)
    named = re.search(r"gpt-?2", f"{location.repo_id}/{address}", re.IGNORECASE)
    fields = {"base_model": facts.get("base_model") or (BASE_MODEL if named else None)}
    found = _ADDRESS.fullmatch(address)
    return {**fields, "site": f"{SITES[found['location']]}.{int(found['layer'])}"} if found else fields
