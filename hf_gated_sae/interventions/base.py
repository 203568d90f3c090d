"""The three kinds of intervention, and what they get to see of one call at one site."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from ..modeling import SAEModel
from ..registry import Registry
from ..sites import Site
from .positions import Positions, TokenContext, check_positions, integers, shorten

interventions: Registry[type[Intervention]] = Registry("intervention", "hf_gated_sae.interventions")


class SiteRun:
    """One activation passing one site.

    Args:
        x: the clean activation ``[B, S, d]``.
        tokens: what is known of its tokens.
        placed: SAEs by id, on the activation's device.
    """

    def __init__(self, x: Tensor, tokens: TokenContext, placed: Mapping[int, SAEModel]) -> None:
        self.x = x
        self.tokens = tokens
        self._placed = placed
        self._encoded: dict[int, Tensor] = {}

    def sae(self, sae: SAEModel) -> SAEModel:
        """Return the SAE on the activation's device."""
        return self._placed.get(id(sae), sae)

    def latents(self, sae: SAEModel, latents: list[int]) -> Tensor:
        """Return some latents of the clean activation, ``[B, S, n]``, from their encoder rows alone if possible."""
        placed = self.sae(sae)
        if placed.elementwise and id(sae) not in self._encoded:
            return placed.encode(self.x.to(placed.dtype), latents)
        return self.all_latents(sae)[..., placed.latent_indices(latents)]

    def written(self, sae: SAEModel, written: Tensor) -> Tensor:
        """Bring what an SAE's decoder writes to the units of the activation, ``[B, S, d]``."""
        placed = self.sae(sae)
        scale = placed.written_scale(self.x.to(placed.dtype))
        return written if scale is None else written * scale

    def all_latents(self, sae: SAEModel) -> Tensor:
        """Return all latents of the clean activation, ``[B, S, d_sae]``; encoded once however many ask."""
        if id(sae) not in self._encoded:
            placed = self.sae(sae)
            self._encoded[id(sae)] = placed.encode(self.x.to(placed.dtype))
        return self._encoded[id(sae)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention(ABC):
    """Something to do at one site.

    Attributes:
        positions: which tokens; see `Positions`.
        special_tokens: also act on padding and on the model's BOS, EOS and padding tokens. Off by default: their
            activations are unlike all others, and SAEs are usually trained without them.
    """

    positions: Positions = "all"
    special_tokens: bool = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Register the verb, unless the class is only a base of others."""
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__:
            interventions.register(cls.__name__, cls)

    def __post_init__(self) -> None:
        """Check the fields, and keep copies of those that the caller could change later."""
        object.__setattr__(self, "positions", check_positions(self.positions))

    @property
    @abstractmethod
    def place(self) -> Site:
        """The site to act at."""

    @property
    def sae_used(self) -> SAEModel | None:
        """The SAE that is read, None if there is none."""
        return None

    def require_width(self, width: int) -> None:
        """Raise unless the intervention is made for activations of this width.

        Raises:
            ShapeError: saying which width it is made for.
        """
        if self.sae_used is not None:
            require_fit(self.sae_used, str(self.place), width)

    def mask(self, run: SiteRun) -> Tensor | bool:
        """Return which tokens to act on: ``[B, S]``, or True for all, or False for none."""
        return run.tokens.select(self.positions, special_tokens=self.special_tokens)


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit(Intervention):
    """Adds something to the activation."""

    @abstractmethod
    def delta(self, run: SiteRun) -> Tensor:
        """Return what to add at every token, ``[B, S, d]`` or broadcastable to it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Replacement(Intervention):
    """Puts something in the activation's place."""

    @abstractmethod
    def replacement(self, run: SiteRun) -> Tensor:
        """Return the new activation of every token, ``[B, S, d]`` or broadcastable to it."""


@dataclass(frozen=True, eq=False)
class LatentEdit(Edit):
    """Changes latents and adds the difference that this makes, ``(latents' - latents) @ W_dec``.

    What the SAE does not reconstruct stays as it is, and where no latent changes the activation stays bit-identical.

    Attributes:
        sae: the SAE; its configuration names the site.
        when: act only at tokens where each of these latents of the same SAE exceeds its value.
    """

    sae: SAEModel
    when: Mapping[int, float] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require_sae(self, self.sae)
        object.__setattr__(self, "when", latent_values(self, self.when))
        if not self.indices:
            raise InputError(
                f"{type(self).__name__} was given no latents; name at least one, 0 .. {self.sae.config.d_sae - 1}."
            )
        self.sae.latent_indices([*self.indices, *self.when])

    @property
    @abstractmethod
    def indices(self) -> list[int]:
        """The latents to change, each once."""

    @abstractmethod
    def change(self, latents: Tensor) -> Tensor:
        """Return the new values of the latents, ``[B, S, n] -> [B, S, n]``."""

    @property
    def place(self) -> Site:
        """The SAE's site."""
        return site_of(self.sae)

    @property
    def sae_used(self) -> SAEModel:
        """The SAE."""
        return self.sae

    def delta(self, run: SiteRun) -> Tensor:
        """Return the difference that the changed latents make, ``[B, S, d]``."""
        sae = run.sae(self.sae)
        latents = run.latents(self.sae, self.indices)
        return run.written(self.sae, (self.change(latents) - latents) @ sae.W_dec[sae.latent_indices(self.indices)])

    def mask(self, run: SiteRun) -> Tensor | bool:
        """Return which tokens to act on, the condition included."""
        mask = super().mask(run)
        if mask is False or not self.when:
            return mask
        gates = run.latents(self.sae, list(self.when))
        bounds = torch.tensor(list(self.when.values()), dtype=gates.dtype, device=gates.device)
        met = (gates > bounds).all(-1)
        return met if mask is True else mask & met


def require_sae(owner: object, sae: object) -> None:
    """Raise unless `sae` is an SAE that says where it belongs.

    Raises:
        InputError: saying what was given.
    """
    if not isinstance(sae, SAEModel):
        raise InputError(
            f"{type(owner).__name__} was given {type(sae).__name__} {shorten(sae)} as its SAE; expected an SAE, for "
            "example from SAEModel.from_pretrained(...)."
        )
    if not sae.one_site:
        raise InputError(
            f"{type(owner).__name__} was given a {type(sae).__name__}, which reads {len(sae.config.sites_read)} sites "
            "together; interventions act at one. Stack what capture(...) returns and use its encode and decode."
        )
    if not sae.per_token:
        raise InputError(
            f"{type(owner).__name__} was given a {type(sae).__name__}, whose latents depend on the tokens before: "
            "with a KV cache it would see one token alone. Use capture(...) on whole sequences, encode and decode."
        )
    if sae.config.is_transcoder:
        raise InputError(
            f"{type(owner).__name__} was given a transcoder, which reads {sae.config.site} and writes "
            f"{sae.config.site_out}; interventions act where they read. Use capture(...) and its encode and decode."
        )
    site_of(sae)


def site_of(sae: SAEModel) -> Site:
    """Return the site that an SAE's configuration names.

    Raises:
        InputError: if it names none.
    """
    if not sae.config.site:
        raise InputError(
            "This SAE's configuration names no site: set sae.config.site, for example to 'resid_post.12'."
        )
    return Site.parse(sae.config.site)


def require_fit(sae: SAEModel, site: str, width: int, *, writes: bool = True) -> None:
    """Raise unless an SAE is as wide as a site.

    Args:
        sae: the SAE.
        site: the site's name.
        width: the site's width.
        writes: whether its reconstruction is to be put there, too.

    Raises:
        ShapeError: with both widths.
    """
    if sae.config.d_in != width or (writes and sae.d_out != width):
        raise ShapeError(
            f"The SAE reads d_in = {sae.config.d_in} and writes d_out = {sae.d_out}, but {site} of this model is "
            f"{width} wide: this SAE (base model {sae.config.base_model!r}) does not belong there."
        )


def latent_list(owner: object, latents: object) -> tuple[int, ...]:
    """Return latent indices, each once, in the order given.

    Raises:
        InputError: if they are not whole numbers.
    """
    found = integers(latents)
    if found is None:
        raise InputError(
            f"{type(owner).__name__} was given {shorten(latents)}; expected indices of latents, such as [3, 7]."
        )
    return tuple(dict.fromkeys(found))


def latent_values(owner: object, values: object) -> dict[int, float]:
    """Return a copy of numbers by latent.

    Raises:
        InputError: if it is no mapping, a key is no whole number, or a value is not finite.
    """
    latents = integers(values.keys()) if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or latents is None:
        raise InputError(
            f"{type(owner).__name__} was given {shorten(values)}; expected numbers by latent, such as {{3: 1.5}}."
        )
    for latent, value in values.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise InputError(
                f"{type(owner).__name__} was given {value!r} for latent {latent}; expected a finite number."
            )
    return {latent: float(value) for latent, value in zip(latents, values.values(), strict=True)}
