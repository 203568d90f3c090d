"""Base classes of interventions: edits that add, replacements, and edits of an SAE's latents."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """A change of the activation at one site, or at the sites that an SAE writes.

    Attributes:
        positions: the tokens to act on; see `Positions`.
        rows: the rows of the batch to act on; all by default. With beams or several return sequences, a row includes
            all of its copies.
        special_tokens: whether to act also on padding and special tokens: those that the SAE has recorded, or else the
            model's BOS, EOS and padding tokens and its tokenizer's special tokens. Off by default: their activations
            differ from all others, and SAEs are usually trained without them.
    """

    positions: Positions = "all"
    rows: int | Sequence[int] | None = None
    special_tokens: bool = False

    def __init_subclass__(cls, *, is_verb: bool = True, **kwargs: object) -> None:
        """Register the class as an intervention, unless it is only a base of others (``is_verb=False``)."""
        super().__init_subclass__(**kwargs)
        if is_verb and cls.__module__ != __name__:
            interventions.register(cls.__name__, cls)

    def __post_init__(self) -> None:
        """Check the fields, and copy those that the caller could change later."""
        object.__setattr__(self, "positions", check_positions(self.positions))
        object.__setattr__(self, "rows", check_rows(self.rows))
        if not isinstance(self.special_tokens, bool):
            raise InputError(f"special_tokens is {shorten(self.special_tokens)}; expected True or False.")

    @property
    def replaces(self) -> bool:
        """Whether the activation is replaced; otherwise a value is added to it."""
        return False

    @property
    def columns(self) -> int:
        """Number of columns of the batch that the intervention needs; 0 if it does not depend on them."""
        if not isinstance(self.positions, Tensor):
            return 0
        selected = self.positions.reshape(-1, self.positions.shape[-1]).any(0).nonzero()
        return int(selected[-1]) + 1 if len(selected) else 0

    @property
    @abstractmethod
    def first_site(self) -> Site:
        """The site to act at; the first one if there are several."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites to act at, in execution order."""
        return (self.first_site,)

    @property
    def reads(self) -> tuple[Site, ...]:
        """Sites whose activations are needed at other sites."""
        return ()

    @property
    def sae_used(self) -> SAEModel | None:
        """The SAE that encodes, None if there is none."""
        return None

    def require_width(self, width: int) -> None:
        """Raise unless the intervention fits a written site of this width.

        Raises:
            ShapeError: with the expected width.
        """
        if self.sae_used is not None:
            require_written_width(self.sae_used, str(self.first_site), width)

    def require_read_width(self, width: int) -> None:
        """Raise unless the intervention fits a read site of this width.

        Raises:
            ShapeError: with the expected width.
        """
        if self.sae_used is not None:
            require_read_width(self.sae_used, str(self.reads[0]), width)

    def acts_at(self, output: int) -> bool:
        """Whether the intervention acts at ``self.sites[output]``."""
        return True

    def mask(self, run: SiteCall) -> Tensor | bool:
        """Return which tokens to act on: ``[B, S]``, or True for all, or False for none."""
        rows = cast("Sequence[int] | None", self.rows)  # checked on construction
        return run.tokens.select(
            self.positions, special_tokens=self.special_tokens, rows=rows, special_ids=self._special_ids
        )

    def effect(self, run: SiteCall) -> Tensor | None:
        """Return what to add or put there, ``[B, S, d]`` or broadcastable to it; None for nothing."""
        if self.replaces:
            return cast("Replacement", self).replacement(run)
        return cast("Edit", self).delta(run)

    def act(self, run: SiteCall) -> tuple[Tensor | bool, Tensor | None]:
        """Return the tokens of a site to act on, and the value to add, or the replacement.

        Returns:
            The mask ``[B, S]``, True for all tokens or False for none; and the value, None for no change.
        """
        if not self.acts_at(run.output):
            return False, None
        mask = run.call.once(self, functools.partial(self.mask, run))
        return mask, None if mask is False else self.effect(run)

    @property
    def _special_ids(self) -> list[int] | None:
        """The special tokens that the SAE has recorded; None for those of the model."""
        return None if self.sae_used is None else self.sae_used.config.special_token_ids


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit(Intervention):
    """An intervention that adds a value to the activation."""

    @abstractmethod
    def delta(self, run: SiteCall) -> Tensor:
        """Return the value to add at every token, ``[B, S, d]`` or broadcastable to it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Replacement(Intervention):
    """An intervention that replaces the activation."""

    @property
    def replaces(self) -> bool:
        """True: the activation is replaced."""
        return True

    @abstractmethod
    def replacement(self, run: SiteCall) -> Tensor | None:
        """Return the new activation of every token, ``[B, S, d]`` or broadcastable to it; None for no change."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Targeted(Intervention):
    """An intervention at the sites that an SAE writes, or at one named site."""

    @property
    @abstractmethod
    def aim(self) -> SAEModel | Site | str:
        """The SAE or the site."""

    @property
    def sae_used(self) -> SAEModel | None:
        """The SAE, None with a named site."""
        return self.aim if isinstance(self.aim, SAEModel) else None

    @property
    def first_site(self) -> Site:
        """The site; the first one that the SAE writes."""
        return self.sites[0]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that the SAE writes, or the named one."""
        return sites_written(self.aim) if isinstance(self.aim, SAEModel) else (Site.parse(self.aim),)

    @property
    def reads(self) -> tuple[Site, ...]:
        """The sites that the SAE reads; empty if it reads one site and writes the same."""
        return () if self.sae_used is None else sites_read_elsewhere(self.sae_used)

    @property
    def latents_needed(self) -> tuple[int, ...] | None:
        """The latents of the SAE that the intervention needs; None for all of them."""
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Conditional(Targeted, Edit):
    """An edit that may depend on a condition on latents of the SAE.

    It acts at token ``t`` of a row if ``latents[s, j] > when[j]`` for all ``j``, at one token ``s`` with
    ``t - window < s <= t``.

    Attributes:
        when: act only where each of these latents of the same SAE exceeds its value.
        window: number of tokens, up to and including the token itself, at one of which the whole condition must be
            met; 1 for the token itself. Real tokens are counted, also the prompt's if only generated ones are edited.
            The condition is never met at padding, and at special tokens only with `special_tokens`.
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
                f"{type(self).__name__} was given window={shorten(self.window)}; expected 1 or more tokens."
            )
        object.__setattr__(self, "window", window[0])
        if self.window > 1 and not self.when:
            raise InputError(
                f"{type(self).__name__} was given window={self.window} without when=, to which it applies: pass both."
            )
        sae = self.sae_used
        if sae is None:
            if self.when:
                raise InputError(
                    f"{type(self).__name__} was given when={shorten(self.when)} and a site; when= needs an SAE."
                )
            return
        if not self.indices:
            raise InputError(
                f"{type(self).__name__} was given no latents; pass at least one, 0 .. {sae.config.d_sae - 1}."
            )
        sources = sae.sources_of(sae.latent_indices([*self.indices, *self.when]))
        if self.when and max(sources[len(self.indices) :]) > min(sources[: len(self.indices)]):
            raise InputError(
                f"{type(self).__name__} was given when={shorten(self.when)}, latents of a later site than those to be "
                "changed: their values are not known yet where the change is written. Use latents of the same or an "
                "earlier site."
            )

    @property
    @abstractmethod
    def indices(self) -> list[int]:
        """The latents to change, without repetitions; none with a named site."""

    @functools.cached_property
    def _first_output(self) -> int:
        """The lowest source of the changed latents: latents write at the output of that number and at later ones."""
        sae = self.sae_used
        return 0 if sae is None else min(sae.sources_of(sae.latent_indices(self.indices)))

    def acts_at(self, output: int) -> bool:
        """Whether a changed latent writes at ``self.sites[output]``."""
        return output >= self._first_output

    @property
    def latents_needed(self) -> tuple[int, ...] | None:
        """The changed latents, and those of the condition."""
        return tuple(dict.fromkeys([*self.indices, *self.when]))

    def mask(self, run: SiteCall) -> Tensor | bool:
        """Return which tokens to act on, the condition included."""
        mask, sae = super().mask(run), self.sae_used
        if sae is None or not self.when or (mask is False and self.window == 1):
            return mask
        gates = run.latents(sae, list(self.when))
        bounds = torch.tensor(list(self.when.values()), dtype=gates.dtype, device=gates.device)
        met = ~(gates <= bounds).any(-1)  # NaN counts as met, so that it acts and is noticed
        if self.window > 1:  # even if none of these tokens is selected: later ones may look back at them
            met = self._met_in_window(run, met)
        if isinstance(mask, bool):
            return mask and met
        return mask.to(met.device) & met

    def _met_in_window(self, run: SiteCall, met: Tensor) -> Tensor:
        """Return the tokens with the condition met in their window, ``[B, S]``, from the tokens at which it is met."""
        tokens = run.tokens
        if tokens.phase == "packed":
            raise AttachError(
                f"window={self.window} depends on the tokens before, and this call packs several sequences into one "
                "row (continuous batching, padding-free training); use window=1."
            )
        index = tokens.index.to(met.device)
        counts = (index >= 0) & met
        special = None if self.special_tokens else tokens.special_among(self._special_ids)
        if special is not None:
            counts = counts & ~special.to(met.device)
        # Positions in the whole row, so that the latest one is the largest number.
        first = 0 if tokens.before is None else tokens.before.to(met.device)
        position = index + first
        never = -2 - self.window  # outside the window even of padding, whose index is -1
        whole = run.call.remember(self, torch.where(counts, position, never))
        latest = whole.cummax(-1).values[:, -index.shape[1] :]
        return (position - latest < self.window) & (latest >= first) & (index >= 0)


@dataclass(frozen=True, eq=False)
class LatentEdit(Conditional):
    """An edit of latents, which adds ``(latents' - latents) @ W_dec`` to the activation.

    The SAE's error stays the same, and where no latent changes the activation stays bit-identical.

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
        """Return the change of the activation by the changed latents, ``[B, S, d]``."""
        latents = run.latents(self.sae, self.indices)
        return run.written(self.sae, self.indices, self.change(latents, run) - latents)


def require_target(owner: object, target: object) -> None:
    """Raise unless `target` is an SAE whose configuration names a site, or is a site.

    Raises:
        InputError: with what was given.
        SiteError: if it is a text that is not a site.
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
    """Raise unless `sae` is an SAE that encodes single tokens and whose configuration names a site.

    Raises:
        InputError: with what was given.
    """
    if not isinstance(sae, SAEModel):
        raise InputError(
            f"{type(owner).__name__} was given {type(sae).__name__} {shorten(sae)} as its SAE; expected an SAE, for "
            "example from SAEModel.from_pretrained(...)."
        )
    if not sae.per_token:
        raise InputError(
            f"{type(owner).__name__} was given a {type(sae).__name__}, whose latents depend on the tokens before: "
            "with a KV cache it would get one token alone. Use capture(...) on whole sequences, encode and decode."
        )
    sites_written(sae)


def sites_read(sae: SAEModel) -> tuple[Site, ...]:
    """Return the sites that an SAE reads, from its configuration.

    Raises:
        InputError: if it names none.
    """
    if not sae.config.sites_read:
        raise InputError(
            "This SAE's configuration names no site: set sae.config.site, for example to 'resid_post.12'."
        )
    return tuple(Site.parse(site) for site in sae.config.sites_read)


def sites_written(sae: SAEModel) -> tuple[Site, ...]:
    """Return the sites that an SAE writes, from its configuration: those that it reads, unless it is a transcoder.

    Raises:
        InputError: if it names none.
    """
    return tuple(Site.parse(site) for site in sae.config.sites_written) if sites_read(sae) else ()


def sites_read_elsewhere(sae: SAEModel) -> tuple[Site, ...]:
    """Return the sites that an SAE reads; empty if it reads one site and writes the same."""
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
    """Raise unless an SAE writes activations as wide as a site, and also reads such if it is not a transcoder.

    Raises:
        ShapeError: with all widths.
    """
    if sae.d_out != width or (not sae.config.is_transcoder and sae.config.d_in != width):
        raise ShapeError(
            f"The SAE reads d_in = {sae.config.d_in} and writes d_out = {sae.d_out}, but {site} of this model is "
            f"{width} wide: this SAE (base model {sae.config.base_model!r}) does not belong there."
        )
