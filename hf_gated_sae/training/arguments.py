"""All settings of a training run, with the paper's values as defaults."""

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
"""Learning-rate schedules that do not depend on the length of the run."""

_FRACTIONS = ("adam_beta1", "adam_beta2", "lr_dip")

ARGUMENTS_FILE = "training_args.json"

SCALES = ("none", "unit", "sqrt_d_in")
"""Root mean square norms to which activations are scaled in training."""


@dataclass
class SAETrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for SAEs; settings without a meaning for SAEs are refused, with the reason.

    Losses are means over activations of squared errors *summed* over the width, which sets the scale of
    `sparsity_coefficient`. (The paper's tables divide the squared error by the width: multiply their Gated lambda by
    ``d_in``.)

    Attributes:
        max_steps: number of optimiser steps.
        activation_batch_size: activations per device and forward pass.
        latent_parallel: number of processes that share an SAE, each with some of its latents; 1 for data parallel.
        objective: options of the architecture's objective, such as ``{"frozen_decoder": False}``: the fields of its
            `objective_class`. With several SAEs, options for all of them, or a mapping from SAE names to options.
        sparsity_coefficient: lambda of the objective; with several SAEs, one for all or a mapping by SAE name.
        sparsity_warmup_steps: steps over which lambda grows linearly from 0.
        sparsity_power_end: power to which the latents' power in the sparsity term is annealed; 1 for no annealing.
        sparsity_power_steps: the step after which the power first changes, and the one after which it is final.
        sparsity_power_changes: number of changes.
        sparsity_power_batches: latest batches from which the coefficient is rescaled at each change.
        activation_scale: root mean square norm to which activations are scaled in training: ``"sqrt_d_in"``,
            ``"unit"`` (1) or ``"none"``. The scale is folded into the weights at the end, so that the SAE reads the
            model's own activations.
        initial_b_dec: initial value for the `b_dec` of a new SAE (all zeros): ``"mean"`` or ``"geometric_median"`` of
            the activations, or ``"zero"``.
        statistics_activations: sample size for the scale, the centre and the norm limit; by default 2 % of the
            activations trained on, from 2,048 to 65,536.
        outlier_multiple: activations with a norm above this multiple of that sample's median, at the site read or the
            site written, are not trained on; the limit is recorded with the SAE (`norm_limit`). A few of them, such as
            attention sinks, would otherwise dominate the loss. None to train on them too.
        recorded_activations: sample size for the `max_activation` and `mean_activation` stored with the SAE; by
            default 8 % of the activations trained on, from 4,096 to 131,072. 0 records nothing.
        evaluations: number of evaluations on held-out text, evenly spaced, the last one at the end, if the stream
            holds some back or `eval_dataset` is given.
        unit_norm_decoder: keep decoder rows at unit norm.
        dead_after_activations: a latent that has not fired for this many activations is dead.
        dead_latent_remedy: name of a remedy in `training/remedies/`, or None.
        resample_steps: steps at which dead latents are resampled.
        resample_inputs: latest activations, over all processes, from which new directions are drawn.
        lr_dip: factor on the learning rate right after a resampling.
        lr_dip_steps: steps until the learning rate has recovered, along a cosine.
        auxk_latents: number of dead latents that reconstruct the error of each activation, with ``"auxk"``; half of
            `d_in` by default.
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

    # The defaults of transformers are wrong for a stream of activations.
    per_device_train_batch_size: int = 1  # an item of the stream is a whole batch
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False  # fails for activations that are already on a GPU
    ignore_data_skip: bool = True  # the stream resumes from its own position
    logging_nan_inf_filter: bool = False  # would hide a diverged run, and waits for the device at every step

    ddp_find_unused_parameters: bool | None = False  # an objective uses every trainable parameter

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
        """Check the settings specific to SAEs, before anything is loaded."""
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
        activations = self.max_steps * self.activation_batch_size * self.gradient_accumulation_steps
        self._chose_statistics = self.statistics_activations is None
        if self.statistics_activations is None:
            self.statistics_activations = STATISTICS.of(activations)
        if self.recorded_activations is None:
            self.recorded_activations = RECORDED.of(activations)
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
                f"latent_parallel is {self.latent_parallel} with {self.world_size} processes; expected a divisor of "
                f"{self.world_size}."
            )

    @property
    def activations_per_step(self) -> int:
        """Activations of all processes together between two optimiser steps."""
        rows = self.world_size // self.latent_parallel
        return self.activation_batch_size * self.gradient_accumulation_steps * rows

    @property
    def evaluation_steps(self) -> frozenset[int]:
        """The steps after which the SAEs are measured on held-out text."""
        return frozenset(-(-self.max_steps * number // self.evaluations) for number in range(1, self.evaluations + 1))

    @property
    def changeable_on_resume(self) -> frozenset[str]:
        """Names of the settings that have no effect before the end of a run: a resumed run may change them."""
        looks_ahead = plain(self.lr_scheduler_type) not in _ENDLESS or 0 < self.warmup_steps < 1
        found = {"recorded_activations", "evaluations"} | (set() if looks_ahead else {"max_steps"})
        return frozenset(found | ({"statistics_activations"} if self._chose_statistics else set()))

    def _check_ranges(self) -> None:
        for names, least, most, expected in (
            (_POSITIVE, 1, math.inf, "a positive number"),
            (_NOT_NEGATIVE, 0, sys.float_info.max, "0 or a positive number"),
            (_FRACTIONS, 0, 1, "a number from 0 to 1"),
            (("outlier_multiple",), 1, sys.float_info.max, "a number of at least 1, or None"),
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
            raise InputError(f"resample_steps is {self.resample_steps}; expected steps of at least 1.")

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
        """Return a setting that is given by SAE name; None if one value applies to all.

        Args:
            setting: ``"sparsity_coefficient"`` or ``"objective"``.
        """
        value = getattr(self, setting)
        if not isinstance(value, Mapping):
            return None
        flags = setting == "objective" and not (value and all(isinstance(each, Mapping) for each in value.values()))
        return None if flags else value

    def of_sae(self, setting: str, name: str, default: Any = None) -> Any:
        """Return one SAE's value of a setting that may be given by SAE name.

        Args:
            setting: ``"sparsity_coefficient"`` or ``"objective"``.
            name: of the SAE; empty for a single SAE.
            default: for an SAE that is not named; without a default every SAE has to be named.

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
        """Raise if a setting is given for an SAE that does not exist.

        Raises:
            UnknownNameError: naming the first.
        """
        for given in (self.named("sparsity_coefficient"), self.named("objective")):
            for name in given or ():
                if name not in names:
                    raise unknown_name("SAE", name, names)

    def recipe(self) -> dict[str, Any]:
        """Return the settings that determine the weights, as plain JSON without paths."""
        own = {f.name for f in fields(SAETrainingArguments)} - {f.name for f in fields(TrainingArguments)}
        return {name: plain(getattr(self, name)) for name in (*_INHERITED_RECIPE, *sorted(own))}

    def write_recipe(self, folder: Path) -> None:
        """Write ``training_args.json`` into a folder."""
        (folder / ARGUMENTS_FILE).write_text(json.dumps(self.recipe(), indent=2) + "\n", encoding="utf-8")


def _require_lambdas(given: float | str | Mapping[str, Any]) -> None:
    """Raise unless every lambda is a number that is not negative."""
    for value in given.values() if isinstance(given, Mapping) else [given]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"sparsity_coefficient is {value!r}; expected 0 or a positive number.")


def _from_flag(name: str, value: Any, kinds: Any) -> Any:
    """Return a value, parsed from JSON if it is text from the command line.

    Raises:
        InputError: if it has none of the expected types.
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
