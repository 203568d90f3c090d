"""Checks of tensor parallelism, run on every rank and compared with the undivided model."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_gated_sae import Ablate, Clamp, Splice, Steer, attach, capture, resolve
from hf_gated_sae.errors import AttachError, ShapeError, SiteError
from hf_gated_sae.sites import multi_rank
from tests.hooks.distributed.ranks import RANKS, gathered, require_alike, run
from tests.hooks.support import IDS, active_latents, close, hooks_on, logits_of, make_sae
from tests.support.tiny_models import tiny_model

EVEN = {"vocab_size": 98}  # older versions of transformers do not split an odd vocabulary
MODELS = {
    "llama": EVEN,
    "gemma2": EVEN,
    "qwen3_moe": EVEN,
    "phi3": EVEN,  # splits the input of its projections itself, so that every rank has all of it
    "llama, not divisible": {"intermediate_size": 49, **EVEN},
}
SPLIT = {"attn_z.1": "o_proj.input", "mlp_neurons.0": "down_proj.input"}
WHOLE = ["embed", "resid_pre.1", "attn_out.0", "resid_mid.1", "mlp_out.2", "resid_post.1", "final_norm"]
ROUNDING = 2e-5  # ranks sum in a different order than one process


def family(name):
    return name.partition(",")[0]


OWN_HOOKS = {}
"""The hooks with which older versions of transformers split a model."""


def prepare(folder):
    pairs = {}
    for name, settings in MODELS.items():
        plain = tiny_model(family(name), **settings)
        config = DistributedConfig(tp_size=RANKS)
        split = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config).eval()
        pairs[name] = (split, plain)
        OWN_HOOKS[split] = hooks_on(split)
    return pairs


CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@check
def the_sites_are_those_of_the_undivided_model(pairs):
    for split, plain in pairs.values():
        found, expected = resolve(split), resolve(plain)
        assert found.names() == expected.names()
        assert [str(found[name].tensor_path) for name in found.names()] == [
            str(expected[name].tensor_path) for name in expected.names()
        ]
        assert [found[name].width for name in found.names()] == [expected[name].width for name in expected.names()]
        assert hooks_on(split) == OWN_HOOKS[split]


@check
def only_inputs_of_projections_are_split(pairs):
    split, _ = pairs["llama"]
    sites = resolve(split)
    assert all(sites[name].tensor_path.shards is None for name in WHOLE)
    assert all(sites[name].tensor_path.held_width * RANKS == sites[name].width for name in SPLIT)
    uneven = resolve(pairs["llama, not divisible"][0])["mlp_neurons.0"].tensor_path
    assert gathered(uneven.held_width) == [25, 24]
    whole = resolve(pairs["phi3"][0])
    assert all(whole[name].tensor_path.shards is None for name in (*WHOLE, *SPLIT))


@check
def activations_are_whole_and_identical_on_all_ranks(pairs):
    for split, plain in pairs.values():
        names = [*resolve(plain).names(), "resid_post.1|center", "attn_z.1|scale=0.5", "resid_post.0|norm_no_gain"]
        found, expected = (capture(model, names, input_ids=IDS) for model in (split, plain))
        for name in names:
            assert found[name].shape == expected[name].shape
            close(found[name], expected[name], ROUNDING)
            require_alike(found[name])


@check
def idle_interventions_change_no_bit(pairs):
    for split, _ in pairs.values():
        clean = logits_of(split)
        for site in ("resid_post.1", "attn_z.1", "mlp_out.0"):
            sae = make_sae(site=site, d_in=resolve(split)[site].width)
            latents = active_latents(split, sae)
            idle = Ablate(sae, latents, positions=[]), Clamp(sae, {3: 9.0}, when={latents[0]: 1e9})
            with attach(split, *idle) as handle:
                assert torch.equal(logits_of(split), clean)
                assert handle.report().interventions[0].calls == 1
        assert torch.equal(logits_of(split), clean)


@check
def edits_on_all_ranks_are_those_of_one_process(pairs):
    for split, plain in pairs.values():
        sites = resolve(plain)
        clean = logits_of(plain)
        for site in (*SPLIT, "resid_post.1", "mlp_out.2"):
            if site not in sites:  # experts compute their neurons inside one module
                continue
            sae = make_sae(site=site, d_in=sites[site].width)
            for edit in (
                Splice(sae),
                Ablate(sae, active_latents(plain, sae)),
                Steer(sae, 3, strength=4.0),
                Clamp(sae, {5: 6.0}, positions=[1, -1]),
            ):
                with attach(plain, edit):
                    expected = logits_of(plain)
                with attach(split, edit) as handle:
                    found = logits_of(split)
                    assert handle.report().interventions[0].calls == 1
                close(found, expected, ROUNDING)
                assert (expected - clean).abs().max() > 100 * ROUNDING * expected.abs().max()
                require_alike(found)


@check
def generation_continues_from_the_edited_text(pairs):
    split, plain = pairs["llama"]
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    settings |= dict(output_scores=True, return_dict_in_generate=True)
    sae = make_sae(site="mlp_neurons.0", d_in=48)
    edit = Steer(sae, 3, strength=4.0, positions="generated")
    clean = plain.generate(IDS, **settings)
    with attach(plain, edit):
        expected = plain.generate(IDS, **settings)
    with attach(split, edit) as handle:
        found = split.generate(IDS, **settings)
        assert handle.report().interventions[0].positions == {0: [6, 7, 8, 9], 1: [6, 7, 8, 9]}
    assert torch.equal(found.sequences, expected.sequences)
    # min_new_tokens sets the score of EOS to minus infinity, so special tokens are not compared.
    found, expected, clean = (torch.stack(each.scores)[..., 3:] for each in (found, expected, clean))
    close(found, expected, ROUNDING)
    assert not torch.allclose(expected, clean)


@check
def gradients_flow_through_a_split_site(pairs):
    def gradient(model, sae):
        embeds = pairs["llama"][1].get_input_embeddings()(IDS).detach().requires_grad_()
        with attach(model, Splice(sae)):
            loss = model(inputs_embeds=embeds).logits.logsumexp(-1).sum()
        return torch.autograd.grad(loss, [embeds, *sae.parameters()], allow_unused=True)

    split, plain = pairs["llama"]
    for site in SPLIT:
        sae = make_sae(site=site, d_in=resolve(plain)[site].width).requires_grad_(True)
        for found, expected in zip(gradient(split, sae), gradient(plain, sae), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                close(found, expected, 1e-4)
                require_alike(found)


@check
def module_paths_give_whole_tensors_or_are_refused(pairs):
    split, plain = pairs["llama"]
    path = "model.layers.1.self_attn.q_proj.output"
    found, expected = (capture(model, path, input_ids=IDS)[path] for model in (split, plain))
    close(found, expected, ROUNDING)
    with pytest.raises(SiteError, match="values differ between the 2 ranks of tensor parallelism"):
        attach(split, Steer(make_sae(site="model.layers.1.mlp.act_fn.output", d_in=24), 3))


@check
def an_sae_as_wide_as_one_part_is_refused(pairs):
    split, _ = pairs["llama"]
    clean = logits_of(split)
    with pytest.raises(ShapeError, match="48"):
        attach(split, Splice(make_sae(site="mlp_neurons.0", d_in=24)))
    assert hooks_on(split) == OWN_HOOKS[split]
    assert torch.equal(logits_of(split), clean)


@check
def a_stopped_capture_leaves_the_ranks_in_sync(pairs):
    split, _ = pairs["llama"]
    clean, ran = logits_of(split), []
    handle = split.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    capture(split, ["attn_z.0"], input_ids=IDS)
    handle.remove()
    assert not ran
    assert torch.equal(logits_of(split), clean)


@check
def attaching_on_one_rank_only_is_an_error(pairs):
    split = AutoModelForCausalLM.from_pretrained(
        pairs["llama"][0].config._name_or_path, distributed_config=DistributedConfig(tp_size=RANKS)
    )
    patience, multi_rank.PATIENCE = multi_rank.PATIENCE, 0.5
    if distributed.get_rank() == 0:
        with pytest.raises(SiteError, match=r"needs the ranks \[0, 1\] together, but \[1\] did not"):
            attach(split, Splice(make_sae()))
    distributed.barrier()
    multi_rank.PATIENCE = patience
    assert "resid_post.1" in resolve(split)


@check
def absent_names_the_ranks_that_did_not_arrive(pairs):
    for model in pairs["llama"]:
        ranks = multi_rank.tensor_ranks(model)
        assert ranks == ((0, 1) if model is pairs["llama"][0] else ())
        assert multi_rank.absent(ranks, "here") == multi_rank.absent(ranks, "here") == []
    patience, multi_rank.PATIENCE = multi_rank.PATIENCE, 0.2
    if distributed.get_rank() == 1:
        assert multi_rank.absent((0, 1), "there") == [0]
    multi_rank.PATIENCE = patience
    distributed.barrier()
    assert multi_rank.absent((0, 1), "there") == []


@check
def an_edit_on_some_ranks_only_is_reported(pairs):
    split = pairs["llama"][0]
    handle = attach(split, Steer(make_sae(), 3, strength=6.0, unit="raw"))
    patience, multi_rank.PATIENCE = multi_rank.PATIENCE, 0.5
    if distributed.get_rank() == 0:
        with pytest.raises(AttachError, match=r"Ranks \[1\] of \[0, 1\] ran without these interventions"), handle:
            logits_of(split)
    else:
        logits_of(split)
    distributed.barrier()
    multi_rank.PATIENCE = patience
    with handle:
        logits_of(split)


@check
def ranks_that_compute_different_streams_are_refused(pairs):
    split = AutoModelForCausalLM.from_pretrained(
        pairs["gemma2"][0].config._name_or_path, distributed_config=DistributedConfig(tp_size=RANKS)
    )
    with torch.no_grad():
        split.model.layers[1].post_attention_layernorm.weight += distributed.get_rank()
    hooks = hooks_on(split)
    with pytest.raises(SiteError, match="a residual stream that is not bitwise equal on all"):
        resolve(split)
    assert hooks_on(split) == hooks


@check
def a_split_sequence_is_refused(pairs):
    model = tiny_model("llama")
    mesh = init_device_mesh("cpu", (RANKS,))
    within = {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
    for name in ("self_attn", "mlp"):
        keyword = "hidden_states" if name == "self_attn" else None
        layouts = (Shard(1), Replicate())
        within[name] = (
            PrepareModuleInput(
                input_kwarg_layouts={keyword: layouts[0]}, desired_input_kwarg_layouts={keyword: layouts[1]}
            )
            if keyword
            else PrepareModuleInput(input_layouts=(layouts[0],), desired_input_layouts=(layouts[1],))
        )
    within |= {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    within |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    within |= {"self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1))}
    within |= {"mlp.down_proj": RowwiseParallel(output_layouts=Shard(1))}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, within)
    around = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, around)
    inputs = {"input_ids": IDS, "position_ids": torch.arange(6)[None]}
    reason = r"hold different tokens of one sequence \(\[3, 3\] of 6\)|does not have a sharding strategy"  # torch 2.9
    with pytest.raises(SiteError, match=reason):
        resolve(model, inputs=inputs)
    assert hooks_on(model) is not None


if __name__ == "__main__":
    run(CHECKS, prepare)
