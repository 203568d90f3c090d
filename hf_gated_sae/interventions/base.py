"""The three kinds of intervention."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..errors import AttachError, InputError, ShapeError
from ..modeling import SAEModel
from ..registry import Registry
from ..sites import Site
from ._checks import latent_values
from .model_call import SiteCall
from .positions import Positions, check_positions, check_rows, integers, shorten

interventions: Registry[type[Intervention]] = Registry("intervention", "hf_gated_sae.interventions")


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention(ABC):
    """Something to do at one site, or at the several sites that an SAE writes.

    Attributes:
        positions: which tokens; see `Positions`.
        rows: which rows of the batch; all by default. With beams or several return sequences, all of a row's.
        special_tokens: also act on padding and on special tokens: those that the SAE has recorded, or else the model's
            BOS, EOS and padding tokens and its tokenizer's special tokens. Off by default: their activations are
            unlike all others, and SAEs are usually trained without them.
    """

    positions: Positions = "all"
    rows: int | Sequence[int] | None = None
    special_tokens: bool = False

    def __init_subclass__(cls, *, is_verb: bool = True, **kwargs: object) -> None:
        """Register the verb, unless the class is only a base of others."""
        super().__init_subclass__(**kwargs)
        if is_verb and cls.__module__ != __name__:
            interventions.register(cls.__name__, cls)

    def __post_init__(self) -> None:
        """Check the fields, and keep copies of those that the caller could change later."""
        object.__setattr__(self, "positions", check_positions(self.positions))
        object.__setattr__(self, "rows", check_rows(self.rows))
        if not isinstance(self.special_tokens, bool):
            raise InputError(f"special_tokens is {shorten(self.special_tokens)}; expected True or False.")

    @property
    def replaces(self) -> bool:
        """Whether something is put in the activation's place; otherwise something is added to it."""
        return False

    @property
    def columns(self) -> int:
        """Number of columns of the batch that the intervention speaks of; 0 if it does not depend on them."""
        if not isinstance(self.positions, Tensor):
            return 0
        meant = self.positions.reshape(-1, self.positions.shape[-1]).any(0).nonzero()
        return int(meant[-1]) + 1 if len(meant) else 0

    @property
    @abstractmethod
    def place(self) -> Site:
        """The site to act at; the first one, if there are several."""

    @property
    def places(self) -> tuple[Site, ...]:
        """The sites to act at, in the order in which the model runs through them."""
        return (self.place,)

    @property
    def reads(self) -> tuple[Site, ...]:
        """Sites whose activations are needed elsewhere than there."""
        return ()

    @property
    def sae_used(self) -> SAEModel | None:
        """The SAE that is read, None if there is none."""
        return None

    def require_width(self, width: int) -> None:
        """Raise unless the intervention is made for sites of this width.

        Raises:
            ShapeError: saying which width it is made for.
        """
        if self.sae_used is not None:
            require_written_width(self.sae_used, str(self.place), width)

    def require_read_width(self, width: int) -> None:
        """Raise unless the intervention can read a site of this width.

        Raises:
            ShapeError: saying which width it is made for.
        """
        if self.sae_used is not None:
            require_read_width(self.sae_used, str(self.reads[0]), width)

    def acts_at(self, output: int) -> bool:
        """Whether there is anything to do at one of the `places`, by its number."""
        return True

    def mask(self, run: SiteCall) -> Tensor | bool:
        """Return which tokens to act on: ``[B, S]``, or True for all, or False for none."""
        rows = cast("Sequence[int] | None", self.rows)  # as they were checked
        return run.tokens.select(
            self.positions, special_tokens=self.special_tokens, rows=rows, special_ids=self._special_ids
        )

    def effect(self, run: SiteCall) -> Tensor | None:
        """Return what to add or put there, ``[B, S, d]`` or broadcastable to it; None for nothing."""
        raise NotImplementedError(f"{type(self).__name__} must be an Edit or a Replacement.")

    def act(self, run: SiteCall) -> tuple[Tensor | bool, Tensor | None]:
        """Return on which tokens of a site to act, and what to add or to put there.

        Returns:
            The mask ``[B, S]``, True for all tokens or False for none; and the value, None for nothing.
        """
        if not self.acts_at(run.output):
            return False, None
        mask = run.call.once(self, partial(self.mask, run))
        return mask, None if mask is False else self.effect(run)

    @property
    def _special_ids(self) -> list[int] | None:
        """The special tokens that the SAE has recorded; None if those of the model are meant."""
        return None if self.sae_used is None else self.sae_used.config.special_token_ids


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit(Intervention):
    """Adds something to the activation."""

    @abstractmethod
    def delta(self, run: SiteCall) -> Tensor:
        """Return what to add at every token, ``[B, S, d]`` or broadcastable to it."""

    def effect(self, run: SiteCall) -> Tensor:
        """Return what to add."""
        return self.delta(run)


@dataclass(frozen=True, eq=False, kw_only=True)
class Replacement(Intervention):
    """Puts something in the activation's place."""

    @property
    def replaces(self) -> bool:
        """Yes."""
        return True

    @abstractmethod
    def replacement(self, run: SiteCall) -> Tensor | None:
        """Return the new activation of every token, ``[B, S, d]`` or broadcastable to it; None to leave it."""

    def effect(self, run: SiteCall) -> Tensor | None:
        """Return the new activation."""
        return self.replacement(run)


@dataclass(frozen=True, eq=False, kw_only=True)
class Targeted(Intervention):
    """Acts at the sites that an SAE writes, or at one site that is named."""

    @property
    @abstractmethod
    def aim(self) -> SAEModel | Site | str:
        """The SAE or the site."""

    @property
    def sae_used(self) -> SAEModel | None:
        """The SAE, None if a site is named."""
        return self.aim if isinstance(self.aim, SAEModel) else None

    @property
    def place(self) -> Site:
        """The site; the first one that the SAE writes."""
        return self.places[0]

    @property
    def places(self) -> tuple[Site, ...]:
        """The sites that the SAE writes, or the one that is named."""
        return sites_written(self.aim) if isinstance(self.aim, SAEModel) else (Site.parse(self.aim),)

    @property
    def reads(self) -> tuple[Site, ...]:
        """The sites that the SAE reads, unless it is one, which it also writes."""
        return () if self.sae_used is None else sites_read_elsewhere(self.sae_used)

    @property
    def latents_needed(self) -> tuple[int, ...] | None:
        """The latents of the SAE that are enough to do this; None if it takes all of them."""
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Conditional(Targeted, Edit):
    """Acts only where latents of the SAE are on.

    At token ``t`` of a row: if ``latents[s, j] > when[j]`` for all ``j``, at one token ``s`` with
    ``t - window < s <= t``.

    Attributes:
        when: act only where each of these latents of the same SAE exceeds its value.
        window: how many tokens back, the token itself included, the condition may have been met, all of it at one
            token; 1 for the token itself. Counted over real tokens, the prompt's too if only generated ones are
            edited; at padding and special tokens it is never met, except at special ones with `special_tokens`.
    """

    when: Mapping[int, float] = field(default_factory=dict)
    window: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        object.__setattr__(self, "when", latent_values(self, self.when))
        window = integers(self.window)
        if window is None or len(window) != 1 or window[0] < 1:
            raise InputError(
                f"{type(self).__name__} was given window={shorten(self.window)}; expected how many tokens, 1 or more."
            )
        object.__setattr__(self, "window", window[0])
        if self.window > 1 and not self.when:
            raise InputError(f"{type(self).__name__} was given window={self.window} without when=, which it is about.")
        sae = self.sae_used
        if sae is None:
            if self.when:
                raise InputError(
                    f"{type(self).__name__} was given when={shorten(self.when)} without an SAE, whose they would be."
                )
            return
        if not self.indices:
            raise InputError(
                f"{type(self).__name__} was given no latents; name at least one, 0 .. {sae.config.d_sae - 1}."
            )
        sources = sae.sources_of(sae.latent_indices([*self.indices, *self.when]))
        if self.when and max(sources[len(self.indices) :]) > min(sources[: len(self.indices)]):
            raise InputError(
                f"{type(self).__name__} was given when={shorten(self.when)}, latents of a later site than those to be "
                "changed: what they will be is not known yet where the change has to be written."
            )

    @property
    @abstractmethod
    def indices(self) -> list[int]:
        """The latents to change, each once; none where a site is named."""

    @functools.cached_property
    def _first_output(self) -> int:
        """The first output that a latent to be changed writes; a condition is known there."""
        sae = self.sae_used
        return 0 if sae is None else min(sae.sources_of(sae.latent_indices(self.indices)))

    def acts_at(self, output: int) -> bool:
        """Whether a latent to be changed writes at one of the `places`, by its number."""
        return output >= self._first_output

    @property
    def latents_needed(self) -> tuple[int, ...] | None:
        """The latents that are changed, and those of the condition."""
        return tuple(dict.fromkeys([*self.indices, *self.when]))

    def mask(self, run: SiteCall) -> Tensor | bool:
        """Return which tokens to act on, the condition included."""
        mask, sae = super().mask(run), self.sae_used
        if sae is None or not self.when or (mask is False and self.window == 1):
            return mask
        gates = run.latents(sae, list(self.when))
        bounds = torch.tensor(list(self.when.values()), dtype=gates.dtype, device=gates.device)
        met = ~(gates <= bounds).any(-1)  # so that NaN counts as met, acts, and is found out
        if self.window > 1:  # even if none of these tokens is meant: later ones may look back at them
            met = self._recently(run, met)
        if isinstance(mask, bool):
            return mask and met
        return mask.to(met.device) & met

    def _recently(self, run: SiteCall, met: Tensor) -> Tensor:
        """Return at which tokens the condition was met a moment ago, ``[B, S]``, given where it is met."""
        tokens = run.tokens
        if tokens.phase == "packed":
            raise AttachError(
                f"window={self.window} needs to know the tokens before, and this call packs several sequences into "
                "one row (continuous batching, padding-free training); use window=1."
            )
        index = tokens.index.to(met.device)
        counts = (index >= 0) & met
        special = None if self.special_tokens else tokens.special_among(self._special_ids)
        if special is not None:
            counts = counts & ~special.to(met.device)
        # Counted over the whole row, so that the latest one is the largest number.
        first = 0 if tokens.before is None else tokens.before.to(met.device)
        place = index + first
        never = -2 - self.window  # out of reach even of padding, whose index is -1
        whole = run.call.remember(self, torch.where(counts, place, never))
        latest = whole.cummax(-1).values[:, -index.shape[1] :]
        return (place - latest < self.window) & (latest >= first) & (index >= 0)


@dataclass(frozen=True, eq=False)
class LatentEdit(Conditional):
    """Changes latents and adds the difference that this makes, ``(latents' - latents) @ W_dec``.

    What the SAE does not reconstruct stays as it is, and where no latent changes the activation stays bit-identical.

    Attributes:
        sae: the SAE; its configuration names the site.
    """

    sae: SAEModel

    def __post_init__(self) -> None:
        """Check the fields."""
        require_sae(self, self.sae)
        super().__post_init__()

    @property
    def aim(self) -> SAEModel:
        """The SAE."""
        return self.sae

    @abstractmethod
    def change(self, latents: Tensor, run: SiteCall) -> Tensor:
        """Return the new values of the latents, ``[B, S, n] -> [B, S, n]``, or ``[n]`` for every token."""

    def delta(self, run: SiteCall) -> Tensor:
        """Return the difference that the changed latents make here, ``[B, S, d]``."""
        latents = run.latents(self.sae, self.indices)
        return run.written(self.sae, self.indices, self.change(latents, run) - latents)


def require_target(owner: object, target: object) -> None:
    """Raise unless `target` is an SAE that says where it belongs, or names a site.

    Raises:
        InputError: saying what was given.
        SiteError: if it is no site's name.
    """
    if isinstance(target, (str, Site)):
        Site.parse(target)
    elif isinstance(target, SAEModel):
        require_sae(owner, target)
    else:
        raise InputError(
            f"{type(owner).__name__} was given {type(target).__name__} {shorten(target)}; expected an SAE, or a site "
            "such as 'resid_post.12'."
        )


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
    if not sae.per_token:
        raise InputError(
            f"{type(owner).__name__} was given a {type(sae).__name__}, whose latents depend on the tokens before: "
            "with a KV cache it would see one token alone. Use capture(...) on whole sequences, encode and decode."
        )
    sites_written(sae)


def sites_read(sae: SAEModel) -> tuple[Site, ...]:
    """Return the sites that an SAE's configuration says it reads.

    Raises:
        InputError: if it names none.
    """
    if not sae.config.sites_read:
        raise InputError(
            "This SAE's configuration names no site: set sae.config.site, for example to 'resid_post.12'."
        )
    return tuple(Site.parse(site) for site in sae.config.sites_read)


def sites_written(sae: SAEModel) -> tuple[Site, ...]:
    """Return the sites that an SAE's configuration says it writes: those that it reads, unless it is a transcoder.

    Raises:
        InputError: if it names none.
    """
    return tuple(Site.parse(site) for site in sae.config.sites_written) if sites_read(sae) else ()


def sites_read_elsewhere(sae: SAEModel) -> tuple[Site, ...]:
    """Return the sites whose activations an SAE needs where it writes other sites."""
    read = sites_read(sae)
    return () if len(read) == 1 and read == sites_written(sae) else read


def require_read_width(sae: SAEModel, site: str, width: int) -> None:
    """Raise unless an SAE reads activations as wide as a site.

    Raises:
        ShapeError: with both widths.
    """
    if sae.config.d_in != width:
        raise ShapeError(
            f"The SAE reads d_in = {sae.config.d_in}, but {site} of this model is {width} wide: this SAE (base model "
            f"{sae.config.base_model!r}) does not belong there."
        )


def require_written_width(sae: SAEModel, site: str, width: int) -> None:
    """Raise unless an SAE writes activations as wide as a site, and, if it reads them there, reads such.

    Raises:
        ShapeError: with all widths.
    """
    if sae.d_out != width or (not sae.config.is_transcoder and sae.config.d_in != width):
        raise ShapeError(
            f"The SAE reads d_in = {sae.config.d_in} and writes d_out = {sae.d_out}, but {site} of this model is "
            f"{width} wide: this SAE (base model {sae.config.base_model!r}) does not belong there."
        )
