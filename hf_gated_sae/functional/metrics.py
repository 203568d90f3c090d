"""Fidelity metrics as streaming accumulators: ratios of sums over the whole evaluation set, never means of ratios."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from .short_repr import short_repr
from .sparse_latents import SparseLatents


@dataclass(frozen=True)
class FidelityMetrics:
    """What an SAE does to a set of activations; outliers are left out, except where a name says otherwise.

    Attributes:
        tokens: number of activation vectors seen, outliers not among them.
        l0: mean number of non-zero latents per token.
        fvu: fraction of variance unexplained, ``sum |x - x^|^2 / sum |x - mean x|^2``.
        mse: mean of ``|x - x^|^2`` per token (a sum over the width, not a mean).
        relative_reconstruction_bias: gamma of the paper; 1 is unbiased, below 1 is shrinkage.
        relative_reconstruction_bias_centred: the same on ``x - b_dec`` and ``x^ - b_dec`` (or with another
            constant part subtracted), so that the constant part cannot hide shrinkage.
        cosine: mean cosine between activation and reconstruction.
        norm_ratio: mean of ``|x^| / |x|`` over the tokens whose activation is not zero; NaN if there are none.
        dead_fraction: share of latents that never fired on these tokens.
        dense_fraction: share of latents that fired on more than a tenth of the tokens.
        outliers: number of activation vectors that were left out because of their norm; see `functional.outliers`.
        outlier_variance: share of the variance of all activations that disappears without the outliers.
        fvu_with_outliers: `fvu` of all activations.
        relative_reconstruction_bias_with_outliers: `relative_reconstruction_bias` of all activations.
    """

    tokens: int
    l0: float
    fvu: float
    mse: float
    relative_reconstruction_bias: float
    relative_reconstruction_bias_centred: float
    cosine: float
    norm_ratio: float
    dead_fraction: float
    dense_fraction: float
    outliers: int = 0
    outlier_variance: float = 0.0
    fvu_with_outliers: float = math.nan
    relative_reconstruction_bias_with_outliers: float = math.nan

    __repr__ = short_repr

    @property
    def centred_norm(self) -> float:
        """Root mean square of ``|x - mean x|``; NaN if nothing is unexplained, as it follows from `mse` and `fvu`."""
        return centred_norm(self.mse, self.fvu)


def centred_norm(mse: float, fvu: float) -> float:
    """Return the root mean square of ``|x - mean x|``: an error of `mse` is the share `fvu` of its square.

    >>> centred_norm(mse=4.0, fvu=0.25)
    4.0
    """
    return math.sqrt(mse / fvu) if fvu > 0 else math.nan


class FidelityAccumulator:
    """Collects the sums from which `FidelityMetrics` follow; all sums are float64.

    Gamma is ``E|x^|^2 / E[x^.x]`` (arXiv 2404.16014 v2, equation 10), which minimises ``E|x^ / gamma - x|^2``.

    Args:
        d_sae: number of latents.
        b_dec: decoder bias ``[d_out]`` used for the centred gamma.
    """

    def __init__(self, d_sae: int, b_dec: Tensor) -> None:
        self.d_sae = d_sae
        self.b_dec = b_dec.detach().double()
        device = b_dec.device
        self.tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.max_activation = torch.zeros(d_sae, dtype=torch.float32, device=device)
        self._sum_latents = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._sum_x = torch.zeros_like(self.b_dec)
        # |x|^2, |x^|^2, x.x^, |x-x^|^2, centred |x^|^2, centred x.x^, cosine, norm ratio, its tokens, active latents
        self._sums = torch.zeros(10, dtype=torch.float64, device=device)
        # Sums over outliers, for the metrics that include them: x, |x|^2, |x^|^2, x.x^, |x-x^|^2
        self.outliers = 0
        self._outlier_sum_x = torch.zeros_like(self.b_dec)
        self._outlier_sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(
        self, x: Tensor, reconstruction: Tensor, latents: Tensor | SparseLatents, *, constant: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            x: activations ``[..., d_out]``.
            reconstruction: ``[..., d_out]``.
            latents: ``[..., d_sae]``, or those that are on.
            constant: what the SAE writes at each token when no latent is on, ``[..., d_out]``; `b_dec` by default.

        Raises:
            ShapeError: if their shapes do not fit each other.
        """
        if x.shape != reconstruction.shape or latents.shape != (*x.shape[:-1], self.d_sae):
            raise ShapeError(
                f"Given x {list(x.shape)}, reconstruction {list(reconstruction.shape)}, "
                f"latents {list(latents.shape)}; "
                f"expected [..., {self.b_dec.numel()}] for the first two and [..., {self.d_sae}] for the latents."
            )
        x = x.reshape(-1, x.shape[-1]).double()
        y = reconstruction.reshape(x.shape).double()
        dot, x_sq, y_sq = (x * y).sum(-1), x.square().sum(-1), y.square().sum(-1)
        offset = self.b_dec if constant is None else constant.reshape(x.shape).double()
        y_centred = y - offset
        tiny = torch.finfo(torch.float64).tiny
        has_norm = x_sq != 0  # NaN is counted, so that it stays visible
        self.tokens += x.shape[0]
        live = self._count_active(latents) if isinstance(latents, SparseLatents) else self._count(latents)
        self._sum_x += x.sum(0)
        self._sums += torch.stack(
            [
                x_sq.sum(),
                y_sq.sum(),
                dot.sum(),
                (x - y).square().sum(),
                y_centred.square().sum(),
                (y_centred * (x - offset)).sum(),
                (dot / (x_sq * y_sq).sqrt().clamp_min(tiny)).sum(),
                (y_sq.sqrt() / x_sq.sqrt()).where(has_norm, 0.0).sum(),
                has_norm.sum().double(),
                live.double(),
            ]
        )

    @torch.no_grad()
    def update_outliers(self, x: Tensor, reconstruction: Tensor) -> None:
        """Add outliers, which only count in the metrics that include them.

        Args:
            x: activations ``[..., d_out]``.
            reconstruction: ``[..., d_out]``.

        Raises:
            ShapeError: if their shapes do not fit each other.
        """
        if x.shape != reconstruction.shape or x.shape[-1:] != self.b_dec.shape:
            raise ShapeError(
                f"Given x {list(x.shape)} and reconstruction {list(reconstruction.shape)}; expected "
                f"[..., {self.b_dec.numel()}] for both."
            )
        x = x.reshape(-1, x.shape[-1]).double()
        y = reconstruction.reshape(x.shape).double()
        self.outliers += x.shape[0]
        self._outlier_sum_x += x.sum(0)
        self._outlier_sums += torch.stack([x.square().sum(), y.square().sum(), (x * y).sum(), (x - y).square().sum()])

    def _count(self, latents: Tensor) -> Tensor:
        """Add the values of all latents ``[..., d_sae]`` to the sums; return how many are not zero, ``[]``."""
        latents = latents.reshape(-1, self.d_sae)
        fired = (latents != 0).sum(0)
        self.fired += fired
        if latents.shape[0]:
            self.max_activation = torch.maximum(self.max_activation, latents.float().amax(0))
        self._sum_latents += latents.sum(0, dtype=torch.float64)
        return fired.sum()

    def _count_active(self, latents: SparseLatents) -> Tensor:
        """Add the values of the active latents to the sums; return their number, ``[]``."""
        fired = torch.bincount(latents.indices, minlength=self.d_sae)
        self.fired += fired
        self.max_activation.scatter_reduce_(0, latents.indices, latents.values.float(), "amax")
        self._sum_latents.index_add_(0, latents.indices, latents.values.double())
        return fired.sum()

    @torch.no_grad()
    def pool(self, total: Callable[[Tensor], Tensor], largest: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of the accumulators of all other processes, each of which must call this at the same time.

        Args:
            total: returns the sum of a tensor over the processes.
            largest: returns its element-wise maximum over them.
        """
        seen = self._sums.new_tensor([self.tokens, self.outliers])
        columns = [seen, self._sums, self._sum_x, self.fired.double(), self._sum_latents]
        columns += [self._outlier_sums, self._outlier_sum_x]
        pooled = total(torch.cat(columns)).split([len(column) for column in columns])
        seen, self._sums, self._sum_x, fired, self._sum_latents, self._outlier_sums, self._outlier_sum_x = pooled
        self.tokens, self.outliers = map(int, seen.tolist())
        self.fired = fired.long()
        self.max_activation = largest(self.max_activation)

    @property
    def density(self) -> Tensor:
        """Share of tokens on which each latent fired, ``[d_sae]`` float32."""
        return self.fired.float() / max(self.tokens, 1)

    @property
    def mean_activation(self) -> Tensor:
        """Mean value of each latent, zeros included, ``[d_sae]`` float32."""
        return (self._sum_latents / max(self.tokens, 1)).float()

    def compute(self) -> FidelityMetrics:
        """Return the metrics of everything seen so far.

        Raises:
            InputError: if there were no tokens.
        """
        if not self.tokens:
            raise InputError("No activations were seen: call update() with at least one token first.")
        x_sq, y_sq, dot, error, y_sq_c, dot_c, cosine, norm_ratio, nonzero, live = self._sums.tolist()
        n = self.tokens
        variance = x_sq - self._sum_x.square().sum().item() / n
        x_sq_o, y_sq_o, dot_o, error_o = self._outlier_sums.tolist()
        sum_x, count = self._sum_x + self._outlier_sum_x, n + self.outliers
        whole = x_sq + x_sq_o - sum_x.square().sum().item() / count
        return FidelityMetrics(
            tokens=n,
            l0=live / n,
            fvu=_ratio(error, variance),
            mse=error / n,
            relative_reconstruction_bias=_ratio(y_sq, dot),
            relative_reconstruction_bias_centred=_ratio(y_sq_c, dot_c),
            cosine=cosine / n,
            norm_ratio=_ratio(norm_ratio, nonzero),
            dead_fraction=(self.fired == 0).double().mean().item(),
            dense_fraction=(self.density > 0.1).double().mean().item(),
            outliers=self.outliers,
            outlier_variance=1 - _ratio(variance, whole) if self.outliers else 0.0,
            fvu_with_outliers=_ratio(error + error_o, whole),
            relative_reconstruction_bias_with_outliers=_ratio(y_sq + y_sq_o, dot + dot_o),
        )


def _ratio(numerator: float, denominator: float) -> float:
    """Divide; undefined ratios are NaN rather than an error, because an SAE with only dead latents is a result."""
    return numerator / denominator if denominator else float("nan")


def loss_recovered(clean: float, spliced: float, ablated: float) -> float:
    """Return ``(ablated - spliced) / (ablated - clean)``.

    1 is a perfect reconstruction, 0 is as bad as the ablation. It is not clipped: values above 1 or below 0 are real.

    Args:
        clean: next-token cross-entropy of the untouched model, nats per token.
        spliced: the same with the site replaced by its reconstruction.
        ablated: the same with the site replaced by zeros.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), section 4.1.

    >>> loss_recovered(clean=2.0, spliced=2.5, ablated=7.0)
    0.9
    """
    return _ratio(ablated - spliced, ablated - clean)
