"""Checks of fully sharded data parallelism, run on every rank and compared with a model that is not sharded."""

import copy

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_gated_sae import Ablate, Splice, Steer, attach, capture, resolve
from hf_gated_sae.sites import multi_rank
from tests.hooks.distributed.ranks import RANKS, require_alike, run
from tests.hooks.support import IDS, active_latents, close, hooks_on, logits_of, make_sae
from tests.support.tiny_models import tiny_model

FAMILIES = ("llama", "gpt2")
OWN = torch.roll(IDS, 1)  # the second rank's batch where ranks have different batches


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def shard(model, **policy):
    """Shard a model in place, as usual: each block, then the rest."""
    for block in blocks(model):
        fully_shard(block, **policy)
    return fully_shard(model, **policy)


def prepare(folder):
    models = {"folder": folder}
    for family in FAMILIES:
        models[family] = shard(tiny_model(family)), tiny_model(family)
    return models


def edits():
    return [Splice(make_sae()), Steer(make_sae(seed=4), 3, strength=3.0), Ablate(make_sae(site="attn_out.2"), [1, 2])]


def is_sharded(model):
    """Whether the blocks hold only this rank's shards of their weights, as they do between forwards."""
    return all(isinstance(value, DTensor) for block in blocks(model) for value in block.parameters())


CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@check
def the_sites_are_those_of_the_whole_model(models):
    for family in FAMILIES:
        sharded, plain = models[family]
        hooks = hooks_on(sharded)
        assert type(blocks(sharded)[0]).__name__.startswith("FSDP")
        found, expected = resolve(sharded), resolve(plain)
        assert found.names() == expected.names()
        assert [str(found[n].tensor_path) for n in found.names()] == [
            str(expected[n].tensor_path) for n in expected.names()
        ]
        assert all(found[name].tensor_path.shards is None for name in found.names())
        assert hooks_on(sharded) == hooks  # FSDP's own
        assert is_sharded(sharded)


@check
def edits_and_captures_are_those_of_one_process(models):
    for family in FAMILIES:
        sharded, plain = models[family]
        clean = logits_of(plain)
        with attach(plain, *edits()):
            expected = logits_of(plain)
        with attach(sharded, *edits()) as handle:
            assert torch.equal(logits_of(sharded), expected)
            assert all(entry.calls == 1 for entry in handle.report().interventions)
        assert not torch.equal(expected, clean)
        assert torch.equal(logits_of(sharded), clean)
        names = resolve(plain).names()
        found, wanted = (capture(model, names, input_ids=IDS) for model in (sharded, plain))
        assert all(torch.equal(found[name], wanted[name]) for name in names)


@check
def a_model_may_be_sharded_while_attached(models):
    model, plain = tiny_model("llama"), models["llama"][1]
    sites = resolve(model)
    with attach(plain, *edits()):
        expected = logits_of(plain)
    with attach(model, *edits()):
        assert torch.equal(logits_of(model), expected)
        shard(model)
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(model), logits_of(plain))
    assert resolve(model) is sites


@check
def weights_are_sharded_again_after_a_capture(models):
    for family in FAMILIES:
        sharded, plain = models[family]
        assert is_sharded(sharded)
        for site in ("embed", "resid_post.0", "attn_z.1"):
            found, expected = (capture(model, site, input_ids=IDS)[site] for model in (sharded, plain))
            assert torch.equal(found, expected)
            assert is_sharded(sharded)
        assert torch.equal(logits_of(sharded), logits_of(plain))


@check
def the_sae_is_neither_sharded_nor_part_of_the_model(models):
    sharded, _ = models["llama"]
    sae = make_sae()
    names = [name for name, _ in sharded.named_parameters()]
    with attach(sharded, Splice(sae)):
        logits_of(sharded)
        assert [name for name, _ in sharded.named_parameters()] == names
    assert not any(isinstance(value, DTensor) for value in sae.parameters())
    assert tuple(sae.W_dec.shape) == (64, 32)
    assert multi_rank.ranks_of(sharded) == (0, 1)
    assert multi_rank.tensor_ranks(sharded) == ()  # ranks may attach different interventions


@check
def each_rank_edits_its_own_batch(models):
    sharded, plain = models["llama"]
    first = distributed.get_rank() == 0
    ids = IDS if first else OWN
    latents = active_latents(plain, make_sae(), ids)
    edit = Ablate(make_sae(), latents if first else latents[:1])
    with attach(plain, edit):
        expected = logits_of(plain, ids)
    with attach(sharded, edit):
        assert torch.equal(logits_of(sharded, ids), expected)


@check
def training_through_an_edit_gives_the_gradients_of_one_process(models):
    sharded, plain = shard(tiny_model("llama").train()), tiny_model("llama").train()
    saes = make_sae().requires_grad_(True), make_sae().requires_grad_(True)
    for model, sae in zip((sharded, plain), saes, strict=True):
        with attach(model, Splice(sae), Steer(make_sae(site="mlp_out.0"), 3)):
            model(IDS, labels=IDS).loss.backward()
    for found, expected in zip(sharded.parameters(), plain.parameters(), strict=True):
        close(found.grad.full_tensor(), expected.grad, 1e-5)
    for found, expected in zip(saes[0].parameters(), saes[1].parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if found.grad is not None:
            close(found.grad, expected.grad, 1e-5)
            require_alike(found.grad)
    assert is_sharded(sharded)


@check
def gradients_with_respect_to_latents_are_those_of_one_process(models):
    def gradient(model):
        found = capture(model, [sae, "final_norm"], grad=True, input_ids=IDS)
        return torch.autograd.grad(found["final_norm"].square().sum(), found[sae])[0]

    sharded, plain, sae = *models["llama"], make_sae()
    found, expected = gradient(sharded), gradient(plain)
    close(found, expected, 1e-5)
    assert expected.abs().max() > 0
    sharded.zero_grad()


@check
def generation_is_that_of_one_process(models):
    sharded, plain = models["llama"]
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    edit = Steer(make_sae(), 3, strength=5.0, positions="generated")
    with attach(plain, edit):
        expected = plain.generate(IDS, **settings)
    with attach(sharded, edit) as handle:
        assert torch.equal(sharded.generate(IDS, **settings), expected)
        assert handle.report().interventions[0].positions[0] == [6, 7, 8]


@check
def mixed_precision(models):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    sharded, half = shard(tiny_model("llama"), mp_policy=policy), tiny_model("llama").bfloat16()
    assert resolve(sharded).names() == resolve(half).names()
    clean = logits_of(sharded)
    with attach(sharded, Ablate(make_sae(), [1, 2], positions=[])):
        assert torch.equal(logits_of(sharded), clean)
    assert capture(sharded, "resid_post.1", input_ids=IDS)["resid_post.1"].dtype == torch.bfloat16
    with attach(sharded, *edits()), attach(half, *edits()):
        close(logits_of(sharded).float(), logits_of(half).float(), 0.05)


@check
def replicas_run_independently(models):
    plain = models["llama"][1]
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))
    model = shard(tiny_model("llama"), mesh=mesh)
    assert multi_rank.ranks_of(model) == multi_rank.ranks_of(plain) == ()
    if distributed.get_rank() == 0:
        expected = capture(plain, "attn_z.1", input_ids=IDS)["attn_z.1"]
        assert torch.equal(capture(model, "attn_z.1", input_ids=IDS)["attn_z.1"], expected)


@check
def sharded_by_transformers(models):
    config = DistributedConfig(fsdp_size=RANKS)
    sharded = AutoModelForCausalLM.from_pretrained(models["folder"] / "llama", distributed_config=config).eval()
    plain = models["llama"][1]
    assert isinstance(sharded, FSDPModule)
    assert resolve(sharded).names() == resolve(plain).names()
    with attach(plain, *edits()):
        expected = logits_of(plain)
    with attach(sharded, *edits()):
        assert torch.equal(logits_of(sharded), expected)
    capture(sharded, "resid_post.0", input_ids=IDS)
    assert is_sharded(sharded)


@check
def the_older_fsdp_wrapper(models):
    plain = models["llama"][1]
    model = copy.deepcopy(plain)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with attach(plain, *edits()):
        expected = logits_of(plain)
    # It flattens weights between forwards: projections are not recognised, and sites at their inputs are refused.
    inner = {name for name in resolve(plain).names() if name.startswith(("attn_z", "mlp_neurons"))}
    assert set(resolve(plain).names()) - set(resolve(wrapped).names()) <= inner
    with attach(wrapped, *edits()):
        assert torch.equal(logits_of(wrapped), expected)
    for _ in range(2):
        found = capture(wrapped, "resid_post.0", input_ids=IDS)["resid_post.0"]
        assert torch.equal(found, capture(plain, "resid_post.0", input_ids=IDS)["resid_post.0"])
    assert torch.equal(logits_of(wrapped), logits_of(plain))


if __name__ == "__main__":
    run(CHECKS, prepare)
