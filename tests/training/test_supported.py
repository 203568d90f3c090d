"""Every setting of transformers is either used or refused: none is accepted and then ignored."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from hf_gated_sae.errors import InputError
from hf_gated_sae.training import SAETrainer, SAETrainingArguments
from hf_gated_sae.training.supported import OPTIMISERS_BY_LAYER, UNSUPPORTED, require_possible

from .worlds import D_IN, activations, build

pytestmark = pytest.mark.slow

RECIPE = {
    *("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm"),
    *("bf16", "fp16", "seed"),
}
"""Settings that decide the weights."""

USED = {
    *("output_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level"),
    *("log_level_replica", "logging_nan_inf_filter", "disable_tqdm", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "save_strategy", "save_steps"),
    *("save_total_limit", "save_only_model", "use_cpu", "tf32", "full_determinism", "torch_empty_cache_steps"),
    *("accelerator_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout", "debug", "skip_memory_metrics", "local_rank"),
    "restore_callback_states_from_checkpoint",
}
"""Settings of a run that do not change the weights."""

REFUSED_BY_THE_TRAINER = {"fsdp", "fsdp_config", "deepspeed"}

ONLY_WITH_OTHERS = {
    *("eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics", "batch_eval_metrics"),
    *("bf16_full_eval", "fp16_full_eval"),
    *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    *("do_train", "resume_from_checkpoint", "optim_target_modules", "use_cache", "average_tokens_across_devices"),
    *("remove_unused_columns", "label_names", "length_column_name", "dataloader_pin_memory", "dataloader_in_order"),
}
"""Settings that act only together with a refused one, or in scripts."""

OTHER_VALUES: dict[str, Any] = {
    "eval_strategy": "steps",
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "include_num_input_tokens_seen": "all",
    "train_sampling_strategy": "group_by_length",
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_num_workers": 2,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1.0,
    "data_seed": 3,
    "eval_steps": 3,
    "eval_delay": 2,
    "metric_for_best_model": "loss",
    "per_device_eval_batch_size": 4,
    "eval_accumulation_steps": 2,
    "ignore_data_skip": False,
    "parallelism_config": object(),
}
"""A value other than the default, for settings that are not switches."""


def test_every_inherited_setting_is_known() -> None:
    inherited = {each.name for each in fields(TrainingArguments) if each.init}
    known = [RECIPE, USED, set(UNSUPPORTED), REFUSED_BY_THE_TRAINER, ONLY_WITH_OTHERS]
    assert sum(map(len, known)) == len(set().union(*known)), "each setting is listed once"
    assert inherited == set().union(*known) & inherited, sorted(inherited - set().union(*known))


@pytest.mark.parametrize("name", sorted(set(UNSUPPORTED) & {each.name for each in fields(TrainingArguments)}))
def test_unsupported_settings_are_refused(arguments: Callable[..., SAETrainingArguments], name: str) -> None:
    environment = dict(os.environ)
    with pytest.raises(InputError, match=f"^{name}="):
        arguments(**{name: OTHER_VALUES.get(name, True)})
    assert dict(os.environ) == environment, "transformers would leave it in the environment"
    default = {each.name: each.default for each in fields(SAETrainingArguments)}[name]
    arguments(**{name: default})


@pytest.mark.parametrize(
    "settings, phrase",
    [
        *(
            ({"optim": f"{name}_adamw" if name in ("galore", "apollo") else name}, "many layers")
            for name in OPTIMISERS_BY_LAYER
        ),
        ({"save_strategy": "best"}, "needs an evaluation data set"),
        ({"optim": "adamw_anyprecision"}, "optim 'adamw_anyprecision' cannot be created: Please install"),
        ({"optim_args": "fused"}, r"with optim_args 'fused' \(expected name=value, ...\) cannot be created"),
        ({"optim": "lion_3bit"}, r"lion_3bit.*lion_32bit"),
        ({"optim": "schedule_free_adamw"}, "cannot be created: You need to install"),
    ],
)
def test_optimisers_that_cannot_be_created_are_refused_before_anything_is_loaded(
    arguments: Callable[..., SAETrainingArguments], settings: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(InputError, match=phrase):
        arguments(**settings)


def test_a_max_grad_norm_of_none_turns_clipping_off(arguments: Callable[..., SAETrainingArguments]) -> None:
    made = SAETrainer(build("gated", D_IN), arguments(max_grad_norm=None), activations(500, seed=0))
    made.train()
    assert made.args.max_grad_norm == 0.0


def test_compilation_by_accelerate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --dynamo_backend` sets this in every process; DDP's forward would never be called."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", DynamoBackend.INDUCTOR.value)
    code = """
import torch
from hf_gated_sae import GatedSAE, GatedSAEConfig
from hf_gated_sae.training import SAETrainer, SAETrainingArguments
args = SAETrainingArguments(output_dir="never", use_cpu=True, max_steps=2)
SAETrainer(GatedSAE(GatedSAEConfig(d_in=4, d_sae=8)), args, torch.randn(9, 4))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "InputError: SAETrainer does not support compilation by accelerate" in ended.stderr, ended.stderr


def test_a_device_without_float64_is_refused(
    arguments: Callable[..., SAETrainingArguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = arguments()
    monkeypatch.setattr(SAETrainingArguments, "device", torch.device("mps"))
    with pytest.raises(InputError, match="float64, which Apple's GPUs do not have: pass use_cpu=True"):
        require_possible(made)
