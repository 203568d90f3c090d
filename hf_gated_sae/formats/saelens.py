"""SAELens, version 6 and later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..architectures.abs_topk import AbsTopKSAE
from ..architectures.gated import GatedSAE
from ..architectures.jumprelu import JumpReLUSAE
from ..architectures.matching_pursuit import MatchingPursuitSAE
from ..architectures.standard import StandardSAE
from ..architectures.temporal import TemporalSAE
from ..architectures.topk import TopKSAE
from ..errors import CheckpointError, shown
from ..hub import index
from ..hub.location import Location
from ..modeling import SAEModel
from ..modeling.checkpoint import Checkpoint, Tensors
from ..storage import StoredTensor
from ._config_values import flag, integer, mapping, number, one_of
from ._folders import folders_with, mapped_again
from ._folding import fold_decoder_norms, fold_input_scale
from ._saelens_finetuned import FINETUNED, finetuning_step
from ._saelens_sites import SCALER, no_output, normalized, site_fields
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, widths
from .temporal import attention_names, attention_settings, matrix_shape

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

Step = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Kind:
    """How an architecture of SAELens is read.

    Attributes:
        model_class: this library's class.
        vectors: names of its tensors with one number per latent, which are the same in the file.
        transcoder: whether its output is at another site.
        skip: whether it has a skip connection.
        k: whether it selects k latents.
        batch_threshold: whether training selects latents by batch, and the file has one threshold for all latents.
    """

    model_class: type[SAEModel]
    vectors: tuple[str, ...] = ("b_enc",)
    transcoder: bool = False
    skip: bool = False
    k: bool = False
    batch_threshold: bool = False


KINDS = {
    "standard": Kind(StandardSAE),
    "gated": Kind(GatedSAE, ("b_gate", "b_mag", "r_mag")),
    "jumprelu": Kind(JumpReLUSAE, ("b_enc", "threshold")),
    "topk": Kind(TopKSAE, k=True),
    "abstopk": Kind(AbsTopKSAE, k=True),
    "matching_pursuit": Kind(MatchingPursuitSAE, ()),
    "temporal": Kind(TemporalSAE, ()),
    "transcoder": Kind(StandardSAE, transcoder=True),
    "skip_transcoder": Kind(StandardSAE, transcoder=True, skip=True),
    "jumprelu_transcoder": Kind(JumpReLUSAE, ("b_enc", "threshold"), transcoder=True),
    "jumprelu_skip_transcoder": Kind(JumpReLUSAE, ("b_enc", "threshold"), transcoder=True, skip=True),
    "batchtopk": Kind(JumpReLUSAE, batch_threshold=True),
    "matryoshka_batchtopk": Kind(JumpReLUSAE, batch_threshold=True),
}
"""Kinds by the architecture's name in ``cfg.json``. SAELens publishes SAEs trained as BatchTopK as JumpReLU."""


class SAELensFormat(CheckpointFormat):
    """Written by SAELens 6 and later: ``cfg.json`` with an object ``metadata``, and ``sae_weights.safetensors``.

    The weights are ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_out]`` and the architecture's vectors.
    ``sparsity.safetensors`` and ``runner_cfg.json`` beside them are ignored. Checkpoints from the middle of training
    are read, too.

    An SAE trained on scaled activations needs the scale, which ``cfg.json`` does not have: it is read from
    ``activation_scaler.json`` of such a checkpoint or from the index, else loading raises. Where TopK ranks latents
    times the norm of their decoder rows, the norms are folded into the weights.

    Source: decoderesearch/SAELens, version 6.
    """

    name: ClassVar[str] = "saelens"
    files = (WEIGHTS,)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with both files, of any version of SAELens."""
        return folders_with(location, CONFIG, WEIGHTS)

    def claims(self, location: Location) -> bool:
        """Whether the folder has both files, and the configuration has ``metadata``."""
        if location.file is not None or CONFIG not in location or WEIGHTS not in location:
            return False
        return isinstance(location.read_json(CONFIG).get("metadata"), dict)

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, the rest from ``cfg.json`` and, in the middle of training, the scale's file."""
        cfg, where = location.read_json(CONFIG), f"{CONFIG} of {location}"
        kind = KINDS[one_of(cfg, "architecture", where, tuple(KINDS))]
        return described_checkpoint(location, self.name, kind, cfg, mapping(cfg, "metadata", where))

    def examples(self, root: Path) -> list[Example]:
        """Write an SAE of every architecture, normalisation, and kind of folder name."""
        from ._saelens_examples import write_current  # only tests need it

        return write_current(root)


def described_checkpoint(
    location: Location,
    layout: str,
    kind: Kind,
    cfg: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> Checkpoint:
    """Describe an SAE of SAELens from its headers.

    Args:
        location: its folder.
        layout: name of the format.
        kind: its architecture.
        cfg: its configuration, with the key names of version 6.
        metadata: the part of it that describes training.

    Raises:
        CheckpointError: if something is missing, unknown or contradictory.
    """
    where = f"{CONFIG} of {location}"
    facts = index.known_facts(location.repo_id, location.address)
    fields = site_fields(metadata, facts, where, transcoder=kind.transcoder)
    implied = fields.pop("normalization")
    normalization, scale = normalized(cfg, implied, facts, location, where)
    if kind.skip and normalization != implied:
        raise CheckpointError(
            f"{where} has normalize_activations = {shown(cfg.get('normalize_activations'))} for a transcoder "
            "whose skip connection reads the unnormalised input. A skip connection with another input than the "
            "encoder is not supported: it cannot be loaded."
        )
    settings: dict[str, Any] = {"normalization": normalization, **fields}
    # SAELens refuses transcoders that subtract the decoder bias, whose width may differ from the input's.
    settings["apply_b_dec_to_input"] = flag(cfg, "apply_b_dec_to_input", where, not kind.transcoder)
    settings |= {"skip_connection": True} if kind.skip else {}
    settings |= {"k": integer(cfg, "k", where)} if kind.k else {}
    own = _own_settings(kind, cfg, where, scale)
    tuning = finetuning_step(location, WEIGHTS, cfg, where) if kind.vectors else None
    names = _names(kind, is_tied=_is_tied(kind, cfg, where), is_tuned=tuning is not None)
    names |= attention_names(own.get("attention_layers", 0))
    stored = renamed(location.tensors(WEIGHTS), names, f"{WEIGHTS} of {location}")
    if _is_tied(kind, cfg, where):
        stored["W_enc_T"] = mapped_again(stored["W_dec"], location, WEIGHTS)
    settings |= _consistent_widths(stored, cfg, where)
    config = kind.model_class.config_class(**settings, **own)
    arithmetic = [
        *([tuning] if tuning else []),
        *_arithmetic(kind, cfg, where, scale, settings["apply_b_dec_to_input"]),
    ]
    read = [CONFIG, WEIGHTS, *([SCALER] if SCALER in location else [])]
    return Checkpoint(
        kind.model_class,
        config,
        location.origin(layout, read),
        stored,
        frozenset({"b_dec", "W_skip"}),
        partial(_in_sequence, steps=arithmetic),
        unsaid={"site_out": no_output(metadata, where)} if kind.transcoder else {},
    )


def _names(kind: Kind, *, is_tied: bool, is_tuned: bool) -> dict[str, str]:
    """Return the name in the file of each parameter, and of each tensor that is folded into one."""
    same = ["W_dec", "b_dec", *kind.vectors]
    same += ["W_skip"] if kind.skip else []
    same += ["topk_threshold"] if kind.batch_threshold else []
    same += [FINETUNED] if is_tuned else []
    encoder = {} if kind.model_class.tied or is_tied else {"W_enc_T": "W_enc.T"}
    return {name: name for name in same} | encoder


def _own_settings(kind: Kind, cfg: Mapping[str, Any], where: str, scale: float) -> dict[str, Any]:
    """Return the configuration fields that only one architecture has."""
    if kind.model_class is TemporalSAE:
        return {**attention_settings(cfg, where), "scaling_factor": scale}
    if kind.model_class is MatchingPursuitSAE:
        return {
            # At the scale of the pursued vector, which is the unscaled activation here.
            "residual_threshold": float(number(cfg, "residual_threshold", where)) / scale,
            "max_iterations": integer(cfg, "max_iterations", where, None),
            "stop_on_duplicate_support": flag(cfg, "stop_on_duplicate_support", where, True),
        }
    return {}


def _is_tied(kind: Kind, cfg: Mapping[str, Any], where: str) -> bool:
    return kind.model_class is TemporalSAE and flag(cfg, "tied_weights", where)


def _arithmetic(kind: Kind, cfg: Mapping[str, Any], where: str, scale: float, centred: bool) -> list[Step]:
    """Return the steps that turn the stored tensors into the parameters."""
    if kind.model_class is TemporalSAE:
        # SAELens's tied one does not add the bias to the output either, if it does not subtract it.
        return [] if centred or not _is_tied(kind, cfg, where) else [_without_bias]
    if kind.model_class is MatchingPursuitSAE:
        return [partial(_pursuit_bias, scale=scale) if centred else _without_bias]
    steps: list[Step] = [partial(fold_input_scale, scale=scale)] if scale != 1 else []
    if flag(cfg, "rescale_acts_by_decoder_norm", where, False) and (kind.k or kind.batch_threshold):
        # First, as latents are ranked by the norms of the trained decoder's rows, at the scale of the scaled output.
        steps.insert(0, fold_decoder_norms)
    return [*steps, _threshold_for_all] if kind.batch_threshold else steps


def _in_sequence(tensors: Tensors, steps: Sequence[Step]) -> Tensors:
    for step in steps:
        tensors = step(tensors)
    return tensors


def _threshold_for_all(tensors: Tensors) -> Tensors:
    """Give every latent the same threshold, which was averaged in float64."""
    threshold = tensors.pop("topk_threshold").float()
    tensors["threshold"] = threshold.expand(len(tensors["W_dec"])).clone()
    return tensors


def _without_bias(tensors: Tensors) -> Tensors:
    """Set a bias to zero that SAELens neither subtracts nor adds."""
    tensors["b_dec"] = tensors["b_dec"] * 0
    return tensors


def _pursuit_bias(tensors: Tensors, scale: float) -> Tensors:
    """Divide the bias by the scale of the activations; tied decoder rows stay, and latents scale with the input."""
    tensors["b_dec"] = tensors["b_dec"] / scale
    return tensors


def _consistent_widths(stored: Mapping[str, StoredTensor], cfg: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the widths of the tensors.

    Raises:
        CheckpointError: if the configuration states other ones.
    """
    if "W_enc_T" in stored:
        d_sae, d_in, d_out = widths(stored)
    else:
        d_sae, d_in = matrix_shape(stored["W_dec"].shape, where)
        d_out = d_in
    found = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out}
    for name, width in found.items():
        stated = integer(cfg, name, where, width)
        if stated != width:
            raise CheckpointError(
                f"{where} has {name} = {stated}, and the tensors beside it have {width}: the two files are not of the "
                "same SAE. Fetch or save both again."
            )
    return found
