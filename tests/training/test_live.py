"""A run in which few latents are active, so that a step computes these alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_gated_sae.functional import SparseLatents
from hf_gated_sae.training import SAETrainer

from .test_trainer import quiet
from .worlds import D_IN, activations, build

WIDE = 4096


def wide():
    sae = build("gated", D_IN, WIDE)
    sae.b_gate.data.fill_(-2.5)
    sae.b_gate.data[:7] = -1e6
    return sae


class Watched(SAETrainer):
    """Records the type of the latents in every loss; makes them dense if `dense`."""

    def __init__(self, *args, dense: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.kinds = set()
        trainee, step = self.trainees[""], self.trainees[""].loss

        def loss(*args):
            found = step(*args)
            self.kinds.add(type(found.latents))
            return replace(found, latents=found.latents.dense()) if dense else found

        trainee.loss = loss


def test_counters_and_logs_are_those_of_all_latents(arguments):
    logs, silent, weights = [], [], []
    for dense in (False, True):
        args = arguments(
            **{"max_steps": 6, "activation_batch_size": 512, "sparsity_coefficient": 5.0, "learning_rate": 1e-4},
            **{"logging_steps": 2, "dead_after_activations": 1000, "resample_steps": [4]},
        )
        trainer = quiet(Watched(wide(), args, activations(3000, seed=0), dense=dense))
        trainer.train()
        assert trainer.kinds == {SparseLatents}
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        silent.append(trainer.trainees[""].dead.silent_for)
        weights.append(trainer.trainees[""].sae.W_dec.detach())
    assert len(logs[0]) == 3 and 1 < logs[0][0]["l0"] < WIDE / 48
    for live, dense in zip(*logs, strict=True):
        assert live == pytest.approx(dense, rel=1e-9)
    assert torch.equal(*silent) and torch.equal(*weights)
    assert trainer.trainees[""].remedy.resampled >= 7
