"""Four processes in two rows that each share the SAEs: what `data_parallel` checks of two, of both at once."""

from hf_gated_sae.training.processes import Processes
from tests.hooks.distributed.ranks import require_alike, run
from tests.training.distributed.data_parallel import SPLIT, require_same, trainer

RANKS = 4


def two_rows_of_two_train_what_one_process_does(folder):
    for name in ("resampled", "annealed"):
        architectures, settings = SPLIT[name]
        made = trainer(folder.parent / f"{name}, in a grid", architectures, 32, latent_parallel=2, **settings)
        grid = made.grid
        assert (grid.everyone.count, grid.data.count, grid.latents.count, grid.readers.count) == (4, 2, 2, 2)
        made.train()
        Processes.all().together()
        require_same(folder.parent, made, name)
        for trainee in made.trainees.values():
            assert trainee.sae.W_dec.shape[0] == 24
            require_alike(trainee.sae.b_dec.detach())


CHECKS = {"two_rows_of_two_train_what_one_process_does": two_rows_of_two_train_what_one_process_does}


if __name__ == "__main__":
    run(CHECKS, lambda folder: folder)
