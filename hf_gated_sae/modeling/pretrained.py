"""Loading, saving and publishing of SAEs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..hub.origin import Origin
from ..registry import LateBound
from ..storage.atomic_write import written_together
from .architecture_registry import architectures
from .config import SAEConfig
from .description import describe_checkpoint
from .loading import from_tensors, load, named_place, open_checkpoint, require_class
from .transformers_settings import quiet_transformers

_push_to_hub = LateBound("hf_gated_sae.publishing.push", "push_to_hub")


class PretrainedSAE(PreTrainedModel):
    """A `PreTrainedModel` that loads strictly, from every known layout, and saves all files or none."""

    config: SAEConfig
    config_class = SAEConfig
    base_model_prefix = ""
    main_input_name = "x"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the architecture with our registry and with transformers' Auto classes."""
        super().__init_subclass__(**kwargs)
        config_class = cls.__dict__.get("config_class")
        inherited = {getattr(base, "config_class", None) for base in cls.__bases__}
        if config_class not in (None, SAEConfig) and config_class not in inherited:  # FSDP2 makes subclasses, too
            architectures.register(config_class.model_type.removesuffix("_sae"), cls)
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            AutoModel.register(config_class, cls, exist_ok=True)

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
            architecture: for a home-made checkpoint, such as ``"standard"``: tensors in no known layout, in
                safetensors, npz or torch files. Widths are read from the shapes; ``k=``, ``site=`` and other keys of
                the configuration are given by name.
            names: for a home-made checkpoint, its name for each of our tensors, unless it is a common one:
                ``{"W_enc": "encode.matrix"}``. A matrix is transposed if its shape requires it; for a square one, the
                ``_T`` of ``{"W_enc_T": "encode.matrix"}`` says that one row is one latent (``"encode.matrix.T"``: one
                column is). None means that there is no such vector: zeros.
            ignore: for a home-made checkpoint, tensors to leave out, perhaps with ``*``.
            output_loading_info: also return transformers' loading info.
            **kwargs: keys of the configuration, and the arguments of any transformers model: ``revision``, ``token``,
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
            require_class(cls, checkpoint.model_class, f"checkpoint {checkpoint}")
            model, info = load(checkpoint, config, {**kwargs, "latents": latents})
        return (model, info) if output_loading_info else model

    _origin: Origin | None = None

    @property
    def checkpoint(self) -> Origin | None:
        """Where this SAE was loaded from, with the commit; None for one that was built or trained here."""
        return self._origin

    def save_pretrained(  # transformers' other arguments go through kwargs
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``; either all files are replaced or none.

        Args:
            save_directory: folder, created if need be.
            push_to_hub: also publish, with ``repo_id=`` among `kwargs` (the folder's name by default).
            **kwargs: the arguments of any transformers model: ``max_shard_size``, ``state_dict``, ``variant`` ...
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
