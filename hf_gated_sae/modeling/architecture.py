"""What an architecture defines."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from torch import Tensor, nn

from ..functional import cpu
from ..functional.dense_support import DenseSupport
from ..functional.linear import linear
from ..functional.parallel import DataParallelGroup, LatentParallelGroup, LatentParallelSupport
from ..functional.sparse_latents import SparseLatents
from ..functional.support import Support
from .objective import Objective
from .pretrained import PretrainedSAE
from .sparse_encoding import select_sparse

if TYPE_CHECKING:
    from .model import SAEModel


class ArchitectureContract(PretrainedSAE):
    """The properties and equations by which architectures differ; `SAEModel` is built on them.

    The defaults are those of the paper's SAE. Define `_activate` if the encoder is one matrix product and each latent
    is a function of its own projection; with `_cut` active latents are found without computing the others. To keep a
    number of latents per token, derive from `TopKBaseSAE` and define `latents_per_token` and `_choose`. Define
    `_encode` in every other case.
    """

    W_enc_T: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    # ------------------------------------------------------------------ properties

    elementwise: ClassVar[bool] = True
    """Whether a latent depends on its own pre-latent only, so that a few latents cost a few encoder rows."""

    sliceable: ClassVar[bool] = True
    """Whether a few latents can be held alone: whether every tensor is one row per latent, or shared by all."""

    per_token: ClassVar[bool] = True
    """Whether a token's latents depend on that token alone. Otherwise `encode` and `decode` need whole sequences,
    ``[..., seq, d_in]`` from the first position on, and `decode` needs the activations, too."""

    one_site: ClassVar[bool] = True
    """Whether one vector of one site is encoded by itself. Otherwise `input_shape` begins with an axis of sites, and
    there is no single `W_enc_T` or `W_dec`."""

    signed: ClassVar[bool] = False
    """Whether latents can be negative."""

    tied: ClassVar[bool] = False
    """Whether the encoder is the decoder's transpose: there is no `W_enc_T`, and `d_out` is `d_in`."""

    encoder_names: ClassVar[tuple[str, ...]] = ("W_enc_T",)
    """Matrices ``[d_sae, d_in]`` whose rows are the directions to read; a new latent gets the same row in each."""

    homogeneous: ClassVar[bool] = True
    """Whether multiplying input, biases and thresholds by a positive factor multiplies latents and output by it."""

    objective_class: ClassVar[type[Objective]] = Objective
    """The training objective; its fields select variants."""

    latent_group: LatentParallelGroup | None = None
    """The processes that hold the rest of the latents, if this SAE holds a part of them."""

    data_group: DataParallelGroup | None = None
    """The processes that train the same SAE on the rest of a batch, if any; for what depends on the whole batch."""

    # ------------------------------------------------------------------ equations

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        """Encode normalised activations by `_activate` of `_project`; `latents` selects rows, None means all."""
        activated: Tensor = self._activate(self._project(x, latents), latents)
        return activated

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        """Turn projections into latents; `latents` has the row of each projection, None means all rows in order."""
        raise NotImplementedError(f"{type(self).__name__} must define _encode or _activate.")

    def _cut(self) -> Tensor | None:
        """Return the cut ``[d_sae]``: `_activate` gives 0 for a projection at or below it; None if there is no cut.

        This must hold however sums and products are rounded: a cut that is too low costs time, one that is too high
        loses latents.
        """
        return None

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the indices and values of the selected latents, ``[..., k]`` each; None without a selection."""
        return None

    def _centred(self, x: Tensor) -> Tensor:
        """Return what the encoder's matrix is applied to: ``x - b_dec``, or `x` without `apply_b_dec_to_input`."""
        shift = self._shift()
        return x if shift is None else x - shift

    def _shift(self) -> Tensor | None:
        """Return what is subtracted from the input, ``[d_in]``; None without `apply_b_dec_to_input`."""
        if not self.config.apply_b_dec_to_input:
            return None
        return self.b_dec if self.latent_group is None else self.latent_group.alike(self.b_dec)

    def _project(self, x: Tensor, latents: Tensor | None) -> Tensor:
        """Return ``(x - b_dec) @ W_enc`` (``x @ W_enc`` without `apply_b_dec_to_input`) for the selected latents."""
        return linear(self._centred(x), self._take(self.W_enc_T, latents))

    @staticmethod
    def _take(parameter: Tensor, latents: Tensor | None) -> Tensor:
        """Select rows of a per-latent parameter."""
        return parameter if latents is None else parameter.index_select(0, latents)  # half the overhead of [latents]

    def _select_sparse(self, x: Tensor) -> SparseLatents | None:
        """Return the selected latents of normalised activations ``[tokens, d_in]``; None without a selection."""
        return select_sparse(cast("SAEModel", self), x)

    @property
    def encodes_projections(self) -> bool:
        """Whether `encode` is `_activate` of the encoder's product, one projection for each latent."""
        return type(self)._encode is ArchitectureContract._encode

    # ------------------------------------------------------------------ training

    def _support(self, x: Tensor, cut: Tensor | None) -> Support:
        """Return the projections that an objective is computed from.

        Args:
            x: activations ``[..., d_in]``.
            cut: ``[d_sae]``; projections at or below it do not affect the objective. None if all may affect it.
        """
        shift = self._shift()
        live = None if cut is None else cpu.support_above(x, shift, self.W_enc_T, cut.detach())
        support = DenseSupport(x, shift, self.W_enc_T) if live is None else live
        return support if self.latent_group is None else LatentParallelSupport(support, self.latent_group)

    def margins(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return the margins of some latents: how far each is above the point where it turns on, negative if below.

        Where latents compete to be kept (TopK), that point is a pre-latent of 0.

        Args:
            x: activations ``[n, d_in]``.
            latents: rows ``[m]``.

        Returns:
            ``[n, m]``, with gradients to the encoder and to the parameters that determine that point.
        """
        cut = self._cut()
        if cut is None:
            raise NotImplementedError(f"{type(self).__name__} must define margins.")
        return linear(self._centred(x), self.W_enc_T.index_select(0, latents)) - cut.index_select(0, latents)
