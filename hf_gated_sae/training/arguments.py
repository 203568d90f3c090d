"""Everything that decides a training run, with the paper's values as defaults."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..errors import InputError, unknown_name
from ..functional.outliers import OUTLIER_MULTIPLE
from .processes import require_launched
from .proportions import RECORDED, STATISTICS
from .remedies import remedies
from .statistics import CENTRES
from .supported import plain, require_makeable, require_possible, require_supported

_INHERITED_RECIPE = (
    *("optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "gradient_accumulation_steps"),
    *("max_grad_norm", "seed", "bf16", "fp16"),
)

_POSITIVE = (
    *("max_steps", "activation_batch_size", "latent_parallel", "dead_after_activations", "statistics_activations"),
    *("sparsity_power_changes", "sparsity_power_batches", "auxk_latents", "resample_inputs"),
    *("gradient_accumulation_steps", "save_total_limit"),
)

_NOT_NEGATIVE = (
    *("learning_rate", "adam_epsilon", "weight_decay", "max_grad_norm", "warmup_steps", "sparsity_warmup_steps"),
    *("lr_dip_steps", "recorded_activations", "auxk_coefficient", "pull_coefficient", "evaluations"),
)

_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules of a learning rate that does not fall towards an end."""

_SHARES = ("adam_beta1", "adam_beta2", "lr_dip")

ARGUMENTS_FILE = "training_args.json"

SCALES = ("none", "unit", "sqrt_d_in")
"""What the root mean square norm of the activations is brought to while training."""


@dataclass
class SAETrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for SAEs; what means nothing for these is refused, with the reason.

    Losses are means over activations of squared errors *summed* over the width, and `sparsity_coefficient` is in that
    unit. (The paper's tables divide the squared error by the width: multiply their Gated lambda by ``d_in``.)

    Attributes:
        max_steps: changes of the weights in all.
        activation_batch_size: activations per device and forward pass.
        latent_parallel: how many processes share an SAE, each with its part of the latents; 1 for data parallel alone.
        objective: variants of the architecture's objective, such as ``{"frozen_decoder": False}``, which are the
            fields of its `objective_class`. Of several SAEs, for all of them, or a mapping of such by their names.
        sparsity_coefficient: lambda of the objective; of several SAEs, one for all or a mapping by their names.
        sparsity_warmup_steps: steps over which lambda grows linearly from 0.
        sparsity_power_end: power of the latents in the sparsity term that it is annealed to; 1 for none of that.
        sparsity_power_steps: the step after which the power changes first, and the one after which it is at its end.
        sparsity_power_changes: how many changes there are.
        sparsity_power_batches: latest batches from which the coefficient is rescaled at each change.
        activation_scale: what the root mean square norm of the activations is scaled to while training:
            ``"sqrt_d_in"``, ``"unit"`` or ``"none"``. The scale is folded into the weights at the end, so that the SAE
            reads what the model produces.
        initial_b_dec: what the `b_dec` of a new SAE (all zeros) starts from: ``"mean"`` or ``"geometric_median"`` of
            the activations, or ``"zero"``.
        statistics_activations: sample size for the scale, the centre and the limit of norms; by default 2 % of what is
            learned, from 2,048 to 65,536.
        outlier_multiple: activations with a norm above so many times the median of that sample, at the site that is
            read or the one that is written, are not learned; the limit is recorded with the SAE (`norm_limit`). A few
            of them, such as those at attention sinks, would else be most of what it learns. None to learn them, too.
        recorded_activations: sample size for the `max_activation` and `mean_activation` that are stored with the SAE;
            by default 8 % of what is learned, from 4,096 to 131,072. 0 records nothing.
        evaluations: how often the SAEs are measured on held-out text, at equal distances, the last time at the end,
            where the stream holds some back or `eval_dataset` is given.
        unit_norm_decoder: keep decoder rows at unit norm.
        dead_after_activations: a latent silent for this many activations is dead.
        dead_latent_remedy: name of a remedy in `training/remedies/`, or None.
        resample_steps: steps at which dead latents are resampled.
        resample_inputs: latest activations, of all processes together, from which new directions are drawn.
        lr_dip: factor on the learning rate right after a resampling.
        lr_dip_steps: steps until the learning rate is back, along a cosine.
        auxk_latents: dead latents that reconstruct the error of each activation, with ``"auxk"``; half of `d_in` by
            default.
        auxk_coefficient: weight of that term.
        pull_coefficient: weight of the term of ``"pre_activation_pull"``.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D, and Bricken et al. 2023 for resampling.
    """

    learning_rate: float = 3e-4
    adam_beta1: float = 0.0
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 1000
    max_steps: int = 300_000
    save_strategy: SaveStrategy | str = "no"
    logging_steps: float = 100
    report_to: None | str | list[str] = "none"

    # What transformers would do by default is wrong for a stream of activations.
    per_device_train_batch_size: int = 1  # an item of the stream is a whole batch
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False  # fails for activations that are on a GPU already
    ignore_data_skip: bool = True  # the stream itself goes on from where it was
    logging_nan_inf_filter: bool = False  # would hide a diverged run, and waits for the device at every step

    ddp_find_unused_parameters: bool | None = False  # an objective uses all that learn

    activation_batch_size: int = 4096
    latent_parallel: int = 1
    objective: dict[str, Any] | str | None = None
    sparsity_coefficient: float | str | dict[str, float] = 1.0
    sparsity_warmup_steps: int = 1000
    sparsity_power_end: float = 1.0
    sparsity_power_steps: list[int] = field(default_factory=lambda: [15_000, 250_000])
    sparsity_power_changes: int = 10
    sparsity_power_batches: int = 10
    activation_scale: str = "sqrt_d_in"
    initial_b_dec: str = "mean"
    statistics_activations: int | None = None
    outlier_multiple: float | None = OUTLIER_MULTIPLE
    recorded_activations: int | None = None
    evaluations: int = 4
    unit_norm_decoder: bool = True
    dead_after_activations: int = 51_200_000
    dead_latent_remedy: str | None = "resample"
    resample_steps: list[int] = field(default_factory=lambda: [25_000, 50_000, 75_000, 100_000])
    resample_inputs: int = 65_536
    lr_dip: float = 0.1
    lr_dip_steps: int = 1000
    auxk_latents: int | None = None
    auxk_coefficient: float = 1 / 32
    pull_coefficient: float = 3e-6

    def __post_init__(self) -> None:
        """Check what transformers cannot know, before anything is loaded."""
        require_supported(self, {each.name: each.default for each in fields(SAETrainingArguments)})
        # By default one process would read text for all others.
        self.accelerator_config: Any = self.accelerator_config or {"dispatch_batches": False}
        super().__post_init__()
        self.max_grad_norm = self.max_grad_norm or 0.0  # transformers compares it, None too
        for name, value, known in (
            ("activation scale", self.activation_scale, SCALES),
            ("initial b_dec", self.initial_b_dec, CENTRES),
            ("dead-latent remedy", self.dead_latent_remedy, (None, *remedies)),
        ):
            if value not in known:
                raise unknown_name(name, value, known)
        self._check_ranges()
        learned = self.max_steps * self.activation_batch_size * self.gradient_accumulation_steps
        self._chose_statistics = self.statistics_activations is None
        if self.statistics_activations is None:
            self.statistics_activations = STATISTICS.of(learned)
        if self.recorded_activations is None:
            self.recorded_activations = RECORDED.of(learned)
        require_launched(self)
        require_possible(self)
        self.objective = _from_flag("objective", self.objective or {}, Mapping)
        self.sparsity_coefficient = _from_flag(
            "sparsity_coefficient", self.sparsity_coefficient, (int, float, Mapping)
        )
        _require_lambdas(self.sparsity_coefficient)
        self._check_annealing()
        require_makeable(self)
        if self.world_size % self.latent_parallel:
            raise InputError(
                f"latent_parallel is {self.latent_parallel}, and there are {self.world_size} processes; expected a "
                "divisor."
            )

    @property
    def activations_per_step(self) -> int:
        """Of all processes, between two changes of the weights."""
        rows = self.world_size // self.latent_parallel
        return self.activation_batch_size * self.gradient_accumulation_steps * rows

    @property
    def evaluation_steps(self) -> frozenset[int]:
        """The steps after which the SAEs are measured on held-out text."""
        return frozenset(-(-self.max_steps * number // self.evaluations) for number in range(1, self.evaluations + 1))

    @property
    def open_until_the_end(self) -> frozenset[str]:
        """The names of those that decide nothing before the end of a run, which can go on with others."""
        looks_ahead = plain(self.lr_scheduler_type) not in _ENDLESS or 0 < self.warmup_steps < 1
        found = {"recorded_activations", "evaluations"} | (set() if looks_ahead else {"max_steps"})
        return frozenset(found | ({"statistics_activations"} if self._chose_statistics else set()))

    def _check_ranges(self) -> None:
        for names, least, most, expected in (
            (_POSITIVE, 1, math.inf, "a positive number"),
            (_NOT_NEGATIVE, 0, sys.float_info.max, "0 or a positive number"),
            (_SHARES, 0, 1, "a number from 0 to 1"),
            (("outlier_multiple",), 1, sys.float_info.max, "a number from 1 on, or None"),
            (("seed",), 0, 2**32 - 1, "a whole number from 0 to 4294967295"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not least <= value <= most:
                    raise InputError(f"{name} is {value}; expected {expected}.")
        if 1 in (self.adam_beta1, self.adam_beta2):
            raise InputError(
                f"adam_beta1 is {self.adam_beta1} and adam_beta2 {self.adam_beta2}; expected less than 1."
            )
        if self.save_steps <= 0:
            raise InputError(f"save_steps is {self.save_steps}; expected a positive number, or save_strategy='no'.")
        if any(step < 1 for step in self.resample_steps):
            raise InputError(f"resample_steps is {self.resample_steps}; expected steps from 1 on.")

    def _check_annealing(self) -> None:
        if not 0 < self.sparsity_power_end <= 1:
            raise InputError(
                f"sparsity_power_end is {self.sparsity_power_end}; expected a power above 0, with 1 for no annealing."
            )
        steps = self.sparsity_power_steps
        if len(steps) != 2 or not 0 < steps[0] <= steps[1]:
            raise InputError(
                f"sparsity_power_steps is {steps}; expected a first and a last step, such as [1000, 9000]."
            )
        if self.sparsity_power_end < 1 and steps[1] >= self.max_steps:
            raise InputError(
                f"The sparsity's power would be annealed until step {steps[1]}, but there are max_steps = "
                f"{self.max_steps}: give sparsity_power_steps within the run."
            )

    def named(self, setting: str) -> Mapping[str, Any] | None:
        """Return a setting that is given for each of several SAEs; None if it is one for all.

        Args:
            setting: ``"sparsity_coefficient"`` or ``"objective"``.
        """
        value = getattr(self, setting)
        if not isinstance(value, Mapping):
            return None
        flags = setting == "objective" and not (value and all(isinstance(each, Mapping) for each in value.values()))
        return None if flags else value

    def of_sae(self, setting: str, name: str, default: Any = None) -> Any:
        """Return what one SAE has of a setting that may be given for each of several.

        Args:
            setting: ``"sparsity_coefficient"`` or ``"objective"``.
            name: of the SAE; empty if it is alone.
            default: for an SAE that is not named; without it every SAE has to be.

        Raises:
            UnknownNameError: if the SAE is not named.
        """
        by_name = self.named(setting)
        if by_name is None:
            return getattr(self, setting)
        if name not in by_name and default is None:
            raise unknown_name(f"SAE without a {setting}:", name, by_name)
        return by_name.get(name, default)

    def require_saes(self, names: Collection[str]) -> None:
        """Raise if a setting is given for an SAE that there is not.

        Raises:
            UnknownNameError: naming the first.
        """
        for given in (self.named("sparsity_coefficient"), self.named("objective")):
            for name in given or ():
                if name not in names:
                    raise unknown_name("SAE", name, names)

    def recipe(self) -> dict[str, Any]:
        """Return what decided the weights, as plain JSON without paths, for cards and `training_args.json`."""
        own = {f.name for f in fields(SAETrainingArguments)} - {f.name for f in fields(TrainingArguments)}
        return {name: plain(getattr(self, name)) for name in (*_INHERITED_RECIPE, *sorted(own))}

    def write_recipe(self, folder: Path) -> None:
        """Write ``training_args.json``, which is no pickle, into a folder."""
        (folder / ARGUMENTS_FILE).write_text(json.dumps(self.recipe(), indent=2) + "\n", encoding="utf-8")


def _require_lambdas(given: float | str | Mapping[str, Any]) -> None:
    """Raise unless every lambda is a number that is not negative."""
    for value in given.values() if isinstance(given, Mapping) else [given]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"sparsity_coefficient is {value!r}; expected 0 or a positive number.")


def _from_flag(name: str, value: Any, kinds: Any) -> Any:
    """Return a value, which as a flag of the command line is the text of JSON.

    Raises:
        InputError: if it is nothing of the expected kinds.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    if not isinstance(found, kinds) or isinstance(found, bool):
        expected = "a mapping" if kinds is Mapping else "a number, or a mapping of numbers by the names of SAEs"
        raise InputError(f"{name} is {value!r}; expected {expected}.")
    return found
