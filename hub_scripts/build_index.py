"""Write the index of known SAEs from SAELens's registry, and from listings of repositories on the Hub.

    pip download --no-deps sae-lens==6.54.12
    python hub_scripts/build_index.py sae_lens-6.54.12-py3-none-any.whl [--live]

The facts (ids, repositories, paths, L0, norm factors, names of dashboards) are those of the registry in SAELens's
wheel, ``sae_lens/pretrained_saes.yaml`` (MIT). They are also read as JSON, gzipped or not: ``{"source", "releases":
{name: {repo_id, model, conversion_func, config_overrides}}, "saes": [{release, id, path, l0?, norm_scaling_factor?,
neuronpedia?}]}``. An SAE's site, width and architecture, and whether its L0 is a target or was measured, follow from
its publisher's conventions, which are implemented below, one function per layout. With ``--live`` the repositories are
listed on the Hub, and SAEs that are not among the facts are added.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from hf_gated_sae.errors import InputError, SAEError
from hf_gated_sae.formats import sae_addresses
from hf_gated_sae.hub.hook_names import site_of_hook
from hf_gated_sae.hub.index import FILE, layer_of, size_of
from hf_gated_sae.hub.index_encoding import grouped
from hf_gated_sae.hub.location import locate
from hf_gated_sae.hub.model_names import repository_of

Facts = dict[str, Any]

REGISTRY = "sae_lens/pretrained_saes.yaml"
KINDS = {"res": "resid_", "att": "attn_", "mlp": "mlp_"}
"""Neuronpedia's names of the kinds of sites, with the prefixes of ours."""
KEPT = ("l0", "norm_scaling_factor", "neuronpedia")
"""Facts about an SAE that are read, besides its name and path."""
TARGET = {"l0_kind": "target"}
"""For SAEs whose L0 is the target of training, or the k of a TopK. For all others it was measured."""

log = logging.getLogger(__name__)

BASE_MODELS = {"gemma-scope-9b-it-res": "google/gemma-2-9b-it"}
"""Base models of releases for which the registry names a different one than the repository and its card."""
MORE: dict[str, tuple[str, str]] = {
    "EleutherAI/sae-llama-3-8b-32x": ("sparsify", "meta-llama/Meta-Llama-3-8B"),
    "EleutherAI/sae-pythia-70m-32k": ("sparsify", "EleutherAI/pythia-70m"),
    "EleutherAI/sae-pythia-70m-deduped-32k": ("sparsify", "EleutherAI/pythia-70m-deduped"),
    "fnlp/Llama3_1-8B-Base-LXTC-8x": ("llama_scope", "meta-llama/Llama-3.1-8B"),
    "fnlp/Llama3_1-8B-Base-LXTC-32x": ("llama_scope", "meta-llama/Llama-3.1-8B"),
}
"""Repositories that are not among the facts, with layout and base model. Only ``--live`` lists their SAEs."""


def gemma_scope(repo: str, path: str, id: str) -> Facts:
    """Gemma Scope: site from the repository's name; layer, width and L0 from the folders' names."""
    found = match(r"(?:layer_(?P<layer>\d+)|embedding)/width_(?P<width>\w+)/average_l0_(?P<l0>\d+)", path)
    layer = found["layer"]
    facts = {"d_sae": found["width"], "l0": found["l0"], "architecture": "jumprelu"}
    if layer is None:
        return {**facts, "site": "embed"}
    if repo.endswith("-transcoders"):
        return {**facts, "site": f"resid_mid.{layer}", "site_out": f"mlp_out.{layer}"}
    kind = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}[repo.rsplit("-", 1)[1]]
    return {**facts, "site": f"{kind}.{layer}"}


def gemma_scope_2(repo: str, path: str, id: str) -> Facts:
    """Gemma Scope 2: everything but the L0 from the folders' names.

    The registry's L0 is the target of training: for one model it depends only on the layer, on ``_all`` and on small,
    medium or big, and is the same at every site, for every width, and for the pretrained and the tuned model.
    """
    found = match(r"(?P<kind>[a-z_]+?)(?:_all)?/layer_(?P<layer>\d+)_width_(?P<width>\w+?)_l0_\w+", path)
    layer, facts = found["layer"], {"d_sae": found["width"], "architecture": "jumprelu", **TARGET}
    if found["kind"] == "transcoder":
        return {**facts, "site": f"mlp_in.{layer}", "site_out": f"mlp_out.{layer}"}
    kind = {"resid_post": "resid_post", "mlp_out": "mlp_out", "attn_out": "attn_z"}[found["kind"]]
    return {**facts, "site": f"{kind}.{layer}"}


def saelens(repo: str, path: str, id: str) -> Facts:
    """SAELens's own layout: the site from the id, the rest from names, where they include it."""
    hook = match(r"(?P<hook>blocks\.\d+\.hook_[a-z]+(?:_[a-z]+)*)(?:_\d+)?", id)["hook"]
    facts: Facts = {"site": site_of_hook(hook)[0]}
    if width := re.search(r"_(\d{3,6})(?:_anthropic|_fast_lr|:v\d|$)", path):
        facts["d_sae"] = width[1]
    elif width := re.search(r"-v5-(\d+k)-|-w-(\d+k)-", repo):
        facts["d_sae"] = width[1] or width[2]
    elif repo == "jbloom/GPT2-Small-SAEs-Reformatted":
        facts["d_sae"] = "24576"
    if "-OAI-v5-" in repo:
        facts |= {"architecture": "topk", **TARGET}
    elif repo.startswith("chanind/"):
        facts |= {"architecture": "jumprelu", **TARGET}  # trained as BatchTopK
    elif repo.startswith(("jbloom/", "tommmcgrath/", "neuronpedia/", "ctigges/", "JoshEngels/")):
        facts["architecture"] = "standard"
    return facts


def llama_scope(repo: str, path: str, id: str) -> Facts:
    """Llama Scope: site and width from the folder's name; the width of the model is 4096. Trained as TopK."""
    found = match(r"Llama3_1-8B-Base-L(?P<layer>\d+)(?P<kind>R|A|M|TC)-(?P<times>\d+)x", path)
    layer = found["layer"]
    facts: Facts = {"d_sae": str(4096 * int(found["times"])), "architecture": "jumprelu", **TARGET}
    if found["kind"] == "TC":
        return {**facts, "site": f"resid_mid.{layer}", "site_out": f"mlp_out.{layer}"}
    return {**facts, "site": {"R": "resid_post", "A": "attn_out", "M": "mlp_out"}[found["kind"]] + f".{layer}"}


def llama_scope_r1(repo: str, path: str, id: str) -> Facts:
    """Llama Scope for DeepSeek-R1-Distill: eight times the width of the model."""
    layer = match(r".+/L(?P<layer>\d+)R", path)["layer"]
    return {"site": f"resid_post.{layer}", "d_sae": "32768", "architecture": "jumprelu"}


def dictionary_learning(repo: str, path: str, id: str) -> Facts:
    """dictionary_learning: the site from the folder; width and architecture from the run's name, where it has them."""
    layer = match(r".*resid_post_layer_(?P<layer>\d+)(?:_checkpoints)?/trainer_.+", path)["layer"]
    facts: Facts = {"site": f"resid_post.{layer}"}
    if power := re.search(r"2pow(\d+)", repo):
        facts["d_sae"] = str(2 ** int(power[1]))
    kinds = {"batchtopk": "batch_topk", "batch_top_k": "batch_topk", "topk": "topk", "gated": "gated"}
    kinds |= {"vanilla": "standard", "panneal": "standard", "standard": "standard"}
    if kind := next((kinds[name] for name in kinds if name in path.lower()), None):
        facts["architecture"] = kind
    return facts


def attention_kk(repo: str, path: str, id: str) -> Facts:
    """Kissane's attention SAEs: layer and width from the file's name."""
    found = match(r"gpt2-small_L(?P<layer>\d+)_Hcat_z_.*_ds(?P<width>\d+)_.*\.pt", path)
    return {"site": f"attn_z.{found['layer']}", "d_sae": found["width"], "architecture": "standard"}


def residual_file(repo: str, path: str, id: str) -> Facts:
    """One file for the residual stream after a block: Goodfire, and qresearch's DeepSeek-R1."""
    layer = match(r".*-l(?P<layer>\d+)\.pth?", path)["layer"]
    return {"site": f"resid_post.{layer}", "d_sae": "65536", "architecture": "standard"}


def qwen_scope(repo: str, path: str, id: str) -> Facts:
    """Qwen Scope: layer from the file's name, width and k from the repository's."""
    layer = match(r"layer(?P<layer>\d+)\.sae\.pt", path)["layer"]
    found = match(r".*-W(?P<width>\d+)K-L0_(?P<k>\d+)", repo)
    return {
        "site": f"resid_post.{layer}",
        "d_sae": str(1024 * int(found["width"])),
        "l0": found["k"],
        "architecture": "topk",
        **TARGET,
    }


def per_layer_transcoder(repo: str, path: str, id: str) -> Facts:
    """Hanna's transcoders for Qwen 3: one file per layer, reading the normalised input of the MLP."""
    layer = match(r"layer_(?P<layer>\d+)\.safetensors", path)["layer"]
    return {"site": f"mlp_in.{layer}", "site_out": f"mlp_out.{layer}", "architecture": "standard"}


def cross_layer_transcoder(repo: str, path: str, id: str) -> Facts:
    """One layer of a cross-layer transcoder, stored in two files: its address is that of the encoder."""
    layer = match(r"(?:W_enc_)?(?P<layer>\d+)(?:\.safetensors)?", path)["layer"]
    sites = {"site": f"resid_mid.{layer}", "site_out": f"mlp_out.{layer}"}
    return {"address": f"W_enc_{layer}.safetensors", "architecture": "cross_layer", **sites}


def temporal(repo: str, path: str, id: str) -> Facts:
    """Temporal SAEs: the layer from the folder's name; their L0 is the k of the novel latents."""
    layer = match(r".+/layer_(?P<layer>\d+)/temporal", path)["layer"]
    width = {"d_sae": "9216"} if path.startswith("gemma-2-2B/") else {}
    return {"site": f"resid_post.{layer}", "architecture": "temporal", **width, **TARGET}


def sparsify(repo: str, path: str, id: str) -> Facts:
    """EleutherAI's sparsify: the folder is a module path."""
    found = match(r"(?:layers|h)\.(?P<layer>\d+)(?P<mlp>\.mlp)?", path)
    return {"site": ("mlp_out." if found["mlp"] else "resid_post.") + found["layer"], "architecture": "topk"}


DESCRIBE: Mapping[str | None, Callable[[str, str, str], Facts]] = {
    None: saelens,
    "gemma_2": gemma_scope,
    "gemma_2_transcoder": gemma_scope,
    "gemma_3": gemma_scope_2,
    "llama_scope": llama_scope,
    "llama_scope_r1_distill": llama_scope_r1,
    "dictionary_learning_1": dictionary_learning,
    "connor_rob_hook_z": attention_kk,
    "goodfire": residual_file,
    "deepseek_r1": residual_file,
    "qwen_scope": qwen_scope,
    "mwhanna_transcoder": per_layer_transcoder,
    "mntss_clt_layer_transcoder": cross_layer_transcoder,
    "temporal": temporal,
    "sparsify": sparsify,
}
"""Functions that return an SAE's facts from its repository, path and id, for every layout of the registry."""


def match(pattern: str, text: str) -> re.Match[str]:
    """Return the match of a pattern with all of `text`.

    Raises:
        InputError: if it does not match.
    """
    found = re.fullmatch(pattern, text)
    if found is None:
        raise InputError(f"Given {text!r}; expected a name that matches {pattern}: extend the layout's function.")
    return found


def flattened(entries: Iterable[Facts]) -> list[Facts]:
    """Return every SAE once: one entry of the registry erroneously holds a second copy of its release.

    Raises:
        InputError: if two entries of one release and id disagree.
    """
    found: dict[tuple[str, str], Facts] = {}
    for outer in entries:
        for entry in (outer, *({**inner, "release": outer["release"]} for inner in outer.get("saes", ()))):
            facts = {name: entry[name] for name in KEPT if name in entry}
            sae = {"release": entry["release"], "id": str(entry["id"]), "path": str(entry["path"]), **facts}
            if found.setdefault((sae["release"], sae["id"]), sae) != sae:
                raise InputError(f"The facts have two entries for {sae['id']!r} of {sae['release']!r} that disagree.")
    return list(found.values())


def described(sae: Facts, release: Facts) -> Facts:
    """Return an entry of the index, with all values as strings."""
    known = DESCRIBE[release.get("conversion_func")](release["repo_id"], sae["path"], sae["id"])
    if "l0" in sae:
        known.setdefault("l0", f"{sae['l0']:g}")  # an L0 in the name is the authors' and takes precedence
    if "l0" not in known:
        known.pop("l0_kind", None)
    scale = {"input_scale": repr(sae["norm_scaling_factor"])} if "norm_scaling_factor" in sae else {}
    if "d_sae" not in known and (width := re.search(r"-res-(\d+k)(?:__|$)", sae.get("neuronpedia", ""))):
        known["d_sae"] = width[1]
    made = {"id": sae["id"], "address": sae["path"], **known, **scale}
    if "neuronpedia" in sae:
        if contradiction := contradicted(sae["neuronpedia"], known):
            log.warning(
                "dashboards %s are not used for %s of %s: %s.",
                sae["neuronpedia"],
                sae["id"],
                release["repo_id"],
                contradiction,
            )
        else:
            made["neuronpedia"] = sae["neuronpedia"]
    return made


def contradicted(dashboards: str, known: Facts) -> str | None:
    """Return how a dashboard name contradicts the SAE to which the registry assigns it; None if it does not.

    A name may include the layer, the kind of site, the width and the L0. This prevents showing the dashboards of
    another SAE.
    """
    name = dashboards.split("/")[1]
    site, layer = known["site"], layer_of(known["site"])
    # Some name the end of a block as the beginning of the next.
    layers = (layer, layer + 1) if layer is not None and site.startswith("resid_post.") else (layer,)
    if (stated := re.match(r"(\d+)-", name)) and layer is not None and int(stated[1]) not in layers:
        return f"their name states layer {stated[1]}"
    if (stated := re.search(r"-(res|att|mlp)(?=[-_]|$)", name)) and not site.startswith(KINDS[stated[1]]):
        return f"their name states {stated[1]}, but the site is {site}"
    if (stated := re.search(r"-(\d+[km])(?:__|$)", name)) and size_of(stated[1]) != size_of(
        str(known.get("d_sae") or stated[1])
    ):
        return f"their name states width {stated[1]}"
    if (stated := re.search(r"__l0-(\d+)$", name)) and stated[1] != known.get("l0"):
        return f"their name states L0 {stated[1]}"
    return None


def normalization(release: Facts) -> str | None:
    """Return the normalisation of a release, which is in the registry only."""
    overrides = release.get("config_overrides") or {}
    if (overrides.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        return "center"
    return {"constant_norm_rescale": "unit_norm", None: None}[overrides.get("normalize_activations")]


def from_facts(facts: Facts) -> dict[str, Facts]:
    """Return the releases of the index.

    Raises:
        InputError: if an entry does not follow the conventions of its layout.
    """
    members: dict[str, list[Facts]] = {name: [] for name in facts["releases"]}
    for sae in flattened(facts["saes"]):
        members[sae["release"]].append(described(sae, facts["releases"][sae["release"]]))
    made = {}
    for name, release in facts["releases"].items():
        base = BASE_MODELS.get(name, repository_of(release["model"]))
        head = {"repo": release["repo_id"], "base_model": base, "normalization": normalization(release)}
        known = {key: value for key, value in head.items() if value is not None}
        made[name] = {**known, "groups": grouped(members[name])}
    return made | {repo: {"repo": repo, "base_model": base, "groups": []} for repo, (_, base) in MORE.items()}


def from_hub(facts: Facts) -> dict[str, Facts]:
    """Return releases, named by their repositories, of the SAEs on the Hub that are not among the facts."""
    layouts = {
        release["repo_id"]: (release.get("conversion_func"), BASE_MODELS.get(name, repository_of(release["model"])))
        for name, release in facts["releases"].items()
    }
    known: dict[str, set[str]] = {}
    for sae in flattened(facts["saes"]):
        release = facts["releases"][sae["release"]]
        known.setdefault(release["repo_id"], set()).add(described(sae, release)["address"])
    made = {}
    for repo, (layout, base) in {**layouts, **MORE}.items():
        if layout is None:
            continue  # the id, which states the site, is in the registry only
        try:
            listed = sae_addresses(locate(repo))
        except SAEError as error:
            log.warning("%s is not updated: %s", repo, error)
            continue
        new = []
        for address in sorted(set(listed) - known.get(repo, set())):
            try:
                new.append({"id": address, "address": address, **DESCRIBE[layout](repo, address, address)})
            except InputError as error:
                log.warning("%s of %s is left out: %s", address, repo, error)
        if new:
            made[repo] = {"repo": repo, **({"base_model": base} if base else {}), "groups": grouped(new)}
    return made


def read_facts(path: Path) -> Facts:
    """Return the facts in SAELens's wheel, or in JSON, gzipped or not."""
    content = path.read_bytes()
    if not content.startswith(b"PK"):
        found: Facts = json.loads(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)
        return found
    with zipfile.ZipFile(path) as wheel:
        registry = yaml.load(wheel.read(REGISTRY), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {
        "source": f"SAELens {path.name.split('-')[1]} (MIT) registry facts: release, repository, model, id, path, L0",
        "releases": {
            name: {key: release[key] for key in release if key != "saes"} for name, release in registry.items()
        },
        "saes": [{"release": name, **sae} for name, release in registry.items() for sae in release["saes"]],
    }


def main(
    facts: Annotated[Path, typer.Argument(help="SAELens's wheel, or a file of facts.", exists=True)],
    out: Annotated[Path, typer.Option(help="The index to write.")] = FILE,
    live: Annotated[bool, typer.Option(help="Also list the repositories on the Hub.")] = False,
) -> None:
    """Write the index."""
    content = read_facts(facts)
    releases = from_facts(content)
    if live:
        releases.update(from_hub(content))
    lines = ",\n".join(f"{json.dumps(name)}:{_compact(release)}" for name, release in sorted(releases.items()))
    source = json.dumps(content["source"])
    out.write_text(f'{{"schema":1,"source":{source},"releases":{{\n{lines}\n}}}}\n', encoding="utf-8")


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    typer.run(main)
