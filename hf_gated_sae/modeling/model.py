"""The base class of every SAE."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..errors import CheckpointError, InputError, LatentIndexError, ShapeError
from ..functional.metrics import FidelityMetrics
from ..functional.normalization import NORMALIZATIONS, TokenNormalization
from ..functional.sparse_decode import decode
from ..functional.sparse_latents import SparseLatents, latent_numbers
from ..hub.origin import Origin
from ..registry import LateBound, Registry
from ..storage.atomic_write import written_together
from .building import assembled, require_complete, require_finite
from .config import SAEConfig
from .description import describe_checkpoint
from .learning import Learning
from .loading import from_tensors, load, named_place, open_checkpoint
from .output import SAEOutput
from .sparse_encoding import Sparse
from .traits import ArchitectureTraits
from .transformers_settings import quiet_transformers
from .wiring import Wiring

architectures: Registry[type[SAEModel]] = Registry("architecture", "hf_gated_sae.architectures")
_push_to_hub = LateBound("hf_gated_sae.publishing.push", "push_to_hub")


class SAEModel(ArchitectureTraits, Wiring, Learning, Sparse, PreTrainedModel):
    """An SAE: ``latents = encode(x)``, ``reconstruction = latents @ W_dec + b_dec``.

    A new architecture is one file in `architectures/`: a configuration class, and a subclass of this one that names
    the configuration as its ``config_class``, adds its parameters, names what it is trained with as its
    ``objective_class``, and defines `_encode`, or `_activate` and `_cut` where each latent is a function of its own
    projection.

    In memory and on disk the encoder is one row per latent (`W_enc_T`), so that a few latents are a few contiguous
    byte ranges of every tensor; `W_enc` is the usual orientation of the same memory.

    Attributes:
        W_enc_T: encoder ``[d_sae, d_in]``; not of a `tied` architecture.
        W_dec: decoder ``[d_sae, d_out]``.
        b_dec: decoder bias ``[d_out]``.
        W_skip: ``[d_out, d_in]``; only of a transcoder with ``config.skip_connection``.
        max_activation: largest value of each latent on the recorded text, ``[d_sae]`` float32.
        mean_activation: mean value of each latent on the recorded text, zeros included, ``[d_sae]`` float32.
            Both mean something only if ``config.recorded_tokens`` is not 0; `record_statistics` fills them.
    """

    config: SAEConfig
    config_class = SAEConfig
    base_model_prefix = ""
    main_input_name = "x"
    _keep_in_fp32_modules_strict = ["max_activation", "mean_activation"]

    W_enc_T: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    max_activation: Tensor
    mean_activation: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the architecture with our registry and with transformers' Auto classes."""
        super().__init_subclass__(**kwargs)
        config_class = cls.__dict__.get("config_class")
        inherited = {getattr(base, "config_class", None) for base in cls.__bases__}
        if config_class not in (None, SAEConfig) and config_class not in inherited:  # FSDP2 makes subclasses, too
            architectures.register(config_class.model_type.removesuffix("_sae"), cls)
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            AutoModel.register(config_class, cls, exist_ok=True)

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
            InputError: if the indices are anything else than integers, such as a mask.
            LatentIndexError: if an index is outside ``0 .. d_sae - 1``.
        """
        self.require_encodable()
        return self._encode(self._normalized(x), None if latents is None else self.latent_indices(latents))

    def require_encodable(self) -> None:
        """Raise unless everything is held that encoding needs.

        Raises:
            LatentIndexError: if only some latents were loaded, and whether they are on depends on the others.
        """
        if not self.elementwise and self.config.kept_latents is not None:
            raise LatentIndexError(
                f"Whether a latent of a {type(self).__name__} is on depends on all of them, and only "
                f"{self.config.rows} of {self.config.d_sae} were loaded: load it without latents=."
            )

    def _normalized(self, x: Tensor) -> Tensor:
        """Return `x` in the SAE's own frame, after checking its width."""
        if x.shape[-1:] != (self.config.d_in,):
            raise ShapeError(
                f"Given activations {list(x.shape)}, but this SAE reads d_in = {self.config.d_in}: expected "
                f"[..., {self.config.d_in}]. Check that site {self.config.site!r} of {self.config.base_model!r} is "
                "meant."
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
                f"Only {self.config.rows} of {self.config.d_sae} latents were loaded, which do not make up a "
                "reconstruction: load the SAE without latents=."
            )
        if latents.shape[-1:] != (self.config.d_sae,):
            raise ShapeError(f"Given latents {list(latents.shape)}, expected [..., d_sae = {self.config.d_sae}].")
        written = self._decode(latents)
        if self.config.skip_connection:
            written = written + self._skipped(self._needed(x))
        token_normalization = self._output_normalization(x)
        return written if token_normalization is None else token_normalization.undo(written)

    def _decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Decode in the SAE's own frame."""
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
        """Return what one unit that the decoder writes is worth at each token of `x`, ``[..., 1]``; None for 1."""
        token_normalization = self._output_normalization(x)
        return None if token_normalization is None else token_normalization.scale

    def _output_normalization(self, x: Tensor | None) -> TokenNormalization | None:
        """Return the frame in which the decoder writes: that of the input, unless the output lies elsewhere."""
        if self.config.normalization == "none" or self.config.is_transcoder:
            return None
        return self.token_normalization(self._needed(x))

    def _needed(self, x: Tensor | None) -> Tensor:
        """Return the input that decoding needs.

        Raises:
            InputError: if there is none.
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
            InputError: if they are anything else than integers, such as a mask.
            LatentIndexError: naming the first index that is out of range or was not loaded.
        """
        device, d_sae = self.b_dec.device, self.config.d_sae
        indices = latent_numbers(latents)  # a list is checked without a device
        lowest, highest = indices.aminmax() if indices.numel() else (0, 0)
        if lowest < 0 or highest >= d_sae:
            outside = indices[(indices < 0) | (indices >= d_sae)]
            raise LatentIndexError(
                f"Latent {int(outside[0])} does not exist: this SAE has d_sae = {d_sae} latents, 0 .. {d_sae - 1}."
            )
        held = self.config.kept_latents
        if held is None:
            return indices.to(device, non_blocking=True)
        row_of = {latent: row for row, latent in enumerate(held)}
        if missing := [latent for latent in indices.tolist() if latent not in row_of]:
            raise LatentIndexError(
                f"Latent {missing[0]} was not loaded: this SAE holds {len(held)} of its {self.config.d_sae} latents. "
                f"Load it with latents=[..., {missing[0]}]."
            )
        return torch.tensor([row_of[latent] for latent in indices.tolist()], device=device, dtype=torch.int64)

    @torch.no_grad()
    def record_statistics(
        self, max_activation: Tensor, mean_activation: Tensor, tokens: int, *, metrics: FidelityMetrics | None = None
    ) -> None:
        """Remember how strongly each latent fires; steering and mean ablation measure in these units.

        Args:
            max_activation: largest value of each latent, ``[d_sae]``.
            mean_activation: mean value of each latent, zeros included, ``[d_sae]``.
            tokens: number of tokens they were measured on.
            metrics: what else was measured there, with which `attach` compares; forgotten if None.
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
        """Return the names of the tensors that are not one row per latent: those that stay when no latent is held."""
        none_held = copy.deepcopy(config)
        none_held.kept_latents = []
        with torch.device("meta"):
            full, bare = cls(config).state_dict(), cls(none_held).state_dict()
        return frozenset(name for name, tensor in full.items() if tensor.shape == bare[name].shape)

    # ------------------------------------------------------------------ disk and Hub

    @classmethod
    def from_pretrained(  # the second argument is the subfolder, as users of SAEs expect
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        subfolder: str = "",
        *,
        latents: Sequence[int] | None = None,
        config: SAEConfig | None = None,
        format: str | None = None,
        architecture: str | None = None,
        names: Mapping[str, str | None] | None = None,
        ignore: str | Sequence[str] = (),
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an SAE from a folder or the Hub; the architecture is read from the checkpoint.

        Args:
            pretrained_model_name_or_path: repository id, folder, file, Neuronpedia name, or SAELens's ``release=``;
                None to build one from ``state_dict=`` and either `config`, or `architecture` and `names`.
            subfolder: folder (or file) of the SAE inside the repository, or SAELens's ``sae_id=``.
            latents: read only these latents, a few rows of every tensor, from disk or over HTTP range requests. The
                SAE keeps their numbers and acts in interventions on them exactly as the full one does.
            config: use this configuration instead of the stored one.
            format: name of the layout, where several share a folder, such as ``"native"``.
            architecture: of a home-made checkpoint, such as ``"standard"``: tensors in no known layout, in
                safetensors, npz or torch files. Widths are read from the shapes; ``k=``, ``site=`` and other keys of
                the configuration are given by name.
            names: of a home-made checkpoint, its name of each tensor of ours, where it is not a usual one:
                ``{"W_enc": "encode.matrix"}``. A matrix is transposed as its shape demands; of a square one, the
                ``_T`` of ``{"W_enc_T": "encode.matrix"}`` says that one row is one latent (``"encode.matrix.T"``: one
                column is). None means that there is no such vector: zeros.
            ignore: of a home-made checkpoint, tensors to leave out, perhaps with ``*``.
            output_loading_info: also return transformers' loading info.
            **kwargs: keys of the configuration, and as for any transformers model: ``revision``, ``token``,
                ``cache_dir``, ``local_files_only``, ``dtype``, ``device_map``, ``state_dict`` ...

        Returns:
            The SAE in evaluation mode, of the checkpoint's class.

        Raises:
            CheckpointError: if the checkpoint is of another class, truncated, or has tensors that are missing, extra,
                of the wrong shape or not finite.
            LatentIndexError: if one of `latents` does not exist.
            MissingFileError: if there is no such folder, repository, revision or file.
        """
        described = describe_checkpoint(architecture, names, ignore, kwargs)
        place, subfolder = named_place(pretrained_model_name_or_path, subfolder, kwargs)
        if place is None:
            model, info = from_tensors(cls, config, described, kwargs)
        else:
            checkpoint = open_checkpoint(place, subfolder, format=format, description=described, **kwargs)
            cls._require_class(checkpoint.model_class, f"checkpoint {checkpoint}")
            model, info = load(checkpoint, config, {**kwargs, "latents": latents})
        return (model, info) if output_loading_info else model

    @classmethod
    def _of_architecture(cls, config: SAEConfig) -> type[SAEModel]:
        """Return the class of a configuration that the user gave."""
        model_class = architectures[config.architecture]
        cls._require_class(model_class, "given configuration")
        return model_class

    @classmethod
    def _require_class(cls, found: type[SAEModel], what: str) -> None:
        """Raise unless what was found is of the class that was asked for.

        Raises:
            CheckpointError: naming both.
        """
        if not issubclass(found, cls):
            raise CheckpointError(
                f"The {what} is a {found.__name__}, not a {cls.__name__}: load it with {found.__name__}."
                "from_pretrained or SAEModel.from_pretrained."
            )

    @classmethod
    def _load_strictly(cls, where: str, arguments: dict[str, Any]) -> tuple[SAEModel, dict[str, Any]]:
        """Build it around the tensors, and raise for all that transformers would only have warned of.

        transformers itself is asked for what it alone can do, such as quantising or dispatching; it first prepares for
        the checkpoints of every model that it knows.
        """
        if set(arguments) <= {"config", "state_dict", "dtype", "torch_dtype"}:
            model, info = assembled(cls, where, **arguments)
        else:
            with quiet_transformers():
                loaded: Any = super().from_pretrained(
                    None, output_loading_info=True, **{**arguments, "ignore_mismatched_sizes": True}
                )
            model, info = loaded
            require_complete(where, info, list(model.state_dict()))
        require_finite(where, model)
        return model, info

    _checkpoint: Origin | None = None

    @property
    def checkpoint(self) -> Origin | None:
        """Where this SAE was loaded from, with the commit; None for one that was built or trained here."""
        return self._checkpoint

    def save_pretrained(  # what else there is goes through kwargs
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``; either all files are replaced or none.

        Args:
            save_directory: folder, created if need be.
            push_to_hub: also publish, with ``repo_id=`` among `kwargs` (the folder's name by default).
            **kwargs: as for any transformers model: ``max_shard_size``, ``state_dict``, ``variant`` ...
        """
        publish = {key: kwargs.pop(key) for key in _PUBLISH_ARGUMENTS if key in kwargs}
        with written_together(Path(save_directory)) as staging, quiet_transformers():
            super().save_pretrained(staging, **kwargs)
            for weights in staging.glob("*.safetensors"):  # safetensors makes them readable by their owner only
                shutil.copymode(staging / "config.json", weights)
        if push_to_hub:
            self.push_to_hub(publish.pop("repo_id", Path(save_directory).name), **publish)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish to the Hub in one commit, with a model card; see `hf_gated_sae.publishing.push_to_hub`."""
        return _push_to_hub(self, repo_id, **kwargs)


_PUBLISH_ARGUMENTS = (
    *("repo_id", "subfolder", "private", "create_pr", "revision", "token"),
    *("commit_message", "commit_description"),
)
