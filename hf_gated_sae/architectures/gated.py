"""The Gated SAE of Rajamanoharan et al. 2024 (arXiv 2404.16014)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..errors import InputError
from ..functional.activations import lowest_projection
from ..functional.support import Support
from ..modeling import Objective, SAEConfig, SAEModel, Sparsity, TrainingLoss, squared_error
from .jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from .standard import StandardSAE

SAE = TypeVar("SAE", bound=SAEModel)


@dataclass(frozen=True)
class GateObjective(Objective):
    """``|y - y^|^2 + lambda |relu(gate)|_1 + |y - decode_frozen(relu(gate))|^2``.

    The auxiliary term decodes with copies of the decoder and its bias that receive no gradient; without the term
    nothing would hold the gate open. The decoder's rows are expected to have unit norm. With the defaults every
    gradient flows as in the paper's appendix G; each flag is a variant that was compared with it. `y` is the target,
    `y^` the reconstruction, `gate` the pre-activations of the gate, and `lambda` the sparsity coefficient.

    Attributes:
        frozen_decoder: whether the auxiliary term gives the decoder no gradient.
        auxiliary: whether there is an auxiliary term.
        weighted_by_decoder_norm: penalise ``|W_dec[i]| relu(gate_i)`` rather than ``relu(gate_i)``, for decoders whose
            rows do not have unit norm. The product is raised to the power of the penalty. With `frozen_decoder` the
            norm receives no gradient.

    Source: arXiv 2404.16014, section 3.2.2 and appendix G; section 5.1 for the variants.
    """

    anneals: ClassVar[bool] = True
    penalises: ClassVar[bool] = True

    frozen_decoder: bool = True
    auxiliary: bool = True
    weighted_by_decoder_norm: bool = False

    @abstractmethod
    def _halves(self, sae: SAEModel, x: Tensor) -> tuple[Support, Tensor, Tensor]:
        """Return the support of the objective, the gates' pre-activations on it, and the latents."""

    def loss(self, sae: SAEModel, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Return the objective on some activations; arguments as for `Objective.loss`."""
        support, gate, latents = self._halves(sae, x)
        opened, constant = torch.relu(gate), sae.constant(x)
        values = [latents, opened] if self.auxiliary else [latents]
        written = support.decode_each(values, sae.W_dec, [False, self.frozen_decoder][: len(values)])
        reconstruction = written[0] + constant
        terms = {"reconstruction": squared_error(target, reconstruction)}
        W_dec, frozen_constant = (each.detach() if self.frozen_decoder else each for each in (sae.W_dec, constant))
        paid = opened
        if self.weighted_by_decoder_norm:
            paid = opened * sae._take(W_dec.norm(dim=-1), support.latents)
        terms["sparsity"] = sparsity.coefficient * support.mean_sum(sparsity.penalty(paid))
        if self.auxiliary:
            terms["auxiliary"] = squared_error(target, written[1] + frozen_constant)
        return TrainingLoss.of(terms, reconstruction, support.code(latents))


@dataclass(frozen=True)
class GatedObjective(GateObjective):
    """The objective of a `GatedSAE`, whose two halves share one encoder.

    Attributes:
        learn_r_mag: whether the magnitudes have a scale of their own, beside a bias of their own.
        tied_b_mag: keep ``b_mag = exp(r_mag) * b_gate``, with which both halves turn on at the same point: a ReLU
            times a scale that is not penalised, without a jump.
        rescale_and_shift: train only `r_mag` and `b_mag`, from the reconstruction alone; for
            `GatedSAE.from_standard`.

    Source: arXiv 2404.16014, sections 5.1 and 5.2.
    """

    learn_r_mag: bool = True
    tied_b_mag: bool = False
    rescale_and_shift: bool = False

    def __post_init__(self) -> None:
        """Refuse flags that contradict each other."""
        if self.rescale_and_shift and replace(self, rescale_and_shift=False) != GatedObjective():
            raise InputError(
                "rescale_and_shift=True trains only r_mag and b_mag, from the reconstruction alone, which excludes "
                "the other flags: leave them at their defaults."
            )

    def _halves(self, sae: GatedSAE, x: Tensor) -> tuple[Support, Tensor, Tensor]:
        b_mag = sae.r_mag.exp() * sae.b_gate if self.tied_b_mag else sae.b_mag
        support = sae._support(x, -sae.b_gate)
        return support, *sae.halves(support.projection, support.latents, b_mag)

    def loss(self, sae: GatedSAE, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Return the objective on some activations; arguments as for `Objective.loss`."""
        loss = super().loss(sae, x, target, sparsity)
        if not self.rescale_and_shift:
            return loss
        terms = {"reconstruction": loss.terms["reconstruction"]}
        return TrainingLoss.of(terms, loss.reconstruction, loss.latents)

    def frozen(self, sae: SAEModel) -> frozenset[str]:
        """Return the names of the parameters that are not trained."""
        if self.rescale_and_shift:
            return frozenset(name for name, _ in sae.named_parameters()) - {"r_mag", "b_mag"}
        fixed = {"r_mag": not self.learn_r_mag, "b_mag": self.tied_b_mag}
        return frozenset(name for name, still in fixed.items() if still)

    @torch.no_grad()
    def constrain(self, sae: GatedSAE) -> None:
        """Set `b_mag` to its tied value if it is tied."""
        if self.tied_b_mag:
            sae.b_mag.copy_(sae.r_mag.exp() * sae.b_gate)


@strict
class GatedSAEConfig(SAEConfig):
    """Configuration of a `GatedSAE`."""

    model_type = "gated_sae"


class GatedSAE(SAEModel):
    r"""An SAE in which two halves of one encoder decide which latents are on, and how strongly.

    ``gate = (x - b_dec) @ W_enc + b_gate``;
    ``magnitude = relu(exp(r_mag) * ((x - b_dec) @ W_enc) + b_mag)``;
    ``latents = [gate > 0] * magnitude``.

    `W_enc` is the paper's ``W_gate``; ``W_mag = exp(r_mag) * W_gate`` is tied to it and never stored.

    Attributes:
        b_gate: gate bias ``[d_sae]``.
        b_mag: magnitude bias ``[d_sae]``.
        r_mag: log of the magnitude encoder's scale per latent ``[d_sae]``.

    Source: arXiv 2404.16014, sections 3.2.1 (encoder) and 3.2.2 (loss).
    """

    config: GatedSAEConfig
    config_class = GatedSAEConfig
    objective_class = GatedObjective

    def __init__(self, config: GatedSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_gate = nn.Parameter(torch.empty(config.rows))
        self.b_mag = nn.Parameter(torch.empty(config.rows))
        self.r_mag = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def halves(self, projection: Tensor, latents: Tensor | None, b_mag: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the gate's pre-activation and the latents; one matrix product serves both halves.

        Args:
            projection: ``(x - b_dec) @ W_enc``, ``[..., d_sae]``, or of the selected latents.
            latents: rows of the selected latents; None for all.
            b_mag: another magnitude bias ``[d_sae]`` than the SAE's own.
        """
        gate = projection + self._take(self.b_gate, latents)
        scale = self._take(self.r_mag, latents).exp()
        magnitude = torch.relu(projection * scale + self._take(self.b_mag if b_mag is None else b_mag, latents))
        return gate, magnitude * (gate > 0)

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        return self.halves(projection, latents)[1]

    def _cut(self) -> Tensor:
        # Rounding moves the scaled projection by a share of itself, so that the magnitude's own cut needs a margin.
        magnitude = lowest_projection(torch.zeros_like(self.b_mag), self.b_mag / self.r_mag.exp())
        return torch.maximum(-self.b_gate, magnitude)

    @torch.no_grad()
    def to_jumprelu(self) -> JumpReLUSAE:
        """Return the JumpReLU SAE that computes the same function.

        ``threshold = max(b_mag - exp(r_mag) * b_gate, 0)``; where that difference is negative the magnitude's ReLU,
        and not the gate, decides which latents are on.

        Source: arXiv 2404.16014, appendix E.
        """
        r_mag, b_mag, b_gate = (_wide(each) for each in (self.r_mag, self.b_mag, self.b_gate))
        scale = r_mag.exp()
        return converted(
            JumpReLUSAE(JumpReLUSAEConfig(**shared_settings(self.config))),
            self,
            W_enc_T=scale[:, None] * self.W_enc_T,
            b_enc=self.b_mag,
            threshold=torch.relu(b_mag - scale * b_gate),
        )

    @classmethod
    @torch.no_grad()
    def from_standard(cls, sae: StandardSAE) -> GatedSAE:
        """Return the Gated SAE that computes the same function: ``r_mag = 0``, both biases `b_enc`.

        Trained further with ``GatedObjective(rescale_and_shift=True)`` it is the paper's "rescale & shift", which
        shows how much of the Gated SAE's gain is due to curing shrinkage alone.

        Source: arXiv 2404.16014, section 5.2.
        """
        return converted(
            cls(GatedSAEConfig(**shared_settings(sae.config))),
            sae,
            W_enc_T=sae.W_enc_T,
            b_gate=sae.b_enc,
            b_mag=sae.b_enc,
            r_mag=torch.zeros_like(sae.b_enc),
        )

    @classmethod
    @torch.no_grad()
    def from_jumprelu(cls, sae: JumpReLUSAE) -> GatedSAE:
        """Return the Gated SAE that computes the same function: ``r_mag = 0``, ``b_gate = b_enc - threshold``."""
        return converted(
            cls(GatedSAEConfig(**shared_settings(sae.config))),
            sae,
            W_enc_T=sae.W_enc_T,
            b_mag=sae.b_enc,
            b_gate=sae.b_enc - sae.threshold,
            r_mag=torch.zeros_like(sae.b_enc),
        )


def shared_settings(config: SAEConfig) -> dict[str, Any]:
    """Return the settings that every architecture's configuration has."""
    return {name: getattr(config, name) for name in SAEConfig.__annotations__ if name != "has_no_defaults_at_init"}


def converted(target: SAE, source: SAEModel, **tensors: Tensor) -> SAE:
    """Fill `target` with the given tensors and those that have the same meaning in both.

    All get the dtype of the source's decoder, except that tensors kept in float32 are never narrower.
    """
    names = (
        "W_dec",
        "b_dec",
        "max_activation",
        "mean_activation",
        *(("W_skip",) if source.config.skip_connection else ()),
    )
    state = {**{name: getattr(source, name) for name in names}, **tensors}
    nn.Module.to(target, device=source.W_dec.device, dtype=source.W_dec.dtype)
    for name in target._keep_in_fp32_modules_strict:
        kept = getattr(target, name)
        kept.data = kept.data.to(_wide(state[name]).dtype)
    target.load_state_dict(state)
    return target.train(source.training)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
