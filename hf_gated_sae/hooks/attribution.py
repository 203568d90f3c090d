"""`attribute`: how much each active latent of each token moves a number that is computed from the model's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import AttachError, InputError, UnknownNameError, unknown_name
from ..functional.short_repr import short_repr
from ..functional.sparse_latents import SparseLatents
from ..interventions import special_token_ids
from ..interventions.base import require_written_width, sites_read, sites_written
from ..modeling import SAEModel
from ..sites import Slot
from ..sites.slots import TensorPath
from ..sites.transforms import view
from .apply import exact_dtype
from .attach import require_model
from .capture import on_device_of, require_autograd, require_fitting, run_again, sae_input, sites_needed
from .dispatch import prove
from .observation import CountedTokens, Observation
from .token_batches import with_positions

Metric = Callable[[Any], Tensor]
"""Takes the model's output and returns one number that depends on it, such as a difference of two logits."""

METHODS = ("gradient", "integrated")

NUMBERS_AT_ONCE = 1 << 22
"""Maximum number of values in decoder rows that are gathered at once."""


class LatentEffect(NamedTuple):
    """What one latent does at one token.

    Attributes:
        sae: the SAE.
        row: row of the batch.
        token: column of the batch.
        latent: number of the latent.
        attribution: `activation` times `gradient`: by how much zero-ablating it lowers the metric, to first order.
        activation: the latent's value.
        gradient: derivative of the metric with respect to it.
    """

    sae: SAEModel
    row: int
    token: int
    latent: int
    attribution: float
    activation: float
    gradient: float

    def __repr__(self) -> str:
        """Return the fields, the SAE by its class."""
        return short_repr(self)


@dataclass(frozen=True, eq=False)
class Attribution:
    """The effect of SAEs' active latents on a metric; latents that are not active have none by definition.

    Attributes:
        metric: value of the metric.
        activations: the active latents of each SAE, of ``[B, S]`` tokens; none at tokens that are left out.
        gradients: the metric's derivative with respect to each of them, ``[live]`` by SAE.
    """

    metric: float
    activations: Mapping[SAEModel, SparseLatents]
    gradients: Mapping[SAEModel, Tensor]

    __repr__ = short_repr

    def __getitem__(self, sae: SAEModel) -> SparseLatents:
        """Return the attributions of one SAE, ``latents * gradients``, of ``[B, S]`` tokens.

        Raises:
            UnknownNameError: if the metric was not attributed to it.
        """
        if sae not in self.activations:
            raise UnknownNameError("The metric was not attributed to this SAE: pass it to attribute().")
        live = self.activations[sae]
        return SparseLatents(live.offsets, live.indices, live.values * self.gradients[sae], live.shape)

    def per_latent(self, sae: SAEModel) -> Tensor:
        """Return the attributions of one SAE, summed over all tokens, ``[d_sae]``."""
        values = self[sae]
        return values.values.new_zeros(values.d_sae).index_add_(0, values.indices, values.values)

    def top(self, k: int, sae: SAEModel | None = None) -> list[LatentEffect]:
        """Return the latents that matter most, by size of their attribution.

        Args:
            k: how many at most.
            sae: only of this SAE; of all by default.
        """
        chosen = list(self.activations) if sae is None else [sae]
        effects = [effect for each in chosen for effect in self._largest(each, k)]
        return sorted(effects, key=lambda effect: -abs(effect.attribution))[:k]

    def _largest(self, sae: SAEModel, k: int) -> Iterator[LatentEffect]:
        values, live = self[sae], self.activations[sae]
        found = values.values.abs().topk(min(k, len(values.values))).indices
        columns = live.shape[1]
        table = (live.tokens[found], values.indices[found], values.values[found], live.values[found])
        for token, latent, value, activation, gradient in zip(
            *(column.tolist() for column in (*table, self.gradients[sae][found])), strict=True
        ):
            yield LatentEffect(sae, token // columns, token % columns, latent, value, activation, gradient)


class _Leaves(Observation):
    """Keeps activations to take gradients with respect to them, and may add to what the model continues with.

    Args:
        places: where to look.
        written: at which of them gradients are wanted.
        added: by site, what to add.
    """

    def __init__(
        self,
        places: Collection[TensorPath],
        written: Collection[TensorPath],
        added: Mapping[TensorPath, Tensor] | None = None,
    ) -> None:
        super().__init__(places, grad=written)
        self.added = added or {}

    def kept(self, value: Tensor) -> Tensor:
        """Return a leaf at the first site, so that the graph before it is released."""
        first = not any(place in self.seen for place in self.grad)
        return super().kept(value.detach() if first else value)

    def going_on(self, place: TensorPath, kept: Tensor) -> Tensor:
        """Return the activation with what is added there."""
        if place not in self.added:
            return super().going_on(place, kept)
        added = self.added[place]
        wide = torch.promote_types(kept.dtype, added.dtype)
        return (kept.to(wide) + added.to(kept.device, wide)).to(kept.dtype)


def attribute(
    model: Any,
    saes: Sequence[SAEModel] | SAEModel,
    metric: Metric,
    *,
    method: str = "gradient",
    steps: int = 10,
    special_tokens: bool = False,
    **inputs: Any,
) -> Attribution:
    """Attribute a number computed from the model's output to latents: ``latents * d metric / d latents``.

    Every latent writes into its site, ``x + (latents' - latents) @ W_dec``, and the error term is kept; so the
    derivative is ``(d metric / d x) @ W_dec.T``: one forward and one backward for all SAEs, read at active latents.
    Where the model continues from one SAE's site to another's, the derivative of the first includes what happens
    through the second. Neither the model's outputs nor its parameters' gradients are touched. Latents are those of
    the edited activation where interventions are attached.

    ``"integrated"`` takes the mean derivative on the straight path from all latents at 0 to their values, for all SAEs
    together, by the midpoint rule: the attributions then sum to the decrease of the metric when everything that the
    latents of the clean run write is subtracted. For several SAEs of one residual stream this differs from ablating
    all their latents, since the later SAEs would then read another activation.

    Args:
        model: any Hugging Face causal LM; its parameters need not require gradients.
        saes: one or several, whose configurations name the sites; transcoders and cross-layer transcoders too.
        metric: takes the model's output and returns one number.
        method: ``"gradient"`` or ``"integrated"``.
        steps: number of points on the path, each with a forward and a backward; only for ``"integrated"``.
        special_tokens: also attribute to latents of special tokens, on which SAEs are usually not trained. These are
            the tokens that an SAE has recorded, or else those of the model, see `special_token_ids`.
        **inputs: the model's inputs, such as ``input_ids`` and ``attention_mask``. Where padding precedes tokens,
            ``position_ids`` are derived from the mask, unless they are given.

    Returns:
        Active latents, derivatives and attributions.

    Raises:
        InputError: for something that is not an SAE, a crosscoder, or an SAE whose latents depend on other tokens; if
            the metric is not one finite number that depends on what the SAEs write; and in inference mode.
        SiteError: if a site does not exist in this model or could not be proven.
        ShapeError: if an SAE is not as wide as a site, or the tensor there does not have a vector for each token.
        AttachError: if the forward did not reach a site, or the model is compiled, or in training mode with reentrant
            gradient checkpointing.

    Source: attribution patching (Nanda 2023); integrated gradients (arXiv 1703.01365).
    """
    _require_graph(model)
    _require_method(method, steps)
    chosen: list[SAEModel] = [saes] if isinstance(saes, SAEModel) else list(saes)
    read, slots = _proven(model, chosen)
    whole = _Pass(model, chosen, slots, metric, with_positions(model, inputs))
    value, gradients, seen = whole.run()
    parts = []
    for sae in chosen:
        special = special_token_ids(model, sae)
        counted = CountedTokens.of(model, inputs, special_tokens=special_tokens, special_ids=special)
        parts.append(_Part(sae, read[sae], slots, seen, counted))
    if method == "integrated":
        gradients = whole.mean_gradients(parts, steps)
    return Attribution(
        metric=value,
        activations={part.sae: part.numbered for part in parts},
        gradients={part.sae: part.derivatives(gradients) for part in parts},
    )


def _proven(model: Any, saes: Sequence[SAEModel]) -> tuple[dict[Any, list[str]], dict[str, Slot]]:
    """Return the names of the sites that each SAE reads, and the slots of all that they read and write.

    Raises:
        InputError: if latents of one of them cannot be attributed to.
        SiteError: if a site does not exist in this model or could not be proven.
        ShapeError: if an SAE is not as wide as a site.
    """
    for sae in saes:
        _require_attributable(sae)
    read = sites_needed("attribute()", saes)
    slots = prove(model, [str(site) for sae in saes for site in (*sites_read(sae), *sites_written(sae))])
    require_fitting(read, slots)
    for sae in saes:
        for site in map(str, sites_written(sae)):
            require_written_width(sae, site, slots[site].width)
    return read, slots


class _Pass:
    """Runs forwards of one input and backwards of one metric."""

    def __init__(
        self,
        model: Any,
        saes: Sequence[SAEModel],
        slots: Mapping[str, Slot],
        metric: Metric,
        inputs: Mapping[str, Any],
    ) -> None:
        self.model, self.slots, self.metric, self.inputs = model, slots, metric, inputs
        self.written = {slots[str(site)].tensor_path.bare: str(site) for sae in saes for site in sites_written(sae)}

    def run(
        self, added: Mapping[TensorPath, Tensor] | None = None
    ) -> tuple[float, dict[TensorPath, Tensor], dict[TensorPath, Tensor]]:
        """Return the metric, its derivatives with respect to the activations written, and all activations."""
        leaves = _Leaves({slot.tensor_path.bare for slot in self.slots.values()}, self.written, added)
        with torch.enable_grad():
            output = leaves.run(self.model, self.slots, self.inputs)
            value = self._value(output)
            del output
            wanted = [leaves.seen[place] for place in self.written]
            found = torch.autograd.grad(value, wanted, allow_unused=True)
        for (_, site), gradient in zip(self.written.items(), found, strict=True):
            if gradient is None:
                raise InputError(
                    f"The metric does not depend on the activation at {site}: compute it from outputs that the model "
                    "computes after that site, or leave out the SAEs that write there."
                )
        seen = {place: x.detach() for place, x in leaves.seen.items()}
        return float(value.detach()), dict(zip(self.written, found, strict=True)), seen

    def mean_gradients(self, parts: Sequence[_Part], steps: int) -> dict[TensorPath, Tensor]:
        """Return the mean derivative on the path from all latents at 0 to their values."""
        full: dict[TensorPath, Tensor] = {}
        for part in parts:
            for place, written in part.writes():
                full[place] = full[place] + written.to(full[place].device) if place in full else written
        mean: dict[TensorPath, Tensor] = {}
        for step in range(steps):
            missing = 1 - (step + 0.5) / steps
            _, gradients, _ = self.run({place: -missing * written for place, written in full.items()})
            for place, gradient in gradients.items():
                mean[place] = mean.get(place, 0) + gradient / steps
        return mean

    def _value(self, output: Any) -> Tensor:
        value: object = self.metric(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"The metric returned {shape}; expected a tensor with one number, such as "
                "output.logits[0, -1, 7] - output.logits[0, -1, 9]."
            )
        if not value.requires_grad:
            raise InputError(
                "The metric does not depend on what the SAEs write: compute it without .item(), .detach() or "
                "torch.no_grad(), from outputs that the model computes after their sites."
            )
        if not torch.isfinite(value):
            raise InputError(f"The metric is {value.item()}; expected a finite number.")
        return value.reshape(())


class _Part:
    """One SAE's active latents in a pass, what they write, and the derivatives with respect to them.

    Args:
        sae: the SAE.
        read: names of the sites that it reads.
        slots: of all sites.
        seen: activations by site, ``[B, S, d]``, or with virtual tokens before the others.
        counted: which tokens count.
    """

    def __init__(
        self,
        sae: SAEModel,
        read: Sequence[str],
        slots: Mapping[str, Slot],
        seen: Mapping[TensorPath, Tensor],
        counted: CountedTokens,
    ) -> None:
        self.sae, self.seen, self.counted = sae, seen, counted
        self.shape = tuple(counted.mask.shape)
        self.where = counted.mask.reshape(-1).nonzero().squeeze(1).to(sae.b_dec.device)
        self.written = [slots[str(site)].tensor_path for site in sites_written(sae)]
        self.read = [slots[site].tensor_path for site in read]
        chosen = [self._chosen(place, view(seen[place.bare], place.transforms).value) for place in self.read]
        with torch.no_grad(), exact_dtype(sae.b_dec.device):
            self.live = sae.encode_sparse(sae_input(sae, chosen))

    def _chosen(self, place: TensorPath, x: Tensor) -> Tensor:
        """Return a tensor of a site at the counted tokens, on the SAE's device and in its dtype."""
        return on_device_of(self.sae, self.counted.chosen(x, str(place)))

    @property
    def numbered(self) -> SparseLatents:
        """The active latents of all tokens ``[B, S]``, by their numbers in the whole SAE."""
        kept, live = self.sae.config.kept_latents, self.live
        indices = live.indices if kept is None else live.indices.new_tensor(kept)[live.indices]
        shape = (*self.shape, self.sae.config.d_sae)
        return SparseLatents.of(self.where[live.tokens], indices, live.values, shape)

    def derivatives(self, gradients: Mapping[TensorPath, Tensor]) -> Tensor:
        """Return the derivative with respect to each active latent, ``[live]``, given those at the sites written."""
        total = self.live.values.new_zeros(len(self.live.values))
        for output, place in enumerate(self.written):
            gradient = self._chosen(place, gradients[place.bare] * self._factor(place)) * self._scale(output)
            for some, tokens, rows in self._decoder_rows(output):
                total[some] += torch.linalg.vecdot(rows, gradient[tokens])
        return total

    def writes(self) -> Iterator[tuple[TensorPath, Tensor]]:
        """Yield what the active latents write at each site, shaped like the activation there and in its units."""
        for output, place in enumerate(self.written):
            written = self.sae.b_dec.new_zeros(len(self.where), self.sae.d_out)
            for some, tokens, rows in self._decoder_rows(output):
                written.index_add_(0, tokens, rows * self.live.values[some].unsqueeze(-1))
            x = self.seen[place.bare]
            full = written.new_zeros(self.shape[0] * self.shape[1], self.sae.d_out)
            full[self.where] = written * self._scale(output)
            full = nn.functional.pad(full.reshape(*self.shape, -1), (0, 0, x.shape[1] - self.shape[1], 0))
            yield place.bare, full.to(x.device) * self._factor(place)

    def _decoder_rows(self, output: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield active latents in parts: their slice, their tokens, and their decoder rows at an output."""
        size, tokens = max(1, NUMBERS_AT_ONCE // self.sae.d_out), self.live.tokens
        for start in range(0, len(tokens), size):
            some = slice(start, min(start + size, len(tokens)))
            with torch.no_grad():
                yield some, tokens[some], self.sae.rows_at(self.live.indices[some], output)

    def _scale(self, output: int) -> Tensor | float:
        """Return the factor by which the decoder's output is scaled at each counted token, ``[n, 1]``."""
        place = self.written[output]
        scale = self.sae.written_scale(self._chosen(place, view(self.seen[place.bare], place.transforms).value))
        return 1.0 if scale is None else scale

    def _factor(self, place: TensorPath) -> Tensor | float:
        """Return the factor from a change seen through a site's transforms to the change of the activation."""
        return view(self.seen[place.bare], place.transforms).factor


def _require_method(method: str, steps: int) -> None:
    """Raise unless the method exists and there is at least one step.

    Raises:
        InputError: naming the methods, or the least number of steps.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if steps < 1:
        raise InputError(f"attribute() was given steps={steps}; expected at least 1.")


def _require_graph(model: Any) -> None:
    """Raise unless a forward of the model leaves a graph without gaps.

    Raises:
        InputError: if it is not a model, or in inference mode.
        AttachError: if the model is compiled, or uses reentrant gradient checkpointing.
    """
    require_model("attribute()", model)
    require_autograd("attribute()")
    if any(run_again(model).values()):
        raise AttachError(
            "The model uses reentrant gradient checkpointing, which gives no gradients with respect to activations: "
            "call model.eval() first, or enable checkpointing with use_reentrant=False."
        )


def _require_attributable(sae: object) -> None:
    """Raise if latents of an SAE depend on other tokens, or write several sites of one residual stream.

    Raises:
        InputError: saying why not.
    """
    if not isinstance(sae, SAEModel):
        raise InputError(f"attribute() was given {type(sae).__name__} as an SAE; expected SAEs.")
    if not sae.per_token:
        raise InputError(
            f"attribute() was given a {type(sae).__name__}, whose latents depend on earlier tokens, so that what a "
            "latent writes is not a single decoder row."
        )
    if len(sae.config.sites_written) > 1 and not sae.config.is_transcoder:
        raise InputError(
            "attribute() was given a crosscoder, whose latents write several sites of one residual stream: what is "
            "written at one would be counted again at the next."
        )
