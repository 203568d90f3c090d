"""What each rank checks of reductions and of SAEs in parts; it also holds the whole SAE, to compare with."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import InputError
from hf_gated_sae.training.objective_call import called_through
from hf_gated_sae.training.processes import Processes
from hf_gated_sae.training.sharding import (
    GatheredActivations,
    Grid,
    latents_of,
    load_part,
    new_part,
    save_whole,
    split,
)
from hf_gated_sae.training.streams import TensorActivations
from tests.hooks.distributed.ranks import RANKS, gathered, require_alike, run
from tests.training.worlds import build

ARCHITECTURES = {
    "gated": {},
    "gated_untied": {},
    "standard": {},
    "tanh_relu": {},
    "jumprelu": {"bandwidth": 0.5},
    "glu": {"bandwidth": 0.5},
}
VARIANTS = [
    ("gated", {"frozen_decoder": False}),
    ("gated", {"weighted_by_decoder_norm": True}),
    ("gated", {"tied_b_mag": True}),
    ("standard", {"weighted_by_decoder_norm": True}),
    ("jumprelu", {"tanh_scale": 2.0}),
]
TRANSCODER = {"d_out": 5, "skip_connection": True, "site": "resid_mid.1", "site_out": "mlp_out.1"}
EXACT = 1e-12  # in float64; only the order of sums differs


def double(architecture, *, d_in=8, d_sae=48, **settings):
    return build(architecture, d_in, d_sae, randomise=True, **settings).to(torch.float64).train()


def tokens(count=64, width=8, seed=0):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def objective(sae, **variant):
    return type(sae).objective_class(**variant)


def close(found, expected, tolerance=EXACT):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def part_of(whole, processes, name, tensor):
    """Return this rank's part of a tensor of the whole SAE."""
    shared = type(whole).shared_names(whole.config)
    held = latents_of(whole.config.d_sae, processes)
    return tensor if name in shared else tensor[held.start : held.stop]


def train(sae, batches, steps, synchronise=lambda: None, **loss):
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, betas=(0.0, 0.999))
    for step in range(steps):
        optimizer.zero_grad()
        sae.training_loss(next(batches), sparsity_coefficient=0.3 + 0.01 * step, **loss).total.backward()
        synchronise()
        optimizer.step()


def batches_of(x, size):
    while True:
        yield from x.split(size)


def prepare(folder):
    assert Processes.all().count == RANKS
    return folder, Processes.all()


CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# ---------------------------------------------------------------------- reductions


@check
def reductions_are_over_all_processes(given):
    _, everyone = given
    rank = everyone.rank
    assert torch.equal(everyone.sum(torch.tensor([1.0, rank])), torch.tensor([2.0, 1.0]))
    assert torch.equal(everyone.mean(torch.tensor([1.0, rank])), torch.tensor([1.0, 0.5]))
    assert everyone.any(torch.tensor([False, rank == 1, True])).tolist() == [False, True, True]
    assert everyone.smallest(7 + rank) == 7
    assert everyone.mean_by_name({"a": 1.0, "b": 3.0 * rank}) == {"a": 1.0, "b": 1.5}


@check
def rows_come_in_the_order_of_one_process(given):
    _, everyone = given
    x = tokens(20)
    own = x[everyone.rank :: RANKS]
    assert torch.equal(everyone.gather_rows(own), x)
    numbers = torch.tensor([19, 0, 3, 3, 8])
    assert torch.equal(everyone.gather_selected_rows(own, numbers), x[numbers])


@check
def the_selection_is_that_of_all_values(given):
    _, everyone = given
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for scale in (1e-30, 1.0, 1e30):
            values = (tokens(300, 7) * scale).to(dtype)
            own = values[everyone.rank :: RANKS]
            positive = int((values > 0).sum())
            for count in (1, 100, positive // RANKS, 10_000):
                wanted = min(RANKS * count, positive)
                expected = values.flatten().sort(descending=True).values[wanted - 1]
                found = everyone.lowest_of_largest(own, count)
                assert found.dtype == dtype
                assert torch.equal(found, expected)
    assert everyone.lowest_of_largest(torch.zeros(5), 3) == 0
    only_here = torch.full((5,), 2.0 if everyone.rank else -1.0)
    assert everyone.lowest_of_largest(only_here, 4) == 2.0


@check
def the_first_text_reaches_all_processes(given):
    _, everyone = given
    assert everyone.first_text(None) is None
    assert everyone.first_text("NaN" if everyone.rank == 1 else None) == "NaN (in process 1 of 2)"
    assert everyone.first_text(f"NaN {everyone.rank}") == "NaN 0 (in process 0 of 2)"


# ---------------------------------------------------------------------- latents split over processes


@check
def gradients_of_parts_are_those_of_the_whole(given):
    _, everyone = given
    cases = [(name, settings, {}) for name, settings in ARCHITECTURES.items()]
    cases += [(name, ARCHITECTURES[name], variant) for name, variant in VARIANTS]
    cases += [("gated", {"apply_b_dec_to_input": False, **more}, {}) for more in ({}, TRANSCODER)]
    for name, settings, variant in cases:
        whole = double(name, **settings)
        if whole.config.skip_connection:
            torch.nn.init.normal_(whole.W_skip)
        part = split(whole, everyone)
        x, target = tokens(), tokens(width=whole.d_out, seed=1)
        losses = [
            sae.training_loss(x, target=target, sparsity_coefficient=0.7, objective=objective(sae, **variant))
            for sae in (whole, part)
        ]
        for loss in losses:
            loss.total.backward()
        expected, found = losses
        assert found.terms.keys() == expected.terms.keys()
        for term in expected.terms:
            close(found.terms[term], expected.terms[term])
        close(found.reconstruction, expected.reconstruction)
        held = latents_of(48, everyone)
        assert torch.equal(found.fired, expected.fired[held.start : held.stop])
        close(everyone.sum(found.l0), expected.l0, 1e-6)
        assert (expected.reconstruction - whole.constant(x)).abs().max() > 0.1
        for key, parameter in whole.named_parameters():
            grad = part.get_parameter(key).grad
            assert (grad is None) == (parameter.grad is None)
            if grad is not None:
                close(grad, part_of(whole, everyone, key, parameter.grad))
        require_alike(part.b_dec.grad)


@check
def a_part_computes_its_live_latents_alone(given):
    _, everyone = given
    whole = double("gated", d_in=16, d_sae=8192)
    whole.b_gate.data.fill_(-2.6)
    if everyone.rank == 1:
        whole.b_gate.data.fill_(-1.0)  # so many latents are active that this rank takes the dense path
    distributed.broadcast(whole.b_gate.data[:4096], 0)
    distributed.broadcast(whole.b_gate.data[4096:], 1)
    part = split(whole, everyone)
    x = tokens(512, 16)
    losses = [sae.training_loss(x, sparsity_coefficient=0.7) for sae in (whole, part)]
    for loss in losses:
        loss.total.backward()
    assert gathered(isinstance(losses[1].latents, torch.Tensor)) == [False, True]
    for key, parameter in whole.named_parameters():
        close(part.get_parameter(key).grad, part_of(whole, everyone, key, parameter.grad), 1e-10)


@check
def training_in_parts_is_training_of_the_whole(given):
    _, everyone = given
    for name, settings in ARCHITECTURES.items():
        whole = double(name, **settings)
        part = split(whole, everyone)
        for sae in (whole, part):
            train(sae, batches_of(tokens(256), 32), 12)
        for key, tensor in whole.state_dict().items():
            close(part.state_dict()[key], part_of(whole, everyone, key, tensor), 1e-9)
        require_alike(part.b_dec.detach())
        close(part.reconstruct(tokens()), whole.reconstruct(tokens()), 1e-9)
        close(part(tokens()).reconstruction, whole(tokens()).reconstruction, 1e-9)


@check
def a_grid_splits_tokens_or_latents(given):
    _, everyone = given
    stream = TensorActivations(tokens(100), seed=3)
    expected = next(stream.batches(32))[""]
    for width in (1, 2):
        grid = Grid.arrange(width, stream, "cpu")
        assert (grid.latents.count, grid.data.count, grid.readers.count) == (width, RANKS // width, width)
        found = next(grid.part(stream).batches(32 // grid.data.count))[""]
        assert torch.equal(grid.data.gather_rows(found), expected)
    with pytest.raises(InputError, match=r"2 processes cannot be arranged in rows of 3"):
        Grid.arrange(3, stream, "cpu")


@check
def latents_that_compete_are_not_split(given):
    _, everyone = given
    for name in ("topk", "batch_topk", "matching_pursuit"):
        with pytest.raises(InputError, match="which latents are active depends on all of them"):
            split(build(name), everyone)
    with pytest.raises(InputError, match=r"d_sae = 49 latents .* over 2 processes; the next number that can is 50"):
        split(build("gated", d_sae=49), everyone)


# ---------------------------------------------------------------------- disk


@check
def parts_are_saved_as_one_checkpoint(given):
    folder, everyone = given
    for name, settings in ARCHITECTURES.items():
        whole = build(name, d_sae=48, randomise=True, **settings)
        part = split(whole, everyone)
        for size in (40 * 10**9, 2000):
            place = folder / f"{name}-{size}"
            save_whole(part, place, bytes_per_file=size)
            everyone.barrier()
            stored = SAEModel.from_pretrained(place)
            assert type(stored) is type(whole)
            for key, tensor in whole.state_dict().items():
                assert torch.equal(stored.state_dict()[key], tensor)
            weights = [path.name for path in place.glob("*.safetensors")]
            assert (weights == ["model.safetensors"]) == (size > 2000)
            again = load_part(place, processes=everyone)
            for key, tensor in part.state_dict().items():
                assert torch.equal(again.state_dict()[key], tensor)
            close(again.double()(tokens()).reconstruction, whole.double()(tokens()).reconstruction)
            whole.float()
        if everyone.rank == 0:
            whole.save_pretrained(folder / f"{name}-plain")
            plain = (folder / f"{name}-plain" / "config.json").read_text()
            assert (folder / f"{name}-{40 * 10**9}" / "config.json").read_text() == plain
        everyone.barrier()


@check
def a_new_sae_is_never_whole(given):
    _, everyone = given
    config = build("gated").config
    part = new_part(config, everyone, seed=3)
    assert part.W_dec.shape == (24, 8)
    close(part.W_dec.norm(dim=-1), torch.ones(24), 1e-6)
    first, second = gathered(part.W_dec.detach())
    assert (first @ second.T).abs().max() < 1 - 1e-3  # no direction twice
    assert torch.equal(part.W_dec, new_part(config, everyone, seed=3).W_dec)


# ---------------------------------------------------------------------- tokens split over processes


@check
def a_threshold_over_the_batch_is_that_of_the_whole_batch(given):
    _, everyone = given
    whole, own = (double("batch_topk", k=4, threshold_momentum=0.5) for _ in range(2))
    for sae in (whole, own):
        sae.b_enc.data.zero_()
    own.data_group = everyone
    x = tokens(256)
    train(whole, batches_of(x, 64), 12)
    mine = (batch[everyone.rank :: RANKS] for batch in batches_of(x, 64))
    train(own, mine, 12, lambda: everyone.average_gradients(own))
    assert whole.threshold > 0
    for key, tensor in whole.state_dict().items():
        close(own.state_dict()[key], tensor, 1e-6)
        require_alike(own.state_dict()[key])


@check
def gathered_batches_and_samples_are_those_of_one_process(given):
    _, everyone = given
    x = tokens(500)
    plain, own = TensorActivations(x, seed=3), TensorActivations(x, seed=3).shard(everyone.rank, RANKS)
    stream = GatheredActivations(own, everyone, everyone)
    expected, found = plain.batches(64), stream.batches(64)
    for _ in range(20):
        assert torch.equal(next(found)[""], next(expected)[""])
    assert torch.equal(torch.cat([each[""] for each in stream.sample(400)]), next(plain.sample(400))[""])
    position = stream.state_dict()
    other = GatheredActivations(TensorActivations(x, seed=3).shard(everyone.rank, RANKS), everyone, everyone)
    other.load_state_dict(position)
    assert torch.equal(next(other.batches(64))[""], next(expected)[""])
    apart = GatheredActivations(own, everyone, Processes())
    assert torch.equal(everyone.gather_rows(next(apart.batches(32))[""]), next(plain.batches(64))[""])
    with pytest.raises(InputError, match="Batches of 63"):
        stream.batches(63)


# ---------------------------------------------------------------------- weights split over processes (FSDP2)


@check
def fully_sharded_training_is_that_of_one_process(given):
    _, everyone = given
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, settings in ARCHITECTURES.items():
        whole, own = (double(name, **settings) for _ in range(2))
        fully_shard(own, mesh=mesh)
        assert all(isinstance(each, DTensor) for each in own.parameters())
        assert own.W_dec.to_local().shape == (24, 8)
        x = tokens(256)
        train(whole, batches_of(x, 32), 12)
        optimizer = torch.optim.Adam(own.parameters(), lr=1e-2, betas=(0.0, 0.999))
        batches = batches_of(x, 32)
        for step in range(12):
            optimizer.zero_grad()

            def losses(batch, own=own, step=step):
                return vars(own.training_loss(batch, sparsity_coefficient=0.3 + 0.01 * step))

            called_through(own, own, losses, next(batches)[everyone.rank :: RANKS])["total"].backward()
            optimizer.step()
        for key, parameter in whole.named_parameters():
            close(own.get_parameter(key).full_tensor(), parameter, 1e-9)


if __name__ == "__main__":
    run(CHECKS, prepare)
