"""Checks that transformers' settings apply to SAEs and are possible on this machine.

A setting that is refused here would otherwise be ignored, or fail after a language model had been loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames, trainer_log_levels

from ..errors import InputError, unknown_name

if TYPE_CHECKING:
    from .arguments import SAETrainingArguments

_EVALUATES = (
    "needs an evaluation data set, and a stream has none: call evaluate(model, sae, tokens) on the trained SAE"
)
_COMPILES = "is not supported: compiled code would bypass the synchronisation of processes; omit it"
_ONE_LAYER = "is for models of many layers, and an SAE has one: omit it"
_LANGUAGE = "is for language models, and an SAE reads neither tokens nor labels: omit it"
_LOADS = "is for loading data sets, and a stream yields whole batches: omit it"

UNSUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(("eval_strategy", "do_eval", "do_predict", "eval_on_start", "load_best_model_at_end"), _EVALUATES),
    **dict.fromkeys(("eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better"), _EVALUATES),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only"), _EVALUATES),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILES),
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs"), _ONE_LAYER),
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs", "parallelism_config"), _ONE_LAYER),
    **dict.fromkeys(("neftune_noise_alpha", "label_smoothing_factor", "include_num_input_tokens_seen"), _LANGUAGE),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _LANGUAGE),
    **dict.fromkeys(("train_sampling_strategy", "dataloader_drop_last", "dataloader_persistent_workers"), _LOADS),
    **dict.fromkeys(("dataloader_prefetch_factor", "dataloader_multiprocessing_context"), _LOADS),
    "dataloader_num_workers": "must be 0: the training process itself computes the activations",
    "per_device_train_batch_size": "has no effect on SAEs: use activation_batch_size",
    "num_train_epochs": "has no effect, as a stream has no end: use max_steps",
    "auto_find_batch_size": (
        "would halve per_device_train_batch_size, which has no effect on SAEs: omit it; the error when memory runs "
        "out states an activation_batch_size that fits"
    ),
    "data_seed": "is not used: the stream has its own seed",
    "ignore_data_skip": "must be True: the stream resumes from its own position",
    "enable_jit_checkpoint": "would write a checkpoint in the middle of a step: use save_steps",
    "save_on_each_node": (
        "would leave a part of the checkpoint on every machine and a whole one on none: omit it, and give an "
        "output_dir on a disk that all processes see"
    ),
    "push_to_hub": (
        "would publish transformers' own card and a pickle of these arguments: train first, then call "
        "sae.push_to_hub(...)"
    ),
}
"""Why an inherited setting has to keep its default, by its name."""

_OFF = (None, False, "no")

OPTIMISERS_BY_LAYER = ("galore", "apollo", "lomo", "adalomo")
"""Prefixes of the optimisers that treat the layers of a language model separately, by their names."""

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "swanlab", "clearml", "codecarbon", "dvclive")
"""Values of ``report_to`` that equal the name of the package to install."""


def require_supported(args: TrainingArguments, defaults: Mapping[str, Any]) -> None:
    """Raise for a setting that does not apply to SAEs, before transformers acts on it.

    Args:
        args: not yet changed by transformers.
        defaults: of the settings, by name.

    Raises:
        InputError: naming the first such setting, and what to do instead.
        UnknownNameError: for an unknown optimiser or log level, with close matches.
    """
    for name, why in UNSUPPORTED.items():
        value, default = (plain(each) for each in (getattr(args, name, None), defaults.get(name)))
        off = value in _OFF and default in _OFF
        if name in defaults and value != default and not off:
            raise InputError(f"{name}={value!r} {why}.")
    if plain(args.save_strategy) == "best":
        raise InputError(f"save_strategy='best' {_EVALUATES}.")
    for name in ("save_strategy", "logging_strategy"):
        if plain(getattr(args, name)) == "epoch":
            raise InputError(f"{name}='epoch' counts epochs, which a stream does not have: use 'steps'.")
    for name in ("log_level", "log_level_replica"):
        if getattr(args, name) not in trainer_log_levels:
            raise unknown_name(name, getattr(args, name), trainer_log_levels)
    optimisers = [each.value for each in OptimizerNames]
    if plain(args.optim) not in optimisers:
        raise unknown_name("optim", plain(args.optim), optimisers)
    if any(str(plain(args.optim)).startswith(each) for each in OPTIMISERS_BY_LAYER):
        raise InputError(f"optim={plain(args.optim)!r} {_ONE_LAYER}.")


def require_possible(args: SAETrainingArguments) -> None:
    """Raise for settings that are impossible on this device, or with this arrangement of processes.

    Raises:
        InputError: with what to use instead.
    """
    if args.device.type == "mps":
        raise InputError(
            "Activations are measured with sums in float64, which Apple's GPUs do not have: pass use_cpu=True "
            "(--training.use_cpu true on the command line)."
        )
    if args.fp16 and args.device.type == "cpu":
        raise InputError("fp16=True is not supported on a CPU: use bf16=True, or neither.")
    if args.fp16 and args.latent_parallel > 1:
        raise InputError(
            f"fp16=True skips steps that overflow, and the {args.latent_parallel} processes that share an SAE would "
            "skip different ones: use bf16=True, which needs no loss scaling."
        )


def require_makeable(args: TrainingArguments) -> None:
    """Raise if trackers, schedule or optimiser cannot be created, before the model is loaded.

    Raises:
        InputError: with the reason.
    """
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise InputError(f"report_to is {args.report_to}: {error}") from error
    for name in args.report_to or ():
        available = name in get_available_reporting_integrations() or importlib.util.find_spec(name) is not None
        if name in TRACKERS and not available:
            raise InputError(f"report_to is {name!r}, which is not installed here: pip install {name}.")
    weights = torch.zeros(1, requires_grad=True)
    warmup, kwargs = args.get_warmup_steps(args.max_steps), args.lr_scheduler_kwargs or {}
    if kwargs and plain(args.lr_scheduler_type) in ("constant", "constant_with_warmup"):
        raise InputError(
            f"lr_scheduler_kwargs is {kwargs}, and {plain(args.lr_scheduler_type)!r} takes none: omit it, or use "
            "another lr_scheduler_type."
        )
    try:
        get_scheduler(args.lr_scheduler_type, torch.optim.SGD([weights], lr=1.0), warmup, args.max_steps, kwargs)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"lr_scheduler_type {plain(args.lr_scheduler_type)!r} with lr_scheduler_kwargs {kwargs} cannot be "
            f"created: {error}."
        ) from error
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        kind([weights], **settings)
    except (ImportError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        given = f" with optim_args {args.optim_args!r} (expected name=value, ...)" if args.optim_args else ""
        raise InputError(f"optim {plain(args.optim)!r}{given} cannot be created: {error}") from error


def plain(value: Any) -> Any:
    """Return the string of a transformers enumeration, and any other value unchanged."""
    return getattr(value, "value", value)
