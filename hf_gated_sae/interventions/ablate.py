"""Ablate latents: to zero, to their mean, or to values at other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError, ShapeError, unknown_name
from ._checks import latent_list, tensor_of
from .base import LatentEdit
from .model_call import SiteCall
from .positions import integers, shorten

MODES = ("zero", "mean", "resample")


@dataclass(frozen=True, eq=False)
class Ablate(LatentEdit):
    """Set latents to zero, to their recorded mean, or to their values at random tokens of another batch.

    ``x + (latents' - latents) @ W_dec`` with ``latents' = 0``, ``mean_activation`` or
    ``samples[hash(seed, row, position) mod N]``.

    Attributes:
        latents: indices of the latents.
        mode: ``"zero"``, ``"mean"`` (the SAE's recorded `mean_activation`) or ``"resample"``.
        samples: for ``"resample"``, values of the latents at other tokens, from `capture` on another batch: ``[N, n]``
            in the order of `latents`, or ``[N, d_sae]``, with any further axes before these; if ``n = d_sae``, the
            latter.
        seed: for ``"resample"``. The sample of a token depends only on the seed, its row in the batch and its position
            in the row: it is the same with and without a KV cache, with any padding, and for all beams.
    """

    latents: Sequence[int]
    mode: str = field(default="zero", kw_only=True)
    samples: Tensor | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    _pool: Tensor | None = field(init=False, repr=False, default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "latents", latent_list(self, self.latents))
        super().__post_init__()
        if self.mode not in MODES:
            raise unknown_name("ablation mode", self.mode, MODES)
        if self.mode == "mean" and not self.sae.config.recorded_tokens:
            raise InputError(
                "Ablate(mode='mean') needs the latents' mean activations, and this SAE has none recorded: run "
                "hf_gated_sae.evaluate(model, sae, batches, record=True) on representative text, or use mode='zero'."
            )
        if (self.samples is not None) != (self.mode == "resample"):
            needs = "needs samples=, values of the latents at other tokens" if self.samples is None else "takes none"
            raise InputError(f"Ablate(mode={self.mode!r}) was given samples={shorten(self.samples)}; it {needs}.")
        seed = integers(self.seed)
        if seed is None or len(seed) != 1:
            raise InputError(f"Ablate was given seed={shorten(self.seed)}; expected a whole number.")
        object.__setattr__(self, "seed", seed[0])
        if self.samples is not None:
            self._check_samples(self.samples)

    def _check_samples(self, samples: object) -> None:
        expected = "samples [N, n] or [N, d_sae]"
        given = tensor_of(self, samples, expected, range(2, 9))
        d_sae = self.sae.config.d_sae
        if given.shape[-1] not in (len(self.latents), d_sae):
            raise ShapeError(
                f"Ablate was given samples {list(given.shape)} for {len(self.latents)} latents of {d_sae}; expected "
                f"[N, {len(self.latents)}] or [N, {d_sae}]."
            )
        rows = given.reshape(-1, given.shape[-1])
        object.__setattr__(self, "samples", given)
        object.__setattr__(self, "_pool", rows[:, list(self.latents)] if rows.shape[1] == d_sae else rows)

    @property
    def indices(self) -> list[int]:
        """The latents to ablate."""
        return list(self.latents)

    def change(self, latents: Tensor, run: SiteCall) -> Tensor:
        """Return zeros, means, or samples, ``[B, S, n]``."""
        if self._pool is not None:
            samples = self._pool.to(latents)
            return samples[_sample_indices(run, self.seed, len(samples)).to(latents.device)]
        if self.mode == "zero":
            return latents.new_zeros(())
        mean = self.sae.mean_activation[self.sae.latent_indices(self.latents)]
        return mean.to(device=latents.device, dtype=latents.dtype).expand_as(latents)


# Odd numbers with well-mixed bits (the golden ratio, and two of xxHash); torch multiplies int64 modulo 2^64.
_OF_SEED, _OF_ROW, _OF_POSITION = -0x61C8864680B583EB, -0x3D4D51C2D82B14B1, 0x165667B19E3779F9


def _sample_indices(run: SiteCall, seed: int, count: int) -> Tensor:
    """Return a sample's index below `count` for each token, ``[B, S]``, by a hash without state."""
    tokens = run.tokens
    mixed = tokens.index * _OF_POSITION + (tokens.owners * _OF_ROW).unsqueeze(-1)
    mixed = mixed + torch.tensor(seed % 2**32, device=mixed.device) * _OF_SEED
    for _ in range(2):
        mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * _OF_SEED
    return ((mixed >> 32) & 0xFFFFFFFF) % count
