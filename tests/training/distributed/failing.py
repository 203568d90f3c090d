"""Runs of `SAETrainer` in two processes that fail while training, or before it."""

import resource
import signal
from contextlib import contextmanager, nullcontext

import pytest
import torch

from hf_gated_sae.errors import CheckpointError, InputError, TrainingError
from hf_gated_sae.training import TensorActivations
from hf_gated_sae.training.processes import Processes
from hf_gated_sae.training.sharding import split
from tests.hooks.distributed.ranks import gathered, run
from tests.training.distributed.data_parallel import prepare, trainer
from tests.training.worlds import D_IN, activations, build

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class Poisoned(TensorActivations):
    """Returns NaN in process 1 from the sixth read on."""

    calls = 0

    def rows(self, rows):
        self.calls += 1
        found = super().rows(rows)
        return {site: x * torch.nan if self.rank == 1 and self.calls > 5 else x for site, x in found.items()}


@check
def a_nonfinite_value_in_one_process_stops_both(given):
    folder, _ = given
    for latents in (1, 2):
        stream = Poisoned(activations(700, seed=0).double(), seed=1)
        made = trainer(folder / f"nan {latents}", ("gated", "standard"), 32, stream, latent_parallel=latents)
        with pytest.raises(TrainingError, match=r"was stopped before it changed any weight: activation") as caught:
            made.train()
        first, second = gathered(str(caught.value))
        assert first == second
        assert f"in process {2 - latents} of 2" in first  # processes that share an SAE have both read it


class Breaking(TensorActivations):
    """Fails in process 1 after a number of reads, or at the first."""

    after, calls = 5, 0

    def rows(self, rows):
        self.calls += 1
        if self.rank == 1 and self.calls > self.after:
            raise InputError("The text is gone. Bring it back.")
        return super().rows(rows)


@check
def a_read_error_in_one_process_stops_both_with_its_reason(given):
    folder, _ = given
    for latents in (1, 2):
        for after, settings in ((5, {"gradient_accumulation_steps": 2}), (5, {}), (-1, {})):
            stream = Breaking(activations(700, seed=0).double(), seed=1)
            stream.after = after
            made = trainer(folder / "broken", ("gated",), 32, stream, latent_parallel=latents, **settings)
            with pytest.raises(InputError, match=r"The text is gone. Bring it back. \(in process 1 of 2\)") as caught:
                made.train()
            first, second = gathered(str(caught.value))
            assert first == second


class BreakingSites(Breaking):
    """The same with sites of different widths, in another order than the SAEs', in bfloat16."""

    def __init__(self):
        x = activations(700, seed=0).bfloat16()
        super().__init__({"mlp_out.0": x[:, :8], "resid_post.1": x, "mlp_out.2": x}, seed=1)


@check
def a_read_error_in_one_process_stops_both_with_several_sites(given):
    folder, _ = given
    for after in (5, 0):
        stream = BreakingSites()
        stream.after = after
        saes = {site: build("gated", D_IN, 48, site=site) for site in ("mlp_out.2", "resid_post.1")}
        made = trainer(folder / "broken", saes, 32, stream, latent_parallel=2)
        with pytest.raises(InputError, match=r"The text is gone. Bring it back. \(in process 1 of 2\)"):
            made.train()


@contextmanager
def no_file_larger_than(size):
    """Limit the size of files, as a nearly full disk would, in this process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@check
def a_result_that_cannot_be_written_stops_both(given):
    folder, everyone = given
    for latents in (1, 2):
        place = folder / f"full {latents}"
        made = trainer(place, ("gated", "standard"), 32, latent_parallel=latents, max_steps=2)
        if everyone.rank == 0:
            place.mkdir(exist_ok=True)
            (place / "gated").write_text("a file")
        everyone.barrier()
        with pytest.raises(CheckpointError, match=r"Training has finished, but .*in process 0 of 2.*"):
            made.train()
        place = folder / f"nearly full {latents}"
        made = trainer(place, ("gated", "standard"), 32, latent_parallel=latents, max_steps=2)
        with no_file_larger_than(1000) if everyone.rank == 0 else nullcontext():
            with pytest.raises(CheckpointError, match="Training has finished, but .*File too large") as caught:
                made.train()
        first, second = gathered(str(caught.value))
        assert first == second


@check
def a_disk_that_is_full_for_one_stops_both_and_leaves_the_last_good_checkpoint(given):
    """Process 0 fails while it writes the weights or after that; process 1, while it writes its own state."""
    folder, everyone = given
    for latents, rank, size in ((1, 0, 1000), (2, 0, 1000), (2, 0, 12_000), (1, 1, 1000), (2, 1, 1000)):
        place = folder / f"disk {latents} {rank} {size}"
        settings = {"save_strategy": "steps", "save_steps": 4, "latent_parallel": latents}
        whole = trainer(place, ("gated", "standard"), 32, max_steps=4, **settings)
        whole.train()
        made = trainer(place, ("gated", "standard"), 32, max_steps=12, **settings)
        with no_file_larger_than(size) if everyone.rank == rank else nullcontext():
            with pytest.raises(CheckpointError, match="checkpoint-8 could not be written .*File too large") as caught:
                made.train(resume_from_checkpoint=True)
        first, second = gathered(str(caught.value))
        assert first == second and f"newest whole checkpoint is {place}/checkpoint-4" in first
        assert first.endswith(f"(in process {rank} of 2)")
        everyone.barrier()
        assert not list(place.glob(".unfinished/*")) and not (place / "checkpoint-8").exists()
        everyone.barrier()
        again = trainer(place, ("gated", "standard"), 32, max_steps=12, **settings)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 12


@check
def checkpoints_need_a_shared_disk(given):
    folder, everyone = given
    here = folder / f"machine {everyone.rank}"
    made = trainer(here, ("gated",), 32, save_strategy="steps", save_steps=4)
    with pytest.raises(InputError, match="where not all processes see the files of the first one"):
        made.train()
    assert not here.exists() or not list(here.iterdir())
    made = trainer(here, ("gated",), 32, max_steps=4)
    made.train()  # without checkpoints the first process alone writes
    assert (here / "gated").exists() == (everyone.rank == 0)


@check
def unsupported_settings_are_refused(given):
    folder, _ = given
    for settings, why in (
        ({"latent_parallel": 3}, "latent_parallel is 3 with 2 processes; expected a divisor of 2"),
        ({"latent_parallel": 2, "dead_latent_remedy": "auxk"}, "which needs all dead latents in one process"),
    ):
        with pytest.raises(InputError, match=why):
            trainer(folder / "refused", ("gated",), **settings)
    with pytest.raises(InputError, match="which latents are active depends on all of them"):
        trainer(folder / "refused", ("topk",), latent_parallel=2)
    part = split(build("gated", D_IN, 48), Processes.all())
    with pytest.raises(InputError, match="latent_parallel is 1: pass latent_parallel=2, or the whole SAE"):
        trainer(folder / "refused", {"": part})
    with pytest.raises(
        InputError, match="save_on_each_node=True would leave a part of the checkpoint on every machine"
    ):
        trainer(folder / "refused", ("gated",), save_on_each_node=True)


@check
def processes_that_transformers_does_not_detect_are_refused(given):
    folder, _ = given
    with pytest.raises(InputError, match="2 processes were started, but transformers detects 1,.*use_cpu=True"):
        trainer(folder / "refused", ("gated",), use_cpu=False)


if __name__ == "__main__":
    run(CHECKS, prepare)
