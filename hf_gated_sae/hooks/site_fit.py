"""Measure how well an SAE reconstructs the activations at some sites of a model, in one forward without edits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError, ShapeError
from ..functional import FidelityAccumulator
from ..functional.outliers import OUTLIER_MULTIPLE, is_outlier, norm_limit
from ..interventions import special_token_mask
from ..modeling import SAEModel, SAEOutput
from ..sites import Slot
from ..sites.multi_rank import must_finish
from ..sites.probe import make_subject, quiet
from ..sites.transforms import view
from .apply import exact_dtype
from .observation import CountedTokens, Observation

FEWEST = 8
"""Minimum number of activations for a measurement."""


class SiteFit(NamedTuple):
    """How well an SAE fits the activations of a text.

    Attributes:
        tokens: number of activations.
        fvu: fraction of variance unexplained; the highest, if there are several outputs.
        l0: mean number of non-zero latents per token.
        norm: root mean square of ``|x - mean x|``, the norm of the activations without their mean; NaN if they are
            reconstructed without any error.
    """

    tokens: int
    fvu: float
    l0: float
    norm: float


class Seen(NamedTuple):
    """Activations at some sites of a model.

    Attributes:
        values: activations of all tokens but padding, ``[n, width]`` by the site's name.
        special: which of these tokens are special, ``[n]`` bool.
    """

    values: dict[str, Tensor]
    special: Tensor


class Tokens(NamedTuple):
    """The tokens on which an SAE is measured at its own site, ``[n]`` bool each.

    Attributes:
        ordinary: without special tokens and outliers, or without what was left out when the SAE was recorded.
        whole: with the outliers, and also with special tokens unless those are known to have been left out; None if
            these are the same tokens, or the record states what was left out.
    """

    ordinary: Tensor
    whole: Tensor | None


def observe(
    model: nn.Module,
    own: Mapping[str, Slot],
    others: Mapping[str, Slot],
    inputs: Mapping[str, Any],
    special_ids: Sequence[int] | None,
) -> Seen:
    """Run a model as far as needed, quietly, and return the activations at some of its sites.

    Args:
        model: the model as the user calls it; attached interventions must be paused.
        own: the SAE's own sites by name.
        others: further sites by name; one without a vector for each token is left out of the result.
        inputs: keyword arguments of the forward, with ids ``[B, S]``.
        special_ids: ids of the special tokens; None for those of the model.

    Raises:
        ShapeError: if one of the SAE's own sites does not have a vector for each token.
    """
    subject = make_subject(model, inputs)
    slots = {**others, **own}
    observation = Observation((slot.tensor_path.bare for slot in slots.values()), stop=not must_finish(model))
    with quiet(subject.root):
        observation.probe(subject, slots)
    real = CountedTokens.of(subject.root, inputs, special_tokens=True)
    values = {}
    for name, slot in slots.items():
        if slot.tensor_path.bare not in observation.seen:
            continue
        try:
            values[name] = real.chosen(
                view(observation.seen[slot.tensor_path.bare], slot.tensor_path.transforms).value, name
            )
        except ShapeError:
            if name in own:
                raise
    ids = inputs["input_ids"]
    known = None if special_ids is None else torch.tensor(list(special_ids), dtype=ids.dtype)
    special = special_token_mask(subject.root, ids, ids=known)
    mask = real.mask.cpu()
    return Seen(values, torch.zeros_like(mask)[mask] if special is None else special.cpu()[mask])


def tokens_of(sae: SAEModel, seen: Seen, read: Sequence[Tensor], written: Sequence[Tensor]) -> Tokens:
    """Return the tokens on which an SAE is measured, without those that were left out of its record.

    Args:
        sae: the SAE.
        seen: the activations at its sites.
        read: activations at each site that it reads, ``[n, d_in]``.
        written: activations at each site that it writes, ``[n, d_out]``.

    Raises:
        InputError: if there are too few tokens, or the activations are not finite.
    """
    every = [*read, *written]
    counted = ~seen.special
    if not all(bool(x.isfinite().all(-1).cpu()[counted].all()) for x in every):
        raise InputError(
            f"The activations for the check of {type(sae).__name__} are not finite: the model itself overflows there "
            "in its dtype. Load the model in another dtype, or pass check=False to attach anyway."
        )
    limit = sae.config.norm_limit
    ordinary = counted
    for x in every if limit is None else read:
        ordinary = ordinary & are_ordinary(x, counted, limit)
    if int(ordinary.sum()) < FEWEST:
        raise InputError(
            f"The text for the check of an SAE has {int(ordinary.sum())} usable tokens; expected at least {FEWEST} "
            "that are neither padding nor special."
        )
    whole = counted if sae.config.special_token_ids is not None else torch.ones_like(counted)
    finite = all(bool(x.isfinite().all()) for x in every)
    more = limit is None and finite and not torch.equal(whole, ordinary)
    return Tokens(ordinary, whole if more else None)


def are_ordinary(x: Tensor, counted: Tensor, limit: float | None = None) -> Tensor:
    """Return which tokens' activations are not outliers, ``[n]`` bool, on the CPU.

    Args:
        x: activations ``[n, d]``.
        counted: tokens that are not special, ``[n]`` bool, which determine the usual norm.
        limit: the norm above which an activation was left out when the SAE was recorded; None if unknown.
    """
    if not bool(counted.any()):
        return counted
    usual = norm_limit(x[counted.to(x.device)])
    # At a site with larger norms the recorded limit would leave most tokens out.
    if limit is None or (usual is not None and limit < usual / OUTLIER_MULTIPLE):
        limit = usual
    return ~is_outlier(x, limit).cpu()


def fit(sae: SAEModel, read: Sequence[Tensor], written: Sequence[Tensor], tokens: Sequence[Tensor]) -> list[SiteFit]:
    """Measure an SAE on several sets of tokens at once.

    Args:
        sae: the SAE, with all of its latents.
        read: activations at each site that it reads, ``[n, d_in]``.
        written: activations at each site that it writes, ``[n, d_out]``.
        tokens: sets of tokens, ``[n]`` bool each.

    Returns:
        The measured numbers for each set; an infinite FVU where the SAE's output is not finite.
    """
    device = sae.b_dec.device
    chosen = torch.stack(list(tokens)).any(0)
    x = [each[chosen.to(each.device)].to(device=device, dtype=sae.dtype) for each in read]
    targets = [each[chosen.to(each.device)].to(device) for each in written]
    with exact_dtype(device):
        output = sae(x[0] if sae.one_site else torch.stack(x, -2))
    return [_measured(sae, output, targets, each[chosen].to(device)) for each in tokens]


def _measured(sae: SAEModel, output: SAEOutput, targets: Sequence[Tensor], tokens: Tensor) -> SiteFit:
    """Return the fit on one set of tokens ``[n]``, for the output with the highest FVU."""
    rows: Any = slice(None) if bool(tokens.all()) else tokens
    assert output.reconstruction is not None and output.latents is not None
    results = []
    for number, target in enumerate(targets):
        y = output.reconstruction if sae.one_site else output.reconstruction[..., number, :]
        b_dec = sae.b_dec.detach() if sae.one_site else sae.b_dec[number]
        accumulator = FidelityAccumulator(sae.config.d_sae, b_dec)
        accumulator.update(target[rows], y[rows], output.latents[rows])
        metrics = accumulator.compute()
        if not math.isfinite(metrics.mse):
            return SiteFit(metrics.tokens, math.inf, metrics.l0, math.nan)
        results.append(SiteFit(metrics.tokens, metrics.fvu, metrics.l0, metrics.centred_norm))
    return max(results, key=lambda each: -math.inf if math.isnan(each.fvu) else each.fvu)
