"""Cross-layer transcoders (Ameisen et al. 2025) and weakly causal crosscoders (Lindsey et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers.initialization as init
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError, ShapeError, shown, unknown_name
from ..functional import jumprelu
from ..functional.sparse_latents import SparseLatents
from ..modeling import Objective, SAEConfig, SAEModel, Sparsity, TrainingLoss
from .jumprelu import INITIAL_THRESHOLD, StraightThroughConfig

ACTIVATIONS = ("relu", "jumprelu")


@dataclass(frozen=True)
class CrosscoderObjective(Objective):
    """``sum_m |x_m - y_m|^2 + lambda sum_i latents_i sum_m |W_dec_{i,m}|``."""

    penalises: ClassVar[bool] = True

    def loss(self, sae: CrossLayerSAE, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Return the objective on activations ``[..., n_sites, d_in]``; arguments as for `Objective.loss`.

        Raises:
            InputError: for a transcoder, whose target is not its input.
        """
        if sae.config.is_transcoder:
            raise InputError(
                "This SAE writes to other sites than it reads; training a cross-layer transcoder is not supported "
                "yet. Train a crosscoder (sites_out equal to sites), or load a trained transcoder."
            )
        latents = sae.encode(x)
        reconstruction = sae.decode(latents, x)
        norms = torch.cat([decoder.norm(dim=-1).sum(-1) for decoder in sae.decoders])
        terms = {
            "reconstruction": (target - reconstruction).square().sum((-2, -1)).mean(),
            "sparsity": sparsity.coefficient * (latents * norms).sum(-1).mean(),
        }
        return TrainingLoss.of(terms, reconstruction, latents.detach())


@strict
class CrossLayerSAEConfig(StraightThroughConfig, SAEConfig):
    """Configuration of a `CrossLayerSAE`.

    `site` and `site_out` are set only if they were given instead of `sites` and `sites_out`, which are always set.

    Attributes:
        sites: the sites that are read, in the order in which the base model computes them; by default `site` alone.
        sites_out: the sites that are written, in that order; `sites` by default.
        latents_per_site: number of latents that read each site, ``d_sae`` in total; equally many by default.
        activation: ``"jumprelu"`` or ``"relu"``.
        bandwidth: width of the straight-through estimator's kernel, in units of the pre-latents.
    """

    model_type = "cross_layer_sae"

    apply_b_dec_to_input: bool = False
    sites: list[str] | None = None
    sites_out: list[str] | None = None
    latents_per_site: list[int] | None = None
    activation: str = "jumprelu"
    bandwidth: float = 1e-3

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill defaults that follow from other fields."""
        self._check_types()
        if self.sites is None:
            if self.site is None:
                raise InputError("sites is missing; expected the sites that are read, such as ['resid_mid.0', ...].")
            self.sites = [self.site]
            self.sites_out = self.sites_out or [self.site_out or self.site]
        if self.sites_out is None:
            self.sites_out = list(self.sites)
        if self.latents_per_site is None and self.sites:
            self.latents_per_site = [self.d_sae // len(self.sites)] * len(self.sites)
        super().__post_init__(**kwargs)

    @property
    def is_transcoder(self) -> bool:
        """Whether the output belongs to other sites than the input."""
        return self.sites != self.sites_out

    def validate_sites(self) -> None:
        """Check that every site that is read has an output to write to, and latents."""
        sites, sites_out, latents = self.sites or [], self.sites_out or [], self.latents_per_site or []
        if not all(isinstance(site, str) for site in (*sites, *sites_out)) or not 1 <= len(sites) <= len(sites_out):
            raise InputError(
                f"sites is {shown(sites)} and sites_out {shown(sites_out)}; expected names of sites, at least "
                "one, and at least as many written as read."
            )
        whole = all(type(number) is int and number >= 1 for number in latents)
        if not whole or len(latents) != len(sites) or sum(latents) != self.d_sae:
            raise InputError(
                f"latents_per_site is {shown(latents)}; expected {len(sites)} positive numbers that add up to "
                f"d_sae = {self.d_sae}."
            )
        if self.apply_b_dec_to_input and len(sites) != len(sites_out):
            raise InputError(
                f"apply_b_dec_to_input is true with {len(sites)} sites read and {len(sites_out)} written; expected "
                "equal numbers, or false."
            )

    def validate_activation(self) -> None:
        """Check that the activation is known."""
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS, error=InputError)

    def validate_all_held(self) -> None:
        """Check that all latents are held."""
        if self.kept_latents is not None:
            raise InputError("kept_latents is given, but a cross-layer SAE holds all of its latents: leave it out.")


class CrossLayerSAE(SAEModel):
    r"""An SAE in which every site has its own latents, which write to that site's output and to all later ones.

    With ``x [..., n_sites, d_in]`` and source sites ``l``, each of which writes to the outputs ``m >= l``:

    ``latents_l = activation(x_l @ W_enc_l + b_enc_l)``;
    ``y_m = sum_{l <= m} latents_l @ W_dec_{l,m} + b_dec_m (+ x_m @ W_skip_m.T)``.

    A cross-layer transcoder reads the MLPs' inputs and writes their outputs; a weakly causal crosscoder writes where
    it reads. One layer of a transcoder alone is an SAE with one source site and several outputs; only the output of
    the same number has a skip connection. The latents of all sites are concatenated, ``[..., d_sae]``; the output is
    ``[..., n_sites_out, d_out]``.

    The matrices of each site are separate parameters, so that only pairs ``l <= m`` are stored, and a checkpoint with
    one file per layer is used as it is on disk; there is no `W_enc` and no `W_dec`.

    Attributes:
        encoders: of each source site ``[latents_per_site[l], d_in]``.
        decoders: of each source site ``[latents_per_site[l], n_sites_out - l, d_out]``, the site's own output first.
        b_enc: encoder bias ``[d_sae]``.
        b_dec: decoder bias ``[n_sites_out, d_out]``.
        threshold: ``[d_sae]`` in float32; only with JumpReLU.
        skips: of each site ``W_skip [d_out, d_in]``; only with ``config.skip_connection``.

    Source: transformer-circuits.pub, "Circuit Tracing" (2025), section 3, and "Sparse Crosscoders" (2024).
    """

    config: CrossLayerSAEConfig
    config_class = CrossLayerSAEConfig
    objective_class = CrosscoderObjective
    _keep_in_fp32_modules_strict = [*SAEModel._keep_in_fp32_modules_strict, "threshold"]
    one_site: ClassVar[bool] = False
    sliceable: ClassVar[bool] = False  # its decoder rows are of different lengths

    def __init__(self, config: CrossLayerSAEConfig) -> None:
        """Allocate the parameters."""
        PreTrainedModel.__init__(self, config)  # the base class's would allocate matrices of a single site
        n_out, parts = len(self.sites_out), self.latents_per_site
        self.encoders = nn.ParameterList(torch.empty(n, config.d_in) for n in parts)
        self.decoders = nn.ParameterList(torch.empty(n, n_out - at, self.d_out) for at, n in enumerate(parts))
        self.b_enc = nn.Parameter(torch.empty(config.d_sae))
        self.b_dec = nn.Parameter(torch.empty(n_out, self.d_out))
        if config.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.empty(config.d_sae, dtype=torch.float32))
        if config.skip_connection:
            self.skips = nn.ParameterList(torch.empty(self.d_out, config.d_in) for _ in parts)
        self.register_buffer("max_activation", torch.empty(config.d_sae, dtype=torch.float32))
        self.register_buffer("mean_activation", torch.empty(config.d_sae, dtype=torch.float32))
        self.post_init()

    @property
    def sites(self) -> list[str]:
        """The sites that are read."""
        return self.config.sites or []

    @property
    def sites_out(self) -> list[str]:
        """The sites that are written."""
        return self.config.sites_out or []

    @property
    def latents_per_site(self) -> list[int]:
        """Number of latents that read each site."""
        return self.config.latents_per_site or []

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what is encoded for one token, ``(n_sites, d_in)``."""
        return (len(self.sites), self.config.d_in)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Unit-norm decoder vectors for every output, encoders equal to those of their own, everything else zero."""
        if module is not self:
            return
        for encoder, decoder in zip(self.encoders, self.decoders, strict=True):
            init.copy_(decoder, nn.functional.normalize(torch.randn_like(decoder), dim=-1))
            same_width = encoder.shape[-1] == decoder.shape[-1]
            rows = decoder[:, 0] if same_width else nn.functional.normalize(torch.randn_like(encoder), dim=-1)
            init.copy_(encoder, rows)
        zero = [self.b_enc, self.b_dec, self.max_activation, self.mean_activation]
        for tensor in [*zero, *(self.skips if self.config.skip_connection else [])]:
            init.zeros_(tensor)
        if self.config.activation == "jumprelu":
            init.constant_(self.threshold, INITIAL_THRESHOLD)

    # ------------------------------------------------------------------ the equations

    def _normalized(self, x: Tensor) -> Tensor:
        """Return `x` with each token normalised, after checking that it has the activations of every source site."""
        if x.shape[-2:] != self.input_shape:
            raise ShapeError(
                f"Given activations {list(x.shape)}, but this SAE reads {len(self.sites)} sites with d_in = "
                f"{self.config.d_in}: expected [..., {len(self.sites)}, {self.config.d_in}], the activations of "
                f"{', '.join(self.sites[:4])}{', ...' if len(self.sites) > 4 else ''} of {self.config.base_model!r}, "
                "stacked in this order."
            )
        token_normalization = self.token_normalization(x)
        return x if token_normalization is None else token_normalization.apply(x)

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        each = x.unbind(-2)
        if latents is None:
            return torch.cat([self._encode_at(here, source) for source, here in enumerate(each)], -1)
        sources = torch.tensor(self.sources_of(latents), device=latents.device)
        places = [torch.where(sources == source)[0] for source in range(len(each))]
        parts = [self._encode_at(here, source, latents[places[source]]) for source, here in enumerate(each)]
        return torch.cat(parts, -1)[..., torch.cat(places).argsort()]

    def _encode_at(self, x: Tensor, source: int, rows: Tensor | None = None) -> Tensor:
        """Return a source's latents, all or some, given its normalised activation."""
        first = sum(self.latents_per_site[:source])
        encoder = self.encoders[source]
        if rows is None:
            rows = torch.arange(first, first + len(encoder), device=self.b_enc.device)
        else:
            encoder = encoder[self.rows_in_source(rows, source)]
        read = x - self.b_dec[source] if self.config.apply_b_dec_to_input else x
        pre_latents = nn.functional.linear(read, encoder) + self.b_enc[rows]
        if self.config.activation == "relu":
            return torch.relu(pre_latents)
        return jumprelu(pre_latents, self.threshold[rows], bandwidth=self.config.bandwidth)

    def _written_at(self, latents: Sequence[Tensor], output: int) -> Tensor:
        """Sum what the sources up to an output write there; one product per source avoids a copy of the decoders."""
        written = self.b_dec[output]
        for source, own in enumerate(latents):
            written = written + own @ self.decoders[source][:, output - source]
        return written

    # ------------------------------------------------------------------ site by site, as a model runs

    def sources_of(self, rows: Tensor) -> list[int]:
        """Return which source each latent reads, given the latents' rows ``[n]``."""
        ends = torch.tensor(self.latents_per_site).cumsum(0)
        return [int(source) for source in torch.searchsorted(ends, rows.cpu(), right=True)]

    def rows_in_source(self, rows: Tensor, source: int) -> Tensor:
        """Return the places of rows ``[n]``, all of one source, among the latents of that source."""
        return rows - sum(self.latents_per_site[:source])

    def encode_source(self, x: Tensor, source: int, rows: Tensor | None = None) -> Tensor:
        """Turn one source's activation ``[..., d_in]`` into its latents, ``[..., n]``."""
        token_normalization = self.token_normalization(x)
        return self._encode_at(x if token_normalization is None else token_normalization.apply(x), source, rows)

    def rows_at(self, rows: Tensor, output: int) -> Tensor:
        """Return what a unit of each latent writes at an output, ``[n, d_out]``; zeros where it does not write."""
        found = self.b_dec.new_zeros(len(rows), self.d_out)
        sources = torch.tensor(self.sources_of(rows), device=rows.device)
        for source in range(min(output + 1, len(self.decoders))):
            [places] = torch.where(sources == source)
            if len(places):
                decoder = self.decoders[source][:, output - source]
                found[places] = decoder[self.rows_in_source(rows[places], source)]
        return found

    def decode_at(self, latents: Sequence[Tensor], output: int, x: Tensor) -> Tensor:
        """Return what is written at one output, given the latents of the sources up to it."""
        written = self._written_at(latents, output)
        token_normalization = self.token_normalization(x)
        if self.config.skip_connection and output < len(self.skips):
            written = written + nn.functional.linear(
                x if token_normalization is None else token_normalization.apply(x), self.skips[output]
            )
        return (
            written if token_normalization is None or self.config.is_transcoder else token_normalization.undo(written)
        )

    # ------------------------------------------------------------------ all sites together

    def decode(self, latents: Tensor | SparseLatents, x: Tensor | None = None) -> Tensor:
        """Turn latents into what is written at every output.

        Args:
            latents: ``[..., d_sae]``, or those that are on.
            x: the activations ``[..., n_sites, d_in]`` that were encoded; needed only with a skip connection, or where
                tokens are normalised.

        Returns:
            ``[..., n_sites_out, d_out]``.

        Raises:
            ShapeError: if the last axis is not `d_sae` wide.
            InputError: if `x` is needed and not given.
        """
        if latents.shape[-1:] != (self.config.d_sae,):
            raise ShapeError(f"Given latents {list(latents.shape)}, expected [..., d_sae = {self.config.d_sae}].")
        written = self._decode(latents)
        if self.config.skip_connection:
            read = zip(self._normalized(self._needed(x)).unbind(-2), self.skips, strict=True)
            skipped = torch.stack([nn.functional.linear(here, skip) for here, skip in read], -2)
            written = written + nn.functional.pad(skipped, (0, 0, 0, len(self.sites_out) - len(self.skips)))
        token_normalization = self._output_normalization(x)
        return written if token_normalization is None else token_normalization.undo(written)

    def _decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Return what every site writes to every output."""
        if isinstance(latents, SparseLatents):
            latents = latents.dense()
        parts = latents.split(self.latents_per_site, -1)
        return torch.stack([self._written_at(parts[: at + 1], at) for at in range(len(self.sites_out))], -2)

    @classmethod
    def shared_names(cls, config: SAEConfig) -> frozenset[str]:
        """Return the names of all tensors, as none is read in part."""
        with torch.device("meta"):
            return frozenset(cls(config).state_dict())
