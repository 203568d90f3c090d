"""Four processes: some checks of `data_parallel`, and what needs more than two processes."""

from contextlib import nullcontext

import pytest

from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.errors import CheckpointError
from hf_gated_sae.training.processes import Processes
from hf_gated_sae.training.run import assemble, measured
from tests.hooks.distributed.ranks import gathered, require_alike, run
from tests.training.distributed.data_parallel import SPLIT, require_same, trainer
from tests.training.distributed.failing import no_file_larger_than

RANKS = 4


def two_rows_of_two_train_what_one_process_does(folder):
    for name in ("resampled", "annealed"):
        architectures, settings = SPLIT[name]
        made = trainer(folder.parent / f"{name}, in a grid", architectures, 32, latent_parallel=2, **settings)
        grid = made.grid
        assert (grid.everyone.count, grid.data.count, grid.latents.count, grid.readers.count) == (4, 2, 2, 2)
        made.train()
        Processes.all().barrier()
        require_same(folder.parent, made, name)
        for trainee in made.trainees.values():
            assert trainee.sae.W_dec.shape[0] == 24
            require_alike(trainee.sae.b_dec.detach())


def the_cost_of_a_run_on_different_batches_is_measured(folder):
    text = folder / f"{Processes.all().rank}.txt"
    text.write_text("\n".join(corpus.texts("training", 20_000)), encoding="utf-8")
    run = {
        "output_dir": str(folder / "run"),
        "model": {"name": str(bundled.MODEL), "hub_id": "none"},
        "data": {"files": str(text), "context_length": 32, "sequences_per_batch": 4, "buffer_size": 128},
        "sae": {"site": "resid_post.1", "d_sae": 48},
        "training": {"max_steps": 4, "activation_batch_size": 64, "use_cpu": True, "disable_tqdm": True},
    }
    found = measured(assemble(run))
    assert found.batch == RANKS * 64 and found.training.seconds > 0 and found.activations > 0
    assert not (folder / "run").exists()


def a_disk_that_is_full_for_one_stops_both_rows(folder):
    """It is full in the middle of the weights of the first of two SAEs, for which the other processes wait."""
    everyone = Processes.all()
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, "latent_parallel": 2}
    made = trainer(folder / "disk", ("gated", "standard"), 32, **settings)
    with no_file_larger_than(1000) if everyone.rank == 0 else nullcontext():
        with pytest.raises(CheckpointError, match="checkpoint-4 could not be written .*File too large") as caught:
            made.train()
    assert len(set(gathered(str(caught.value)))) == 1 and str(caught.value).endswith("(in process 0 of 4)")
    everyone.barrier()
    assert not [path for path in (folder / "disk").rglob("*") if path.is_file()]


CHECKS = {
    check.__name__: check
    for check in (
        two_rows_of_two_train_what_one_process_does,
        the_cost_of_a_run_on_different_batches_is_measured,
        a_disk_that_is_full_for_one_stops_both_rows,
    )
}


if __name__ == "__main__":
    run(CHECKS, lambda folder: folder)
