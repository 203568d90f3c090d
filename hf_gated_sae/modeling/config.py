"""The part of a configuration that every SAE has."""

from __future__ import annotations

import functools
import math
import sys
import types
import typing
from dataclasses import MISSING, fields
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PreTrainedConfig

from ..errors import InputError, SAEError, did_you_mean, shown, unknown_name
from ..functional.metrics import FidelityMetrics
from ..functional.normalization import NORMALIZATIONS

# Keys that transformers itself writes to config.json or passes through while loading.
_TRANSFORMERS_KEYS = frozenset(
    {"model_type", "name_or_path", "torch_dtype", "attn_implementation", "experts_implementation", "_commit_hash"}
    | {"_name_or_path", "output_attentions"}  # in a configuration's to_dict()
)
_TRANSFORMERS_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("transformers_version", "name_or_path", "_name_or_path", "_commit_hash", "problem_type"), (str,)),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict", "is_encoder_decoder"), (bool,)),
    **dict.fromkeys(("id2label", "label2id"), (dict,)),
    **dict.fromkeys(("dtype", "torch_dtype"), (str, torch.dtype)),
    "architectures": (list,),
    "chunk_size_feed_forward": (int,),
}
"""Types of what transformers writes under its own keys; other values would fail inside transformers, or much later."""
LARGEST_WIDTH = 2**31 - 1
LARGEST_MATRIX = 2**50  # anything larger is a mistake, and torch could not even represent its size


@strict
class SAEConfig(PreTrainedConfig):
    """Shape, place and conventions of an SAE.

    Attributes:
        d_in: width of the activations that the encoder reads.
        d_sae: number of latents.
        d_out: width of what the decoder writes; `d_in` unless the SAE is a transcoder.
        site: where in the base model the SAE belongs, such as ``"resid_post.12"`` or ``"model.layers.12.output"``,
            perhaps with transforms, ``"resid_post.12|center"``, which come before `normalization`.
        site_out: for a transcoder, where its output belongs; None for an SAE, which writes where it reads.
        base_model: repository id (or folder) of the model whose activations it was trained on.
        base_model_revision: commit of that model.
        apply_b_dec_to_input: whether the decoder bias is subtracted from the input before encoding.
        skip_connection: whether a transcoder also adds ``x @ W_skip.T``.
        normalization: what is done to each token before encoding: ``"none"``, ``"center"``, ``"layer_norm"``,
            ``"unit_norm"``, ``"rms_norm"`` or ``"standardize"``, see `functional.normalization`. An SAE undoes it
            after decoding; a transcoder, whose output lies elsewhere, does not.
        normalization_eps: added to the mean square in ``"rms_norm"`` and ``"standardize"``.
        trained_on_bos: whether the beginning-of-sequence token was among the training activations; None if unknown.
        kept_latents: the latents that are held, by their index in the full SAE; None for all of them.
        recorded_tokens: number of tokens on which `max_activation` and `mean_activation` were measured; 0 if never.
        recorded_fvu: fraction of variance unexplained there; None if it was not measured.
        recorded_l0: mean number of non-zero latents per token there; None if it was not measured.
        recorded_norm: root mean square of ``|x - mean x|`` of the activations there; None if it was not measured.
        special_token_ids: ids of the tokens whose activations were left out there and in training; None if unknown.
        norm_limit: activations with a larger norm at the site that is read were left out there and in training, see
            `functional.outliers`; None if none were, or if that is unknown.
        norm_limit_out: for a transcoder, the same at the site that is written; an SAE has one limit.
    """

    # transformers would otherwise build a default instance, and a width has no default.
    has_no_defaults_at_init: ClassVar[bool] = True

    d_in: int
    d_sae: int
    d_out: int | None = None
    site: str | None = None
    site_out: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    apply_b_dec_to_input: bool = True
    skip_connection: bool = False
    normalization: str = "none"
    normalization_eps: float = 1e-6
    trained_on_bos: bool | None = None
    kept_latents: list[int] | None = None
    recorded_tokens: int = 0
    recorded_fvu: float | None = None
    recorded_l0: float | None = None
    recorded_norm: float | None = None
    special_token_ids: list[int] | None = None
    norm_limit: float | None = None
    norm_limit_out: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill derived values and reject keys that no field has."""
        known = set(self.__dataclass_fields__)
        unknown = sorted(set(kwargs) - known - _TRANSFORMERS_KEYS)
        if unknown:
            raise InputError(
                f"{type(self).__name__} has no key {', '.join(map(repr, unknown))}.{did_you_mean(unknown[0], known)} "
                "Remove it, or install the version of hf-gated-sae that wrote this configuration."
            )
        self._check_types()
        for dtype in (self.dtype, kwargs.get("torch_dtype")):  # transformers looks the name up in torch
            if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise InputError(f"dtype is {dtype!r}, expected one of torch's, such as 'float32' or 'bfloat16'.")
        if self.d_out is None:
            self.d_out = self.d_in
        super().__post_init__(**kwargs)
        try:
            self.validate()
        except StrictDataclassClassValidationError as error:  # hides our own error, and is not a ValueError
            raise (error.__cause__ or error) from None

    def _check_types(self) -> None:
        """Check the fields' types; the strict dataclass does not read annotations that are strings."""
        for name, expected in self.own_fields().items():
            value = getattr(self, name)
            if type(value) is int and float in expected and int not in expected:
                setattr(self, name, float(value))  # JSON written by hand: 1 for 1.0
            elif type(value) not in expected:
                wanted = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in expected)
                raise InputError(f"{name} is {value!r} ({type(value).__name__}), expected {wanted}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from the content of ``config.json``.

        Args:
            config_dict: the content.
            **kwargs: values that replace stored ones, and transformers' own arguments.

        Raises:
            InputError: if a key is missing or unknown, or a value cannot be used.
        """
        missing = [name for name in _required_fields(cls) if name not in config_dict]
        if missing:
            raise InputError(
                f"{cls.__name__} lacks {', '.join(missing)}; expected at least {', '.join(_required_fields(cls))}."
            )
        for key in ("attn_implementation", "experts_implementation"):  # a repository id here runs code from the Hub
            if config_dict.get(key) not in (None, "eager"):
                raise InputError(
                    f"{key} is {shown(config_dict[key])}, expected none: an SAE does not use it, so remove it."
                )
        for key, kinds in _TRANSFORMERS_TYPES.items():
            value = config_dict.get(key)
            several = value if isinstance(value, list) else []
            if not isinstance(value, (*kinds, types.NoneType)) or not all(isinstance(name, str) for name in several):
                raise InputError(f"{key} is {shown(value)}, which transformers never writes: remove it.")
        try:
            return super().from_dict(config_dict, **kwargs)
        except (TypeError, AttributeError, LookupError, ArithmeticError, ValueError) as error:
            if isinstance(error, SAEError):
                raise
            raise InputError(f"transformers cannot use the configuration: {shown(str(error), 200)}.") from error

    @classmethod
    @functools.cache
    def own_fields(cls) -> dict[str, tuple[type, ...]]:
        """Return the fields that an SAE adds to those of transformers, with the types that each may have.

        A generic type, such as ``list[int]``, is given by its origin.
        """
        names = {field.name for field in fields(cls)}
        found = {}
        for owner in reversed(cls.__mro__):
            if issubclass(owner, SAEConfig):
                own = {name: hint for name, hint in owner.__annotations__.items() if name in names}
                # One class at a time: the whole chain holds names that transformers imports for type checkers only.
                scope = vars(sys.modules[owner.__module__])
                hints = typing.get_type_hints(types.SimpleNamespace(__annotations__=own), scope)
                for name, hint in hints.items():
                    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
                    options = typing.get_args(hint) if is_union else (hint,)
                    found[name] = tuple(typing.get_origin(option) or option for option in options)
        return found

    @property
    def architecture(self) -> str:
        """Short name of the architecture, such as ``"gated"``."""
        return str(self.model_type).removesuffix("_sae")

    @property
    def rows(self) -> int:
        """Number of latents that are held: rows of every per-latent tensor."""
        return self.d_sae if self.kept_latents is None else len(self.kept_latents)

    @property
    def is_transcoder(self) -> bool:
        """Whether the output belongs to another site than the input."""
        return self.site_out is not None and self.site_out != self.site

    @property
    def sites_read(self) -> list[str]:
        """Sites that are read: `site`, or all of an architecture that reads several; empty if unknown."""
        several = getattr(self, "sites", None)
        return list(several or ([self.site] if self.site else []))

    @property
    def sites_written(self) -> list[str]:
        """Sites that are written: those that are read, unless the SAE is a transcoder."""
        several = getattr(self, "sites_out", None)
        return list(several or ([self.site_out] if self.site_out else self.sites_read))

    def record(self, tokens: int, metrics: FidelityMetrics | None) -> None:
        """Record what was measured.

        Args:
            tokens: number of tokens.
            metrics: the numbers; None if only the latents' statistics are known.
        """
        self.recorded_tokens = tokens
        numbers = [math.nan] * 3 if metrics is None else [metrics.fvu, metrics.l0, metrics.centred_norm]
        known = [number if math.isfinite(number) else None for number in numbers]  # JSON has no NaN
        self.recorded_fvu, self.recorded_l0, self.recorded_norm = known

    def validate_normalization(self) -> None:
        """Check that the normalisation is known."""
        if self.normalization != "none" and self.normalization not in NORMALIZATIONS:
            raise unknown_name("normalization", self.normalization, ["none", *NORMALIZATIONS], error=InputError)

    def validate_kept_latents(self) -> None:
        """Check that the held latents exist, each once."""
        if self.kept_latents is None:
            return
        whole = all(type(latent) is int and 0 <= latent < self.d_sae for latent in self.kept_latents)
        if not whole or len(set(self.kept_latents)) != len(self.kept_latents):
            raise InputError(
                f"kept_latents is {str(self.kept_latents)[:80]}; expected different numbers, each "
                f"from 0 to {self.d_sae - 1}."
            )

    def validate_left_out(self) -> None:
        """Check the token ids and norms that describe which activations were left out."""
        ids = self.special_token_ids
        if ids is not None and not all(type(number) is int and number >= 0 for number in ids):
            raise InputError(f"special_token_ids is {shown(ids)}; expected token ids, such as [0, 50256].")
        for name in ("norm_limit", "norm_limit_out"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < math.inf:
                raise InputError(f"{name} is {limit}; expected a positive number, or null.")

    def validate_widths(self) -> None:
        """Check that the widths are positive and fit together (run by huggingface_hub's strict dataclasses)."""
        for name in ("d_in", "d_sae", "d_out"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST_WIDTH:
                raise InputError(f"{name} is {shown(value)}, expected a positive number up to {LARGEST_WIDTH}.")
        if (
            max(self.d_in, self.d_out or 0) * self.d_sae > LARGEST_MATRIX
            or self.d_in * (self.d_out or 0) > LARGEST_MATRIX
        ):
            raise InputError(
                f"d_in is {self.d_in}, d_out {self.d_out} and d_sae {self.d_sae}; expected matrices of at most "
                f"{LARGEST_MATRIX} values."
            )
        if self.apply_b_dec_to_input and self.d_out not in (None, self.d_in):
            raise InputError(
                f"d_out is {self.d_out} and d_in is {self.d_in}: a decoder bias of another width cannot be "
                "subtracted from the input; expected apply_b_dec_to_input=False for a transcoder."
            )


def _required_fields(config_class: type[SAEConfig]) -> list[str]:
    """Return the names of the fields that have no default."""
    return [
        field.name for field in fields(config_class) if field.default is MISSING and field.default_factory is MISSING
    ]
