"""The index maps every id of SAELens's registry to the same files as the registry, and has the registry's facts.

The registry is not part of this repository, but its digest is, so that every id is tested everywhere. If
``HF_GATED_SAE_FACTS`` names SAELens's wheel or a file of facts (see hub_scripts/build_index.py), every entry is
compared. ``python -m tests.hub.test_index FILE`` writes a new digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from hf_gated_sae.errors import InputError, UnknownNameError
from hf_gated_sae.formats import formats, open_checkpoint, sae_addresses
from hf_gated_sae.hub.index import (
    FILE,
    expanded,
    has_size,
    known_at,
    known_facts,
    known_saes,
    layer_of,
    releases,
    resolve_alias,
    size_of,
)
from hf_gated_sae.hub.index_encoding import grouped
from hf_gated_sae.hub.location import Location
from hf_gated_sae.hub.model_names import repository_of
from hub_scripts.build_index import read_facts

DIGEST = Path(__file__).with_name("known_saes_digest.json")
FACTS = os.environ.get("HF_GATED_SAE_FACTS")

# Facts in the registry that contradict their SAE, whose folder names another layer, width, site or L0.
WRONG_DASHBOARDS = {
    ("gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_8"): "gemma-2-9b/20-gemmascope-res-131k__l0-10",
    ("gemma-scope-9b-pt-res", "layer_20/width_131k/average_l0_114"): "gemma-2-9b/20-gemmascope-res-131k__l0-12",
    ("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_pre"): "pythia-70m-deduped/e-att-sm",
}
WRONG_L0 = {("gemma-scope-9b-pt-res-canonical", "layer_20/width_524k/canonical"): (78, 48)}
"""The registry's L0, and that of the folder that the entry itself names."""

# Files of an SAE by the path that the registry gives it, for each of the registry's layouts.
FILES = {
    None: lambda path: [f"{path}/cfg.json", f"{path}/sae_weights.safetensors"],
    "gemma_2": lambda path: [f"{path}/params.npz"],
    "gemma_2_transcoder": lambda path: [f"{path}/params.npz"],
    "gemma_3": lambda path: [f"{path}/config.json", f"{path}/params.safetensors"],
    "llama_scope": lambda path: [f"{path}/hyperparams.json", f"{path}/checkpoints/final.safetensors"],
    "llama_scope_r1_distill": lambda path: [f"{path}/config.json", f"{path}/sae_weights.safetensors"],
    "dictionary_learning_1": lambda path: [f"{path}/config.json", f"{path}/ae.pt"],
    "connor_rob_hook_z": lambda path: [path, path.removesuffix(".pt") + "_cfg.json"],
    "goodfire": lambda path: [path],
    "deepseek_r1": lambda path: [path],
    "qwen_scope": lambda path: [path],
    "mwhanna_transcoder": lambda path: [path],
    "mntss_clt_layer_transcoder": lambda path: [f"W_enc_{path}.safetensors", f"W_dec_{path}.safetensors"],
    "temporal": lambda path: [f"{path}/conf.yaml", f"{path}/latest_ckpt.safetensors"],
}
# The same by our address, where it is not the registry's path.
FILES_OF_ADDRESS = {
    **FILES,
    "mntss_clt_layer_transcoder": lambda address: [
        address,
        address.replace("W_enc", "W_dec"),
    ],
}


def entries(facts):
    """Yield every SAE of the facts; one entry also holds a copy of its whole release."""
    for outer in facts["saes"]:
        yield outer
        for inner in outer.get("saes", ()):
            yield {**inner, "release": outer["release"]}


def digest_of(lines):
    return hashlib.sha256("\n".join(sorted(set(lines))).encode()).hexdigest()


def line(id, repo, files):
    return "\t".join([str(id), repo, *sorted(files)])


def digest(facts):
    """Layout, number of SAEs and digest of ids, repositories and files, for every release."""
    lines: dict[str, list[str]] = {name: [] for name in facts["releases"]}
    for sae in entries(facts):
        release = facts["releases"][sae["release"]]
        files = FILES[release["conversion_func"]](str(sae["path"]))
        lines[sae["release"]].append(line(sae["id"], release["repo_id"], files))
    return {
        name: [facts["releases"][name]["conversion_func"], len(set(found)), digest_of(found)]
        for name, found in sorted(lines.items())
    }


KNOWN = json.loads(DIGEST.read_text()) if DIGEST.exists() else {}


def test_the_index_has_as_many_saes_as_the_registry():
    assert len(KNOWN) == 170
    assert sum(count for _, count, _ in KNOWN.values()) == sum(1 for _ in known_saes()) == 13_857
    assert {name for name in releases() if "/" not in name} == set(KNOWN)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_id_leads_to_the_files_of_the_registry(name):
    layout, count, expected = KNOWN[name]
    found = [(id, *resolve_alias(name, id)) for id in releases()[name].saes]
    assert len(found) == count
    assert digest_of(line(id, repo, FILES_OF_ADDRESS[layout](address)) for id, repo, address in found) == expected


@pytest.mark.skipif(FACTS is None, reason="needs HF_GATED_SAE_FACTS, a file of facts that is not in the repository")
def test_every_entry_of_the_facts():
    facts = read_facts(Path(FACTS))
    compared = known_l0 = 0
    for sae in entries(facts):
        release = facts["releases"][sae["release"]]
        repo, address = resolve_alias(sae["release"], str(sae["id"]))
        layout = release["conversion_func"]
        assert repo == release["repo_id"]
        assert FILES_OF_ADDRESS[layout](address) == FILES[layout](str(sae["path"])), sae
        known = releases()[sae["release"]].saes[str(sae["id"])]
        assert known.input_scale == sae.get("norm_scaling_factor", known.input_scale)
        place = sae["release"], str(sae["id"])
        if place in WRONG_DASHBOARDS:
            assert (sae["neuronpedia"], known.neuronpedia) == (WRONG_DASHBOARDS[place], None)
        else:
            assert known.neuronpedia == sae.get("neuronpedia")
        if "l0" in sae:
            known_l0 += 1
            assert (sae["l0"], known.l0) == WRONG_L0.get(place, (known.l0, known.l0))
        if sae["release"] != "gemma-scope-9b-it-res":  # the registry's model is that of another repository
            assert known.base_model == repository_of(release["model"])
        found = known_facts(repo, address)
        assert found["base_model"] == known.base_model
        assert found.get("input_scale") == known.input_scale
        assert bool(found.get("neuronpedia")) >= bool(known.neuronpedia)
        compared += 1
    assert compared == 13_860  # the copy is also compared
    assert known_l0 in (0, 12_147)  # a file of facts may leave them out
    assert digest(facts) == KNOWN


class Listing(Location):
    """A repository of which only file names are known."""

    def __init__(self, repo, files, subfolder="", file=None):
        super().__init__(repo, subfolder, "0" * 40, files, file)

    def _copy(self, subfolder, file):
        return Listing(self.repo, self._all_files, subfolder, file)

    def _source(self, name):
        raise AssertionError(f"{name} is read to find addresses")

    _fetch = sibling = _source


BESIDE = {"README.md", ".gitattributes", "wandb-config.yaml"}
LISTINGS: dict[str, tuple[set[str], set[str]]] = {}
for _name, (_layout, *_) in KNOWN.items():
    for _sae in releases()[_name].saes.values():
        _addresses, _files = LISTINGS.setdefault(_sae.repo, (set(), set(BESIDE)))
        _addresses.add(_sae.address)
        _files.update(FILES_OF_ADDRESS[_layout](_sae.address))


@pytest.mark.parametrize("repo", sorted(LISTINGS))
def test_the_formats_find_the_same_addresses(repo):
    """The formats find the addresses of the index in a listing of those files."""
    addresses, files = LISTINGS[repo]
    found = set(sae_addresses(Listing(repo, sorted(files))))
    # The root stands for the only file in it, and for all layers of a cross-layer transcoder together.
    assert found - {""} == (addresses if len(addresses) > 1 or "" not in found else set())


def without_layer(site):
    return site and re.sub(r"\d+", "*", site)


# SAELens's files state their sites, so its examples need not be where their names say.
@pytest.mark.parametrize("name", [name for name in formats if not name.startswith("saelens")])
def test_formats_and_index_agree_on_an_sae(name, tmp_path):
    """Where an example is named like a known SAE, it has the base model and kind of site in the index."""
    for example in formats[name].examples(tmp_path):
        known = known_at(example.repo, example.address)
        if known is not None:
            config = open_checkpoint(str(tmp_path / example.repo), example.address).config
            assert config.base_model == known.base_model, example
            assert without_layer(config.site) in (None, without_layer(known.site)), example
            if config.site is not None:
                site_out = config.site_out if config.is_transcoder else None
                assert without_layer(site_out) == without_layer(known.site_out), example


def test_the_index_is_small():
    assert FILE.stat().st_size <= 150_000


def test_known_l0s():
    """All 12,147 that the registry states, and those that only the name of a Gemma Scope folder states."""
    kinds = Counter(sae.l0_kind for sae in known_saes())
    assert kinds == {"target": 9_663, "measured": 2_915, None: 1_279}
    assert all((sae.l0 is None) == (sae.l0_kind is None) for sae in known_saes())
    for (release, id), (_, l0) in WRONG_L0.items():
        assert releases()[release].saes[id].l0 == l0


def test_every_sae_of_gemma_scope_2_has_the_l0_that_it_was_trained_for():
    """Within a model it depends only on the layer, the folder, and small, medium or big."""
    found: dict[tuple[str, ...], set[float]] = {}
    count = 0
    for sae in known_saes():
        if sae.repo.startswith("google/gemma-scope-2-"):
            count += 1
            assert sae.l0_kind == "target"
            size = sae.repo.split("-")[3]
            every = sae.address.split("/")[0].endswith("_all")
            level = re.search(r"_l0_(small|medium|big)", sae.address)[1]
            found.setdefault((size, every, sae.layer, level), set()).add(sae.l0)
    assert count == 8_784
    assert all(len(values) == 1 for values in found.values())
    assert [found["4b", False, 17, level] for level in ("small", "medium", "big")] == [{20}, {60}, {150}]
    assert found["4b", True, 17, "big"] == {120}


@pytest.mark.parametrize(
    ("release", "id", "repo", "address"),
    [
        ("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical",
         "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"),
        ("gpt2-small-resid-post-v5-32k", "blocks.3.hook_resid_post",
         "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", "v5_32k_layer_3.pt"),
        ("gpt2-small-res_scefr-ajt", "blocks.10.hook_resid_pre", "neuronpedia/gpt2-small__res_scefr-ajt",
         "10-res_scefr-ajt"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_3", "mntss/clt-gemma-2-2b-2.5M", "W_enc_3.safetensors"),
        ("mntss/clt-gemma-2-2b-2.5M", "layer_3", "mntss/clt-gemma-2-2b-2.5M", "W_enc_3.safetensors"),
        ("goodfire-llama-3.1-8b-instruct", "", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
         "Llama-3.1-8B-Instruct-SAE-l19.pth"),
        ("gemma-scope-2b-pt-res-canonical", "", "google/gemma-scope-2b-pt-res", ""),
        ("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/average_l0_22", "google/gemma-scope-2b-pt-res",
         "layer_12/width_16k/average_l0_22"),
        ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "layer_3", "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "layer3.sae.pt"),
        ("mwhanna/qwen3-4b-transcoders", "layer_5", "mwhanna/qwen3-4b-transcoders", "layer_5.safetensors"),
        ("google/gemma-scope-2b-pt-res", "layer_12/width_16k/canonical", "google/gemma-scope-2b-pt-res",
         "layer_12/width_16k/average_l0_82"),
        ("google/gemma-scope-2b-pt-res", "layer_99/new", "google/gemma-scope-2b-pt-res", "layer_99/new"),
        ("alice/unknown", "layer_3", "alice/unknown", "layer_3"),
        ("alice/unknown", "", "alice/unknown", ""),
    ],
)  # fmt: skip
def test_aliases(release, id, repo, address):
    assert resolve_alias(release, id) == (repo, address)


def test_an_unknown_id_of_a_release_gets_close_matches():
    with pytest.raises(UnknownNameError, match="Did you mean 'layer_12/width_16k/canonical'"):
        resolve_alias("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonicl")


def test_an_ambiguous_id_is_refused():
    with pytest.raises(InputError, match="'snap/blocks.3.hook_resid_post', 'standard/blocks.3.hook_resid_post'"):
        resolve_alias("chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40", "blocks.3.hook_resid_post")


CENTRED = ("gpt2-small-res-jb", "gpt2-small-res-jb-feature-splitting", "gpt2-small-mlp-tm")


def test_normalisations_that_only_the_registry_knows():
    found = {sae.release: sae.normalization for sae in known_saes() if sae.normalization}
    assert found == {**dict.fromkeys(CENTRED, "center"), "mistral-7b-res-wg": "unit_norm"}


def test_facts_of_one_sae():
    place = "tommmcgrath/gpt2-small-mlp-out-saes", "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1"
    assert known_facts(*place) == {
        "base_model": "openai-community/gpt2", "input_scale": 1.049317316132615, "normalization": "center"
    }  # fmt: skip
    assert sum(sae.input_scale is not None for sae in known_saes()) == 304
    assert known_facts("google/gemma-scope-9b-it-res", "layer_9/width_16k/average_l0_88") == {
        "base_model": "google/gemma-2-9b-it", "neuronpedia": "gemma-2-9b-it/9-gemmascope-res-16k"
    }  # fmt: skip


def test_facts_are_of_known_saes_only():
    assert (
        known_facts("alice/unknown", "") == known_facts("canrager/temporalSAEs", "gemma-2-9B/layer_1/temporal") == {}
    )
    assert known_facts("google/gemma-scope-2b-pt-res", "layer_99") == {"base_model": "google/gemma-2-2b"}
    assert known_facts("EleutherAI/sae-llama-3-8b-32x", "layers.10") == {"base_model": "meta-llama/Meta-Llama-3-8B"}
    assert (
        known_facts("Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "")["base_model"] == "meta-llama/Llama-3.1-8B-Instruct"
    )
    assert known_at("google/gemma-scope-2b-pt-res", "") is None


@pytest.mark.parametrize(
    ("repo", "address", "site", "site_out", "d_sae", "architecture", "l0"),
    [
        ("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", "embed", None, 4096, "jumprelu", 6),
        ("google/gemma-scope-2b-pt-att", "layer_0/width_16k/average_l0_104", "attn_z.0", None, 16384, "jumprelu", 104),
        ("google/gemma-scope-2-1b-pt", "transcoder_all/layer_7_width_262k_l0_small_affine",
         "mlp_in.7", "mlp_out.7", 262144, "jumprelu", 18),
        ("google/gemma-scope-2-1b-pt", "resid_post/layer_7_width_262k_l0_medium_seed_1",
         "resid_post.7", None, 262144, "jumprelu", 54),
        ("fnlp/Llama3_1-8B-Base-LXA-32x", "Llama3_1-8B-Base-L7A-32x", "attn_out.7", None, 131072, "jumprelu", 50),
        ("Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_50", "layer9.sae.pt", "resid_post.9", None, 81920, "topk", 50),
        ("canrager/lm_sae", "pythia70m_sweep_gated_ctx128_0730/resid_post_layer_4/trainer_7",
         "resid_post.4", None, 16384, "gated", None),
        ("ctigges/pythia-70m-deduped__res-sm_processed", "e-res-sm", "resid_pre.0", None, None, "standard", None),
        ("canrager/temporalSAEs", "gemma-2-2B/layer_12/temporal", "resid_post.12", None, 9216, "temporal", 192),
    ],
)  # fmt: skip
def test_facts_from_names(repo, address, site, site_out, d_sae, architecture, l0):
    known = known_at(repo, address)
    assert (known.site, known.site_out, known.d_sae, known.architecture, known.l0) == (
        site, site_out, d_sae, architecture, l0
    )  # fmt: skip


def records(group):
    for values in expanded(group["values"]) if group["axes"] else [()]:
        filled = dict(zip(group["axes"], values, strict=True))
        yield {name: str(text).format(**filled) for name, text in group.items() if name not in ("axes", "values")}


@pytest.mark.parametrize(
    "saes",
    [
        [{"id": "a", "address": "a"}],
        [{"id": f"l{n}", "address": f"x/{n}", "l0": str(2 * n)} for n in (0, 1, 2, 3, 7, 10)],
        [{"id": f"l{n}_{w}", "address": f"{w}/{n}", "d_sae": w} for n in range(5) for w in ("16k", "1m") if n != 3],
        [{"id": f"l{n}", "address": f"a{n % 2}"} for n in range(4)],
        [{"id": f"l{n}", "address": f"l{n:02}", "input_scale": repr(n / 7)} for n in range(12)],
        [{"id": "l1", "address": "l1", "neuronpedia": "m/1"}, {"id": "l2", "address": "l2"}],
        [{"id": "a_0", "address": "0"}, {"id": "a_1", "address": "0"}, {"id": "b_0", "address": "0"}],
    ],
    ids=str,
)
def test_grouped_records_expand_to_the_originals(saes):
    again = [{"address": record["id"], **record} for group in grouped(saes) for record in records(group)]
    key = json.dumps
    assert sorted(key(sae, sort_keys=True) for sae in again) == sorted(key(sae, sort_keys=True) for sae in saes)


def test_sizes_and_layers():
    assert [size_of(name) for name in ("4k", "131k", "262k", "524k", "1M")] == [2**12, 2**17, 2**18, 2**19, 2**20]
    assert has_size(81_920, "80k") and has_size(16_384, "16k") and has_size(16_384, 16384) and has_size(4, "4")
    assert not has_size(None, "16k") and not has_size(16_384, "32k") and not has_size(16_384, 16_000)
    with pytest.raises(InputError, match="16k"):
        has_size(1, "wide")
    assert [layer_of(site) for site in ("resid_post.3", "model.layers.7.mlp.output", "embed", None)] == [
        3,
        7,
        None,
        None,
    ]


if __name__ == "__main__":
    lines = [
        f"{json.dumps(name)}: {json.dumps(found)}" for name, found in digest(read_facts(Path(sys.argv[1]))).items()
    ]
    DIGEST.write_text("{\n" + ",\n".join(lines) + "\n}\n")
