"""Fidelity: how well an SAE preserves the activations of a site, and the model's predictions."""

from __future__ import annotations

import warnings as python_warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import InputError
from ..functional import FidelityAccumulator, loss_recovered
from ..functional.outliers import OUTLIER_MULTIPLE, is_outlier, norm_limit
from ..hooks import attach, capture
from ..hooks.observation import CountedTokens
from ..hooks.token_batches import TokenBatches, model_inputs
from ..interventions import special_token_ids
from ..interventions.ablate_site import AblateSite
from ..interventions.splice import Splice
from ..modeling import SAEModel
from .report import LEFT_OUT, FidelityReport

CHUNK = 4096
"""Activations encoded at a time, which bounds the memory for ``[n, d_sae]`` latents."""

LIMIT_SAMPLE = 4096
"""Number of first activations of the text whose median norm determines the limit if the SAE has recorded none."""

MOST = 0.5
"""Share of the variance held by outliers above which a warning is given."""

FORWARDS = 4
"""Number of forwards in which `evaluate` reads every token: one up to the site, and one in each of the three arms."""

SMALL_GAP = 0.02
"""Loss increase by zero ablation, in nats per token, below which loss recovered is unreliable."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    sae: SAEModel,
    batches: TokenBatches,
    *,
    record: bool = False,
    outlier_multiple: float | None = OUTLIER_MULTIPLE,
    progress: Callable[[int], None] | None = None,
) -> FidelityReport:
    """Measure the fidelity of an SAE in its model, in one pass over the text.

    Args:
        model: the causal LM that the SAE belongs to.
        sae: the SAE; its configuration names the site.
        batches: token ids ``[B, S]``, or mappings with ``input_ids`` and ``attention_mask``.
        record: also store the measurements in the SAE: `max_activation` and `mean_activation`, and, in its
            configuration, FVU, L0 and norm (which `attach` compares with its own), special tokens and norm limit.
        outlier_multiple: for an SAE that has recorded no `norm_limit`: activations with a norm above this multiple of
            the median of the text's first 4,096 are outliers. None for no outliers.
        progress: called after each batch with the number of activations measured so far.

    Returns:
        The report. Padding and special tokens are left out everywhere: those that the SAE has recorded or else those
        of the model, see `special_token_ids`. Outliers are left out of the metrics and of the recorded statistics,
        except for metrics named ``..._with_outliers``; in the three losses they are replaced like all other tokens.

    Raises:
        InputError: if the SAE has no site, writes another site than it reads, or the text has no token to count.
        SiteError: if the model does not have the site.
        ShapeError: if the site's tensor, or the model's output, does not have one vector for each token.
    """
    require_reconstructing(sae)
    site = str(Splice(sae).first_site)
    arms = ("clean", "spliced", "zero")
    special = special_token_ids(model, sae)
    measured = _Activations(sae, outlier_multiple)
    sums = dict.fromkeys(arms, 0.0)
    left_out = loss_tokens = 0
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = model_inputs(model, batch)
            counted = CountedTokens.of(model, inputs, special_ids=special)
            measured.add(counted.chosen(capture(model, [site], **inputs)[site], site))
            targets = next_token_targets(inputs["input_ids"], counted.mask)
            here: dict[str, Any] = {"positions": counted.mask, "special_tokens": True}  # the same tokens in all arms
            for name, intervention in zip(arms, (None, Splice(sae, **here), AblateSite(site, **here)), strict=True):
                with nullcontext() if intervention is None else attach(model, intervention, check=False):
                    sums[name] += summed_loss(counted.columns(model(**inputs).logits, "the model's output"), targets)
            loss_tokens += int((targets >= 0).sum())
            left_out += int((~counted.mask).sum())
            if progress is not None:
                progress(measured.tokens)
    finally:
        model.train(was_training)
    if not loss_tokens:
        raise InputError(
            "The text has no token to predict from another; expected at least two tokens that are not special."
        )
    losses = {name: total / loss_tokens for name, total in sums.items()}
    accumulator = measured.finish()
    left = {"tokens_left_out": left_out, "special_token_ids": tuple(special), "norm_limit": measured.limit}
    report = _report(sae, accumulator, losses, loss_tokens, left)
    if record:
        latents = (accumulator.max_activation, accumulator.mean_activation)
        sae.record_statistics(*latents, accumulator.tokens, metrics=report.metrics)
        sae.config.special_token_ids, sae.config.norm_limit = special, measured.limit
    return report


def require_reconstructing(sae: SAEModel) -> None:
    """Raise unless the SAE writes the site that it reads, with all of its latents.

    Raises:
        InputError: with the reason.
    """
    config = sae.config
    if config.is_transcoder or sae.d_out != config.d_in:
        raise InputError(
            f"This {type(sae).__name__} is a transcoder: it reads {', '.join(config.sites_read)} (d_in = "
            f"{config.d_in}) and writes {', '.join(config.sites_written)} (d_out = {sae.d_out}). Fidelity is measured "
            "for SAEs, which write the site that they read."
        )
    if len(config.sites_read) > 1 or not sae.per_token:
        raise InputError(
            f"This {type(sae).__name__} reads several sites, or several tokens, at once; fidelity is measured for "
            "SAEs that encode each activation of one site separately."
        )
    if config.kept_latents is not None:
        raise InputError(
            f"This {type(sae).__name__} holds only {config.rows} of its {config.d_sae} latents and cannot "
            "reconstruct: load it without latents=."
        )


def next_token_targets(input_ids: Tensor, counted: Tensor) -> Tensor:
    """Return the target token of every position; -100 unless both it and its target count.

    Args:
        input_ids: ``[B, S]``.
        counted: mask ``[B, S]``.

    Returns:
        Token ids ``[B, S - 1]``.
    """
    return input_ids[:, 1:].masked_fill(~(counted[:, :-1] & counted[:, 1:]), -100)


def summed_loss(logits: Tensor, targets: Tensor) -> float:
    """Return the summed cross-entropy in nats.

    Args:
        logits: ``[B, S, vocabulary]``.
        targets: ``[B, S - 1]``, -100 for positions without a target.
    """
    # Row by row: the float32 copy of all logits would be the largest tensor of the whole evaluation.
    rows = (
        F.cross_entropy(row[:-1].float(), target.to(row.device), ignore_index=-100, reduction="sum")
        for row, target in zip(logits, targets, strict=True)
    )
    return float(sum(row.double() for row in rows))


class _Activations:
    """Measures an SAE on activations, with separate sums for outliers.

    Args:
        sae: the SAE; its configuration may have recorded a `norm_limit`.
        multiple: if not, the multiple of the median norm that is the limit; None for no outliers.

    Attributes:
        limit: activations with a larger norm are outliers; None for no limit, or while it is not known.
    """

    def __init__(self, sae: SAEModel, multiple: float | None) -> None:
        self.sae, self.multiple = sae, multiple
        self.accumulator = FidelityAccumulator(sae.config.d_sae, sae.b_dec)
        self.limit = sae.config.norm_limit
        self._known = self.limit is not None or multiple is None
        self._waiting: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """Number of activations added."""
        return self.accumulator.tokens + self.accumulator.outliers + sum(map(len, self._waiting))

    def add(self, activations: Tensor) -> None:
        """Add the counted activations of one batch, ``[n, d_in]``."""
        self._waiting.append(activations)
        if self._known or self.tokens >= LIMIT_SAMPLE:
            self._measure()

    def finish(self) -> FidelityAccumulator:
        """Return the sums over all added activations."""
        if self._waiting:
            self._measure()
        return self.accumulator

    def _measure(self) -> None:
        waiting, self._waiting = torch.cat(self._waiting), []
        if not self._known and self.multiple is not None and len(waiting):
            self.limit, self._known = norm_limit(waiting[:LIMIT_SAMPLE], self.multiple), True
        for given in waiting.split(CHUNK):
            outlier, x = is_outlier(given, self.limit).to(self.sae.device), given.to(self.sae.W_dec)
            ordinary = x[~outlier] if bool(outlier.any()) else x
            output, token_normalization = self.sae(ordinary), self.sae.token_normalization(ordinary)
            constant = (
                None if token_normalization is None else token_normalization.undo(self.sae.b_dec)
            )  # reconstruction without any active latent
            self.accumulator.update(ordinary, output.reconstruction, output.latents, constant=constant)
            if len(ordinary) < len(x):
                self.accumulator.update_outliers(x[outlier], self.sae(x[outlier]).reconstruction)


def _report(
    sae: SAEModel, accumulator: FidelityAccumulator, losses: dict[str, float], loss_tokens: int, left: dict[str, Any]
) -> FidelityReport:
    """Build the report from the sums, and warn about unreliable metrics."""
    metrics = accumulator.compute()
    recovered = loss_recovered(losses["clean"], losses["spliced"], losses["zero"])
    gap = losses["zero"] - losses["clean"]
    notes: list[str] = []
    if gap < SMALL_GAP:
        notes.append(
            f"Zero-ablating {sae.config.site} changes the loss by only {gap:.4f} nats per token, so loss recovered "
            f"({recovered:.3f}) is unreliable: compare the three losses instead."
        )
    if recovered > 1:
        notes.append(
            f"Loss recovered is {recovered:.4f}, above 1: the model predicts this text better with the reconstruction "
            "than with its own activations. Usually the text differs from the model's training data."
        )
    left_out = LEFT_OUT
    if metrics.outliers:
        left_out += f"; {metrics.outliers} activations with a norm above {left['norm_limit']:.4g}: not measured"
    if metrics.outlier_variance > MOST:
        notes.append(
            f"{metrics.outliers} of {metrics.tokens + metrics.outliers} activations at {sae.config.site} have a norm "
            f"above {left['norm_limit']:.4g} and hold {metrics.outlier_variance:.1%} of the variance. FVU is "
            f"{metrics.fvu:.4f} without them and {metrics.fvu_with_outliers:.4f} with them, which does not describe "
            "the other activations."
        )
    for note in notes:
        python_warnings.warn(note, UserWarning, stacklevel=3)
    config = sae.config
    values: dict[str, Any] = {
        name: tuple(getattr(accumulator, name).tolist()) for name in ("density", "max_activation", "mean_activation")
    }
    return FidelityReport(
        architecture=config.architecture,
        site=str(config.site),
        base_model=config.base_model,
        base_model_revision=config.base_model_revision,
        d_in=config.d_in,
        d_sae=config.d_sae,
        positions_left_out=left_out,
        loss_tokens=loss_tokens,
        loss_clean=losses["clean"],
        loss_spliced=losses["spliced"],
        loss_zero_ablated=losses["zero"],
        loss_recovered=recovered,
        metrics=metrics,
        warnings=tuple(notes),
        **values,
        **left,
    )
