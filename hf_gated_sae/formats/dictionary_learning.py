"""The ``ae.pt`` of dictionary_learning (Marks, Karvonen and Mueller), which SAEBench and others train with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..architectures.batch_topk import BatchTopKSAE
from ..architectures.gated import GatedSAE
from ..architectures.jumprelu import JumpReLUSAE
from ..architectures.standard import StandardSAE
from ..architectures.topk import TopKSAE
from ..errors import CheckpointError, shown
from ..hub.index import known_facts
from ..hub.location import Location
from ..hub.model_names import repository_of
from ..modeling import SAEModel
from ..modeling.checkpoint import Checkpoint, as_stored
from ..storage import StoredTensor
from . import _dictionary_learning_sites as sites
from ._config_values import mapping, number, text
from ._dictionary_learning_examples import write_examples
from ._folding import PER_LATENT_SCALED, decoder_norms, fold_decoder_norms
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, selected_file, widths

CONFIG = "config.json"
FILE = "ae.pt"
_FILE = re.compile(r"ae(_\d+)?\.pt")
_CHECKPOINTS = "checkpoints"
BACKUP = "ae"

_LINEAR = {"W_enc_T": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
_PARAMETERS = {"W_enc_T": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


@dataclass(frozen=True)
class _Kind:
    """How one of the library's classes is read.

    Attributes:
        model_class: this library's class.
        names: for each parameter the name in the file.
        subtracts_bias: whether the decoder bias is subtracted from the input.
        besides: tensors that are not weights: settings, or thresholds that encoding does not use.
        unit_decoder: whether the library's loader scales decoder rows to unit norm.
    """

    model_class: type[SAEModel]
    names: Mapping[str, str]
    subtracts_bias: bool = True
    besides: tuple[str, ...] = ()
    unit_decoder: bool = False


KINDS = {
    "AutoEncoder": _Kind(StandardSAE, {**_LINEAR, "b_dec": "bias"}, unit_decoder=True),
    "AutoEncoderNew": _Kind(StandardSAE, {**_LINEAR, "b_dec": "decoder.bias"}, subtracts_bias=False),
    "GatedAutoEncoder": _Kind(
        GatedSAE,
        {
            "W_enc_T": "encoder.weight",
            "W_dec": "decoder.weight.T",
            "b_dec": "decoder_bias",
            "b_gate": "gate_bias",
            "b_mag": "mag_bias",
            "r_mag": "r_mag",
        },
    ),
    "AutoEncoderTopK": _Kind(TopKSAE, {**_LINEAR, "b_dec": "b_dec"}, besides=("k", "threshold")),
    "BatchTopKSAE": _Kind(BatchTopKSAE, {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}, besides=("k",)),
    "MatryoshkaBatchTopKSAE": _Kind(
        BatchTopKSAE, {**_PARAMETERS, "threshold": "threshold"}, besides=("k", "group_sizes")
    ),
    "JumpReluAutoEncoder": _Kind(JumpReLUSAE, {**_PARAMETERS, "threshold": "threshold"}, subtracts_bias=False),
}
"""The library's classes, as ``trainer.dict_class`` names them."""


class DictionaryLearningFormat(CheckpointFormat):
    """Written by dictionary_learning: ``trainer_i/ae.pt`` with ``config.json``, and ``checkpoints/ae_step.pt`` below.

    ``trainer`` of the configuration names the class. Latents are those of the library's own loader. For `AutoEncoder`
    it scales decoder rows to unit norm (``normalize_decoder=True``), so its latents are ``|W_dec_i|`` times those of
    the stored weights; all other classes use the stored weights. `AutoEncoderTopK` ignores its threshold and selects
    the k largest. `BatchTopKSAE` and `MatryoshkaBatchTopKSAE`, the latter with all groups, use their threshold; it is
    -1, which any positive value exceeds, until training sets it. The library folds training's constant input scale
    into the biases of saved SAEs, but not into backups for resuming, where it is folded here. An ``ae.pt`` may be such
    a backup.

    Source: saprmarks/dictionary_learning, ``dictionary.py``, ``training.py``, ``utils.load_dictionary``.
    """

    name: ClassVar[str] = "dictionary_learning"
    files = ("ae*.pt",)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with ``ae.pt`` and ``config.json``, and the ``ae_step.pt`` files below such folders."""
        found = []
        for path in location.files:
            folder, _, file = path.rpartition("/")
            if _FILE.fullmatch(file) and _joined(_config_path(folder), CONFIG) in location:
                found.append(folder if file == FILE else path)
        return found

    def claims(self, location: Location) -> bool:
        """Whether there is an ``ae.pt`` (or the address is one of a training step), and the configuration fits."""
        if selected_file(location, _FILE) is None:
            return False
        config_folder = _config_folder(location)
        if CONFIG not in config_folder:
            return False
        trainer = config_folder.read_json(CONFIG).get("trainer")
        return isinstance(trainer, dict) and "dict_class" in trainer

    def near_miss(self, location: Location) -> str | None:
        """Return why an ``ae.pt`` without a configuration that names its class is not claimed."""
        if FILE not in location:
            return None
        return (
            f"Its {FILE} looks like dictionary_learning's, but no {CONFIG} beside it names a dict_class in its "
            "trainer: add the one that the training run wrote."
        )

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read the class from the configuration, and names and shapes from the header.

        Raises:
            CheckpointError: if the class is unknown, or the file does not have its tensors.
        """
        file = selected_file(location, _FILE)
        assert file is not None  # `claims` has found it
        config_folder = _config_folder(location)
        where = f"{CONFIG} of {config_folder}"
        config = config_folder.read_json(CONFIG)
        trainer = mapping(config, "trainer", where)
        name = text(trainer, "dict_class", where)
        if name not in KINDS:
            raise CheckpointError(f"{where} has dict_class {name!r}; expected one of {', '.join(KINDS)}.")
        kind = KINDS[name]
        held, scale = _weights(location.content(file), f"{file} of {location}")
        stored = _tensors(kind, held, f"{file} of {location}")
        d_sae, d_in, d_out = widths(stored)
        fields = sites.site_fields(
            trainer, mapping(config, "buffer", where, {}), f"{location.repo_id}/{location.address}", where
        )
        settings = {"k": _k(held, trainer, where)} if "k" in kind.besides else {}
        made = kind.model_class.config_class(
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_out,
            apply_b_dec_to_input=kind.subtracts_bias,
            base_model=repository_of(text(trainer, "lm_name", where, None)) or _known_model(location),
            **fields,
            **settings,
        )
        finish = partial(_finished, scale=scale, unit_decoder=kind.unit_decoder)
        needs_work = kind.unit_decoder or scale != 1.0
        return Checkpoint(
            kind.model_class,
            made,
            location.origin(self.name, [file]),
            stored,
            finish=finish if needs_work else as_stored,
        )

    def examples(self, root: Path) -> list[Example]:
        """Write one SAE of every class, a backup, and two steps of one training run."""
        return write_examples(root)


def _config_folder(location: Location) -> Location:
    """Return the folder that has the configuration: that of the file, or the one above ``checkpoints``."""
    return location.at(_config_path(location.subfolder))


def _known_model(location: Location) -> str | None:
    return known_facts(location.repo_id, location.address).get("base_model")


def _config_path(folder: str) -> str:
    above, _, own = folder.rpartition("/")
    return above if own == _CHECKPOINTS else folder


def _joined(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _weights(content: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], float]:
    """Return the named tensors of a file, and the factor by which its biases must be multiplied.

    A backup has them in ``ae``, at the scale of training, where activations are divided by ``norm_factor``.
    """
    if isinstance(content.get(BACKUP), dict):
        scale = number(content, "norm_factor", where, 1.0)
        if scale <= 0:
            raise CheckpointError(f"{where} has norm_factor = {scale}; expected a positive number.")
        return content[BACKUP], float(scale)
    return content, 1.0


def _tensors(kind: _Kind, held: Mapping[str, Any], where: str) -> dict[str, StoredTensor]:
    """Return the tensors by parameter name.

    Raises:
        CheckpointError: naming missing and unknown tensors.
    """
    if kind.model_class is BatchTopKSAE and "threshold" not in held:
        raise CheckpointError(
            f"{where} holds a BatchTopK SAE without a threshold, as versions before December 2024 saved it: its "
            "latents are only defined for a whole batch. Measure the mean over batches of the smallest of the k * "
            "tokens largest latents, and add it to the file as the scalar 'threshold'."
        )
    return renamed(held, kind.names, where, besides=kind.besides)


def _k(held: Mapping[str, Any], trainer: Mapping[str, Any], where: str) -> int:
    """Return the number of selected latents, from the file or, for old ones, the configuration.

    Raises:
        CheckpointError: if neither has it, they disagree, or it is not a whole number.
    """
    stated = [value for value in (held.get("k"), trainer.get("k")) if value is not None]
    counts = set()
    for value in stated:
        if isinstance(value, StoredTensor) and math.prod(value.shape) == 1 and not value.dtype.is_floating_point:
            value = int(value.small())
        if type(value) is not int:
            raise CheckpointError(f"{where}, or the file beside it, has k = {shown(value, 60)}; expected a number.")
        counts.add(value)
    if len(counts) != 1:
        raise CheckpointError(
            f"{where} and the file beside it have k = {', '.join(map(str, sorted(counts))) or 'nothing'}; expected "
            "one number: fetch both again."
        )
    return counts.pop()


def _finished(tensors: dict[str, Tensor], *, scale: float, unit_decoder: bool) -> dict[str, Tensor]:
    """Fold training's input scale into the biases, and the decoder's norms into the encoder.

    Multiplying biases and thresholds by `scale` makes an SAE for ``x / scale`` one for `x`, with latents `scale` times
    as large, as the library does when it saves a finished training run.
    """
    if scale != 1.0:
        for name in ("b_dec", *PER_LATENT_SCALED):
            if name in tensors:
                value = tensors[name]
                # A scalar threshold of -1, which means that there is none, is not scaled.
                tensors[name] = torch.where(value < 0, value, value * scale) if value.ndim == 0 else value * scale
    if unit_decoder:
        norms = decoder_norms(tensors["W_dec"])
        fold_decoder_norms(tensors, torch.where(norms == 0, torch.ones_like(norms), norms))
    return tensors
