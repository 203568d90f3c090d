"""The base class of every SAE."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn

from ..errors import InputError, LatentIndexError, ShapeError
from ..functional.metrics import FidelityMetrics
from ..functional.normalization import NORMALIZATIONS, TokenNormalization
from ..functional.sparse_decode import decode
from ..functional.sparse_latents import SparseLatents
from .architecture import ArchitectureContract
from .architecture_registry import architectures
from .config import SAEConfig
from .dtypes import compute_in_widest_dtype
from .latent_rows import held_rows
from .objective import Objective, Sparsity
from .output import SAEOutput, TrainingLoss
from .printing import summary
from .sparse_encoding import encode_sparse, reconstruct
from .training_input import require_trainable_input, training_obstacle


class SAEModel(ArchitectureContract):
    """An SAE: ``latents = encode(x)``, ``reconstruction = latents @ W_dec + b_dec``.

    A new architecture is one file in `architectures/`: a configuration class, and a subclass of this one that names
    the configuration as its ``config_class``, adds its parameters, names its training objective as its
    ``objective_class``, and defines one of the sets of methods that `ArchitectureContract` describes.

    In memory and on disk the encoder is one row per latent (`W_enc_T`), so that a few latents are a few contiguous
    byte ranges of every tensor; `W_enc` is the usual orientation of the same memory.

    Attributes:
        W_enc_T: encoder ``[d_sae, d_in]``; absent in a `tied` architecture.
        W_dec: decoder ``[d_sae, d_out]``.
        b_dec: decoder bias ``[d_out]``.
        W_skip: ``[d_out, d_in]``; only in a transcoder with ``config.skip_connection``.
        max_activation: largest value of each latent on the recorded text, ``[d_sae]`` float32.
        mean_activation: mean value of each latent on the recorded text, zeros included, ``[d_sae]`` float32.
            Both mean something only if ``config.recorded_tokens`` is not 0; `record_statistics` fills them.
    """

    _keep_in_fp32_modules_strict = ["max_activation", "mean_activation"]

    W_enc_T: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    max_activation: Tensor
    mean_activation: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the equations that the class defines compute in the widest dtype involved."""
        super().__init_subclass__(**kwargs)
        compute_in_widest_dtype(cls)

    def __init__(self, config: SAEConfig) -> None:
        """Allocate the parameters that all architectures share; subclasses add theirs, then call `post_init`."""
        super().__init__(config)
        if type(self) is SAEModel:
            raise InputError(
                "SAEModel is the common base class; build an architecture, such as GatedSAE(GatedSAEConfig(...)), "
                f"or load one with SAEModel.from_pretrained(...). Architectures: {', '.join(architectures)}."
            )
        if not self.tied:
            self.W_enc_T = nn.Parameter(torch.empty(config.rows, config.d_in))
        self.W_dec = nn.Parameter(torch.empty(config.rows, self.d_out))
        self.b_dec = nn.Parameter(torch.empty(self.d_out))
        if config.skip_connection:
            self.W_skip = nn.Parameter(torch.empty(self.d_out, config.d_in))
        self.register_buffer("max_activation", torch.empty(config.rows, dtype=torch.float32))
        self.register_buffer("mean_activation", torch.empty(config.rows, dtype=torch.float32))

    def __repr__(self) -> str:
        """Return class, site, sizes and origin in a few lines."""
        return summary(self)

    # ------------------------------------------------------------------ the equations

    def encode(self, x: Tensor, latents: Sequence[int] | Tensor | None = None) -> Tensor:
        """Turn activations into latents.

        Args:
            x: activations ``[..., d_in]``; computed in the wider of their dtype and the SAE's.
            latents: indices ``[n]`` of the latents to compute; all by default. For element-wise architectures only
                their encoder rows are read.

        Returns:
            Latents ``[..., d_sae]``, or ``[..., n]``.

        Raises:
            ShapeError: if the last axis of `x` is not `d_in` wide.
            InputError: if the indices are not integers, but for example a mask.
            LatentIndexError: if an index is outside ``0 .. d_sae - 1``.
        """
        self.require_encodable()
        return self._encode(self._normalized(x), None if latents is None else self.latent_indices(latents))

    def require_encodable(self) -> None:
        """Raise unless the SAE holds all latents that encoding needs.

        Raises:
            LatentIndexError: if only some latents were loaded, and whether they are on depends on the others.
        """
        if not self.elementwise and self.config.kept_latents is not None:
            raise LatentIndexError(
                f"Whether a latent of a {type(self).__name__} is on depends on all of its latents, and only "
                f"{self.config.rows} of {self.config.d_sae} were loaded: load the SAE without latents=."
            )

    def _normalized(self, x: Tensor) -> Tensor:
        """Return `x` with each token normalised as the SAE does, after checking its width."""
        if x.shape[-1:] != (self.config.d_in,):
            raise ShapeError(
                f"Given activations {list(x.shape)}, but this SAE reads d_in = {self.config.d_in}: expected "
                f"[..., {self.config.d_in}]. Check that they are from site {self.config.site!r} of "
                f"{self.config.base_model!r}."
            )
        token_normalization = self.token_normalization(x)
        return x if token_normalization is None else token_normalization.apply(x)

    def decode(self, latents: Tensor | SparseLatents, x: Tensor | None = None) -> Tensor:
        """Turn latents into a reconstruction, ``latents @ W_dec + b_dec``.

        Args:
            latents: ``[..., d_sae]``, or those that are on.
            x: the activations ``[..., d_in]`` that were encoded; needed only where the SAE normalises each token or
                has a skip connection, and ignored elsewhere.

        Returns:
            Reconstruction ``[..., d_out]``, in the units of `x`.

        Raises:
            ShapeError: if the last axis is not `d_sae` wide.
            InputError: if `x` is needed and not given.
            LatentIndexError: if only some latents were loaded.
        """
        if self.config.kept_latents is not None:
            raise LatentIndexError(
                f"Only {self.config.rows} of {self.config.d_sae} latents were loaded, and a reconstruction needs all: "
                "load the SAE without latents=."
            )
        if latents.shape[-1:] != (self.config.d_sae,):
            raise ShapeError(f"Given latents {list(latents.shape)}, expected [..., d_sae = {self.config.d_sae}].")
        written = self._decode(latents)
        if self.config.skip_connection:
            written = written + self._skipped(self._needed(x))
        token_normalization = self._output_normalization(x)
        return written if token_normalization is None else token_normalization.undo(written)

    def _decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Decode, before the normalisation is undone."""
        written = decode(latents, self.W_dec)
        return (written if self.latent_group is None else self.latent_group.summed(written)) + self.b_dec

    def _skipped(self, x: Tensor) -> Tensor:
        """Return what a skip connection writes."""
        return nn.functional.linear(self._normalized(x), self.W_skip)

    def token_normalization(self, x: Tensor) -> TokenNormalization | None:
        """Return shift and scale of the normalisation of every token of ``x [..., d_in]``; None if there is none."""
        name = self.config.normalization
        return None if name == "none" else NORMALIZATIONS[name](x, self.config.normalization_eps)

    def written_scale(self, x: Tensor) -> Tensor | None:
        """Return the factor that scales the decoder's output at each token of `x`, ``[..., 1]``; None for 1."""
        token_normalization = self._output_normalization(x)
        return None if token_normalization is None else token_normalization.scale

    def _output_normalization(self, x: Tensor | None) -> TokenNormalization | None:
        """Return the normalisation to undo in the output: that of the input, unless the output is at another site."""
        if self.config.normalization == "none" or self.config.is_transcoder:
            return None
        return self.token_normalization(self._needed(x))

    def _needed(self, x: Tensor | None) -> Tensor:
        """Return the input that decoding needs.

        Raises:
            InputError: if `x` is None.
        """
        if x is None:
            raise InputError(
                f"This SAE (normalization {self.config.normalization!r}, skip_connection "
                f"{self.config.skip_connection}) needs the activations to decode: call decode(latents, x) or sae(x)."
            )
        return x

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode.

        Args:
            x: activations ``[..., d_in]``.

        Returns:
            Reconstruction ``[..., d_out]`` and latents ``[..., d_sae]``.
        """
        latents = self.encode(x)
        return SAEOutput(reconstruction=self.decode(latents, x), latents=latents)

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """Turn activations into the latents that are on.

        Equal to ``encode(x)`` to rounding. Where no gradients are needed, a few tokens are encoded at a time.

        Args:
            x: activations ``[..., d_in]``; computed in the wider of their dtype and the SAE's.

        Returns:
            The latents of ``encode(x)`` that are not zero.

        Raises:
            ShapeError: if the last axis of `x` is not `d_in` wide.
            LatentIndexError: if only some latents were loaded, and whether they are on depends on the others.
        """
        self.require_encodable()
        return encode_sparse(self, x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode, keeping no latents.

        Equal to ``sae(x).reconstruction`` to rounding, and computed by that call where gradients, `torch.func` or a
        compiler need it, or on another device than a CPU. Otherwise only active latents are kept, of a few tokens at a
        time.

        Args:
            x: activations ``[..., d_in]``; computed in the wider of their dtype and the SAE's.

        Returns:
            Reconstruction ``[..., d_out]``.

        Raises:
            ShapeError: if the last axis of `x` is not `d_in` wide.
            LatentIndexError: if only some latents were loaded.
        """
        return reconstruct(self, x)

    # ------------------------------------------------------------------ sites that are read and written
    # Latents of a source are computed from that site's activation alone, and write to the output of the same number
    # and to later ones. Here there is one source and one output; an architecture with several overrides these methods.

    def sources_of(self, rows: Tensor) -> list[int]:
        """Return which source each latent reads, given the latents' rows ``[n]``."""
        return [0] * len(rows)

    def rows_in_source(self, rows: Tensor, source: int) -> Tensor:
        """Return the places of rows ``[n]``, all of one source, among the latents of that source."""
        return rows

    def encode_source(self, x: Tensor, source: int, rows: Tensor | None = None) -> Tensor:
        """Turn one source's activation into its latents.

        Args:
            x: ``[..., d_in]``.
            source: which source it is.
            rows: rows ``[n]`` of the latents to compute, all of this source; None for all that it has.

        Returns:
            Latents ``[..., n]``.
        """
        self.require_encodable()
        latents: Tensor = self._encode(self._normalized(x), rows)
        return latents

    def rows_at(self, rows: Tensor, output: int) -> Tensor:
        """Return what a unit of each latent writes at an output, ``[n, d_out]``; zeros where it does not write."""
        written: Tensor = self.W_dec[rows]
        return written

    def decode_at(self, latents: Sequence[Tensor], output: int, x: Tensor) -> Tensor:
        """Return what is written at one output.

        Args:
            latents: of the sources up to this output, each ``[..., n]``.
            output: which output.
            x: the activation ``[..., d_in]`` of the source that belongs to this output; used where tokens are
                normalised or where there is a skip connection.

        Returns:
            ``[..., d_out]``, in the units of the output's activation.
        """
        written: Tensor = self.decode(latents[0], x)
        return written

    # ------------------------------------------------------------------ training

    def training_loss(
        self,
        x: Tensor,
        *,
        target: Tensor | None = None,
        sparsity_coefficient: float = 0.0,
        sparsity_power: float = 1.0,
        objective: Objective | None = None,
    ) -> TrainingLoss:
        """Return the objective that the architecture is trained with, term by term.

        On a CPU, where few latents are active, the memory of the large gradients is kept for the next step after they
        are cleared; ``functional.cpu.forget(sae.parameters())`` releases it.

        Args:
            x: activations ``[..., d_in]``.
            target: what is to be written, ``[..., d_out]``; `x` itself by default.
            sparsity_coefficient: weight of the sparsity term, in units of a squared error summed over the width.
            sparsity_power: power of the latents in that term, for objectives that anneal it.
            objective: a variant; ``objective_class()`` by default.

        Raises:
            InputError: if the SAE normalises its input, or holds only some of its latents.
            ShapeError: if activations or target are not as wide as the SAE.
        """
        target = x if target is None else target
        require_trainable_input(self, x, target)
        chosen: Objective = self.objective_class() if objective is None else objective
        return chosen.loss(self, x, target, Sparsity(sparsity_coefficient, sparsity_power))

    def forget_statistics(self) -> None:
        """Discard what `record_statistics` recorded, which no longer holds once the weights change."""
        self.record_statistics(torch.zeros_like(self.max_activation), torch.zeros_like(self.mean_activation), 0)

    def training_obstacle(self) -> str:
        """Return why this SAE cannot be trained; empty if it can."""
        return training_obstacle(self.config)

    def constant(self, x: Tensor) -> Tensor:
        """Return what is written when no latent is active, before the normalisation is undone.

        Args:
            x: activations ``[..., d_in]``.

        Returns:
            ``[d_out]``; ``[..., d_out]`` where there is a skip connection.
        """
        written: Tensor = self.b_dec
        return written + self._skipped(x) if self.config.skip_connection else written

    # ------------------------------------------------------------------ what it is made of

    @property
    def W_enc(self) -> Tensor:
        """Encoder ``[d_in, d_sae]``: a view of `W_enc_T`, or of `W_dec` where the two are tied."""
        return self.W_dec.T if self.tied else self.W_enc_T.T

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.config.d_out or self.config.d_in

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what is encoded for one token, ``(d_in,)``; with an axis of sites where several are read."""
        return (self.config.d_in,)

    def latent_indices(self, latents: Sequence[int] | Tensor) -> Tensor:
        """Return the rows of the per-latent tensors that belong to latents, on the SAE's device.

        Args:
            latents: indices, each in ``0 .. d_sae - 1``.

        Returns:
            Rows ``[n]``, int64: the indices themselves, unless only some latents were loaded.

        Raises:
            InputError: if they are not integers, but for example a mask.
            LatentIndexError: naming the first index that is out of range or was not loaded.
        """
        return held_rows(self.config, latents).to(self.b_dec.device, non_blocking=True)

    @torch.no_grad()
    def record_statistics(
        self, max_activation: Tensor, mean_activation: Tensor, tokens: int, *, metrics: FidelityMetrics | None = None
    ) -> None:
        """Record how strongly each latent fires; steering and mean ablation use these values as units.

        Args:
            max_activation: largest value of each latent, ``[d_sae]``.
            mean_activation: mean value of each latent, zeros included, ``[d_sae]``.
            tokens: number of tokens they were measured on.
            metrics: other numbers measured on them, which `attach` compares with; earlier ones are discarded if None.
        """
        self.max_activation.copy_(max_activation)
        self.mean_activation.copy_(mean_activation)
        self.config.record(tokens, metrics)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Unit-norm random decoder rows, the encoder their transpose, everything else zero.

        Written with `transformers.initialization`, which leaves alone what a checkpoint has already filled.
        """
        if module is not self:
            return
        init.copy_(self.W_dec, nn.functional.normalize(torch.randn_like(self.W_dec), dim=-1))
        if not self.tied:
            same = self.W_enc_T.shape == self.W_dec.shape
            rows = self.W_dec.detach() if same else nn.functional.normalize(torch.randn_like(self.W_enc_T), dim=-1)
            init.copy_(self.W_enc_T, rows)
        if self.config.skip_connection:
            init.zeros_(self.W_skip)
        init.zeros_(self.max_activation)
        init.zeros_(self.mean_activation)
        for parameter in self.parameters(recurse=False):
            if parameter.ndim < 2:
                init.zeros_(parameter)

    def get_input_embeddings(self) -> None:  # quantisers ask every model; an SAE has none
        """Return None: an SAE has no embeddings."""

    @classmethod
    def shared_names(cls, config: SAEConfig) -> frozenset[str]:
        """Return the names of the tensors that are not one row per latent: their shape is the same without latents."""
        none_held = copy.deepcopy(config)
        none_held.kept_latents = []
        with torch.device("meta"):
            full, bare = cls(config).state_dict(), cls(none_held).state_dict()
        return frozenset(name for name, tensor in full.items() if tensor.shape == bare[name].shape)


compute_in_widest_dtype(SAEModel)
