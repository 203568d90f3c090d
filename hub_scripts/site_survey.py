"""Resolve the sites of every causal language model type of transformers: python hub_scripts/site_survey.py --out DIR.

Each type is built tiny from its default configuration, in a process of its own, and checked on another batch.
"""

import dataclasses
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_gated_sae.errors import SAEError
from hf_gated_sae.sites import SiteMap, resolve
from hf_gated_sae.sites.site import LAYERED

DEPTH = 4  # blocks per model, more where it takes more to have each kind of block twice
MOST_DEPTH = 8
LARGEST = 30_000_000  # parameters; a model that stays larger has a size that is not known here
CORE = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

# Tiny values by name; the first pattern that fits decides. Sizes that must agree do: 4 heads of 8 channels make 32.
_DEPTHS = r"(conf_)?num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|num_blocks|depth"
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab.*", 128),
    (r".*(key_value_heads|kv_heads)|kv_n_heads|num_query_groups", 2),
    (r".*heads(_per_.*)?|.*n_head", 4),
    (r"qk_head_dim|attention_head_dim", 16),
    (r".*(head_dim|headdim|head_size|d_head|dim_head)|d_kv|kv_channels", 8),
    (r"attention_hidden_size", 64),
    (r"rotary_dim", 4),
    (r"(backbone_|out_)?hidden_size(_global)?|d_model|n_embd|word_embed_proj_dim|lru_width|mamba_d_ssm", 32),
    (r"(.*_)?embed(ding)?_(dim|size)|emb_dim|(in|out)put_(embedding_)?size", 32),
    (r".*(intermediate|ffn|feed_forward).*|d_ff|dff|dim_ff|d_inner|mlp_dim|router_hidden_size|.*per_layer_input", 48),
    (r".*rank.*|d_rel|mamba_d_state|(ssm_)?state_size", 8),
    (r"(mamba_)?expand|n_group|topk_group|num_expert_group|n_groups|mamba_n_?groups|o_groups", 1),
    (r".*(experts_per_tok(en)?|top_?k|moe_k)", 2),
    (r".*experts|zero_expert_num|.*moe_num.*", 4),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r".*(period|every_n.*|interval|_step)", 2),
    (r".*offset|first_.*dense.*|num_dense_layers", 1),
    (r".*chunk_size|block_size|.*window.*|local_attention|token_budget", 16),
    (r"compress_ratio", 2),
    (r"prompt_length", 4),
    (r".*max.*(position|length|seq).*|n_positions|n_ctx|context_length", 64),
)
_TOKENS = {"pad": 0, "bos": 1, "eos": 2}
_OPEN: dict[str, Any] = {"layer_types": ["full_attention"] * DEPTH, "default_language": "en_XX"}
_ABSENT = r"^nothing in it|only one kind of contribution|in parallel"
_NO_SIZES = ("id2label", "label2id")
_INSIDE = {"attn_in": "attn_out", "attn_z": "attn_out", "mlp_in": "mlp_out", "mlp_neurons": "mlp_out"}


@dataclass
class Finding:
    """What became of one type.

    Args:
        name: the model type.
        error: why it could not be built, run or resolved; empty if it could.
        decoder: whether it is a decoder-only model: it is not the half of another, and no token sees a later one.
        n_layers: number of proven blocks.
        places: for each kind of site, the places with ``L`` for the layer.
        proven: for each kind of site, the layers in which it is proven.
        refused: for each reason, the kinds of sites that it holds for.
        stream: how often each relation between the stream and the contributions was found on another batch.
        wrong: checks on another batch that failed.
    """

    name: str
    error: str = ""
    decoder: bool = False
    n_layers: int = 0
    places: dict[str, list[str]] = field(default_factory=dict)
    proven: dict[str, list[int]] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    stream: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """The class that the type falls in."""
        if self.error:
            return "not built"
        if self.wrong:
            return "wrong"
        if not self.proven.get("resid_post"):
            return "blocks, but no single stream" if self.n_layers else "no blocks"
        full = [layer for layer in range(self.n_layers) if self._whole(layer)]
        some = any(self.proven.get(kind) for kind in ("attn_out", "mlp_out"))
        return "full" if len(full) == self.n_layers else "in part" if some else "stream only"

    def _whole(self, layer: int) -> bool:
        """Whether all that a block adds to the stream has a name, and the stream in between if the block has one."""
        has = {kind for kind, layers in self.proven.items() if layer in layers}
        named = all(kind in has or f"{kind}.{layer}" in self.absent for kind in ("attn_out", "mlp_out"))
        between = "resid_mid" in has or f"resid_mid.{layer}" in self.absent
        return named and between and {"resid_pre", "resid_post"} <= has

    @property
    def absent(self) -> set[str]:
        """The sites that a block has no place for: it adds only one thing, or adds both to the same stream."""
        return {name for why, names in self.refused.items() if re.search(_ABSENT, why) for name in names}


def small_config(name: str, fill: bool = False, **changes: Any) -> PretrainedConfig:
    """Return a type's default configuration with all sizes tiny, and if `fill`, also those that it leaves open."""
    kind = CONFIG_MAPPING[name]
    values = {k: v for k, v in kind().to_dict().items() if k not in ("model_type", "transformers_version")}
    small = {key: value for key, value in _small(values, fill).items() if value != values.get(key)}
    return kind(**small | changes)


def _small(values: Mapping[str, Any], fill: bool) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in values.items():
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)
        if isinstance(value, dict) and key not in _NO_SIZES and not _by_layer(value):
            small[key] = _small(value, fill)
        elif value is None and fill:
            small[key] = _OPEN.get(key, size)
        elif isinstance(value, bool) or not isinstance(value, int):
            small[key] = value
        elif re.fullmatch(r".*_(token_)?(id|ids|index)", key):
            small[key] = _TOKENS.get(key[:3], 3 + value % 16) if value >= 0 else value
        elif re.fullmatch(_DEPTHS, key):
            small[key] = min(value, DEPTH)
        else:
            small[key] = value if size is None else min(value, size)
    if values.get("num_key_value_heads") and values["num_key_value_heads"] == values.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    if (values.get("head_dim") or 0) >= sum(values.get(f"qk_{part}_head_dim") or 1e9 for part in ("nope", "rope")):
        small["head_dim"] = 16
    return small | _few_layers(values, fill)


def _by_layer(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def _few_layers(values: Mapping[str, Any], fill: bool) -> dict[str, Any]:
    """Take some layers of all that is listed by layer, two of each kind if there are so many kinds."""
    depth = next((key for key, value in values.items() if re.fullmatch(_DEPTHS, key) and isinstance(value, int)), "")
    count = values.get(depth, 0)
    lists = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == count > 1}
    tables = {
        key: {int(layer): item for layer, item in value.items()}
        for key, value in values.items()
        if key not in _NO_SIZES and _by_layer(value)
    }
    named = {k: v for k, v in values.items() if isinstance(v, list) and re.search(r"(layers|ids|idxs)$", k)}
    named = {k: v for k, v in named.items() if k not in lists and all(isinstance(i, int) and i < count for i in v)}
    if not lists and not tables and not named:
        return {}
    kinds: dict[str, list[int]] = {}
    for layer in range(count):
        described = [value[layer] for value in lists.values()] + [layer in value for value in named.values()]
        described += [value.get(layer) for value in tables.values()]
        kinds.setdefault(repr(described), []).append(layer)
    chosen = [layer for layers in kinds.values() for layer in layers[:2]][:MOST_DEPTH]
    chosen += [layer for layer in range(count) if layer not in chosen][: max(0, DEPTH - len(chosen))]
    chosen.sort()
    few: dict[str, Any] = {depth: len(chosen)}
    few |= {key: [value[layer] for layer in chosen] for key, value in lists.items()}
    few |= {key: [new for new, old in enumerate(chosen) if old in value] for key, value in named.items()}
    for key, value in tables.items():
        few[key] = {new: _small(value[old], fill) for new, old in enumerate(chosen) if old in value}
    return few


def build(name: str) -> PreTrainedModel:
    """Build a tiny model of a type, with every parameter random; what a default leaves open is filled in if needed."""
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    reversible = {"is_decoder": True, "axial_pos_embds": False}
    attempts: tuple[dict[str, Any], ...] = ({}, {"fill": True}, {"rope_parameters": rope}, reversible)
    errors: list[Exception] = []
    for attempt in attempts:
        try:
            return _build(name, attempt)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _build(name: str, changes: Mapping[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(small_config(name, **changes)).parameters())
    if size > LARGEST:
        raise ValueError(f"the tiny model has {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(name, **changes), dtype=torch.float32).eval()
    randomise(model)
    with torch.no_grad():
        model(input_ids=_ids(), use_cache=False)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Make gains, biases, learned scales and matrices so large and so different that none agree by chance."""
    for name, parameter in model.named_parameters():
        if "A_log" in name or "dt_" in name or not parameter.is_floating_point():
            continue
        if name.endswith("bias"):
            parameter.normal_(std=0.2)
        elif parameter.ndim < 2 or parameter.numel() == max(parameter.shape):
            parameter.uniform_(0.5, 1.5)
        elif "conv" not in name:
            parameter.normal_(std=min(parameter.shape[-2:]) ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("scalar", "scale")) and buffer.numel() == 1 and buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)


def _ids(batch: int = 3, sequence: int = 16) -> Tensor:
    return torch.arange(batch * sequence).mul(7).remainder(97).add(20).view(batch, sequence)


def _is_causal(model: nn.Module) -> bool:
    ids, later = _ids(), _ids()
    later[:, -1] = 20
    with torch.no_grad():
        before, after = (model(input_ids=tokens, use_cache=False)[0][:, :-1] for tokens in (ids, later))
    return torch.allclose(before, after, atol=1e-4)


def examine(name: str) -> Finding:
    """Build a type, resolve its sites, and check them on another batch."""
    finding = Finding(name)
    try:
        model = build(name)
        finding.decoder = not CONFIG_MAPPING[name]().is_encoder_decoder and _is_causal(model)
        sites = resolve(model)
    except Exception as error:
        finding.error = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        return finding
    finding.n_layers = sites.n_layers
    for full in sites.names():
        kind, _, layer = full.partition(".")
        finding.proven.setdefault(kind, []).append(int(layer or 0))
    for site, reason in sites.refused.items():
        plain = re.sub(r"\.\d+(?=[ .,)]|$)", ".L", reason)
        finding.refused.setdefault(plain, []).append(str(site))
    for row in sites.rows():
        finding.places.setdefault(row.name, []).extend([row.place] if row.proven else [])
    finding.refused |= {} if sites.n_layers else {sites.evidence: ["all"]}
    if "resid_pre.0" in sites:
        check(model, sites, finding)
    return finding


def check(model: nn.Module, sites: SiteMap, finding: Finding) -> None:
    """Look on another batch whether the proven sites are what their names say, and note what is not so."""
    ids = _ids()
    seen, clean = _run(model, sites, dict.fromkeys(sites.names(), lambda x: None), ids)
    relations: Counter[str] = Counter()
    for layer in range(sites.n_layers):
        here = {kind: seen[f"{kind}.{layer}"] for kind in LAYERED if f"{kind}.{layer}" in seen}
        follows = seen.get(f"resid_pre.{layer + 1}")
        if follows is not None and "resid_post" in here and not torch.equal(here["resid_post"], follows):
            finding.wrong.append(f"resid_post.{layer} is not resid_pre.{layer + 1}")
        for start, terms, goal in _steps(here, finding, layer):
            relation = _relation(here[start], torch.stack([here[term] for term in terms]).sum(0), here[goal])
            relations[relation] += 1
            if not relation:
                finding.wrong.append(f"{goal}.{layer} does not come from {start} and {' and '.join(terms)}")
    finding.stream = dict(relations)
    for site in sites.names():
        for edit, same in ((_shift, False), (torch.clone, True)):
            if torch.equal(_run(model, sites, {site: edit}, ids)[1], clean) is not same:
                finding.wrong.append(f"writing {'the same' if same else 'something else'} to {site} is not told apart")
        kind, _, number = site.partition(".")
        held = {name: seen[name] for name in (f"attn_out.{number}", f"mlp_out.{number}") if name in seen}
        known = {*held, *finding.absent} if f"resid_post.{number}" in seen else set()
        if kind not in _INSIDE or any(f"{name}.{number}" not in known for name in _INSIDE.values()):
            continue
        edits = {site: _shift} | {name: old.reshape_as for name, old in held.items()}
        after = _run(model, sites, edits | {f"resid_post.{number}": lambda x: None}, ids)[0]
        for name, same in ((f"{_INSIDE[kind]}.{number}", False), (f"resid_post.{number}", True)):
            if _close(after[name], seen[name]) is not same:
                finding.wrong.append(f"writing to {site} {'changes' if same else 'does not change'} {name}")


def _shift(x: Tensor) -> Tensor:
    return x + 0.5 * x.roll(1, -1)


def _steps(here: Mapping[str, Tensor], finding: Finding, layer: int) -> Iterator[tuple[str, list[str], str]]:
    """Yield start, contributions and goal of each sum that the names of one block promise."""
    if "resid_pre" not in here or "resid_post" not in here:
        return
    if "attn_out" in here and "resid_mid" in here:
        yield "resid_pre", ["attn_out"], "resid_mid"
    if "mlp_out" in here and "resid_mid" in here:
        yield "resid_mid", ["mlp_out"], "resid_post"
    terms = [kind for kind in ("attn_out", "mlp_out") if kind in here]
    missing = {f"{kind}.{layer}" for kind in ("attn_out", "mlp_out") if kind not in here}
    if terms and missing <= finding.absent and "resid_mid" not in here:
        yield "resid_pre", terms, "resid_post"


def _relation(start: Tensor, added: Tensor, goal: Tensor) -> str:
    """Return how a goal comes from the stream and what is added to it, tried from the simplest on; empty if none."""
    total = start + added
    if _close(total, goal):
        return "sum"
    if _is_normed(start, goal - added):
        return "sum with the scaled or normed stream"
    return "norm of the sum" if _is_normed(total, goal) else ""


def _is_normed(x: Tensor, y: Tensor) -> bool:
    centred = x - x.mean(-1, keepdim=True)
    tries = (x, x / x.square().mean(-1, keepdim=True).sqrt(), centred / centred.square().mean(-1, keepdim=True).sqrt())
    return any(_close(_channelwise(item, y), y) for item in tries)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm()) <= 1e-4 * float(wanted.norm())


def _channelwise(x: Tensor, y: Tensor) -> Tensor:
    """Return the best ``x * gain + bias`` for ``y``, with one gain and bias per channel."""
    x, y = x.double(), y.double()
    centred = x - x.mean((0, 1))
    gain = (centred * y).sum((0, 1)) / centred.square().sum((0, 1))
    return centred * gain + y.mean((0, 1))


def _run(
    model: nn.Module, sites: SiteMap, edits: Mapping[str, Callable[[Tensor], Tensor | None]], ids: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Run one forward with edits, and return what was at their sites, and the logits."""
    seen: dict[str, Tensor] = {}

    def noting(name: str, edit: Callable[[Tensor], Tensor | None], value: Tensor) -> Tensor | None:
        seen[name] = value.detach().clone()
        return edit(value)

    handles = [
        sites[name].register(partial(noting, name, edit), lambda: (ids.shape[0], ids.shape[1]))
        for name, edit in edits.items()
    ]
    try:
        with torch.no_grad():
            return seen, model(input_ids=ids, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()


def _examine_apart(name: str, seconds: float) -> Finding:
    """Examine a type in a process of its own, which may be killed."""

    def work(pipe: Connection) -> None:
        torch.set_num_threads(1)
        pipe.send(examine(name))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(seconds) else Finding(name, f"took more than {seconds:g} s")
    except EOFError:
        found = Finding(name, "the process died")
    process.kill()
    process.join()
    assert isinstance(found, Finding)
    return found


def summary(findings: Sequence[Finding]) -> str:
    """Return the numbers and what is refused as Markdown."""
    built = [finding for finding in findings if not finding.error]
    decoders = [finding for finding in built if finding.decoder]
    lines = [
        f"{len(findings)} types, {len(built)} built and run, {len(decoders)} of them decoder-only.",
        "\n| result | decoder-only | other |\n|---|---|---|",
    ]
    rows = ("full", "in part", "stream only", "blocks, but no single stream", "no blocks", "wrong")
    for row in rows:
        counts = [sum(f.result == row and f.decoder is decoder for f in built) for decoder in (True, False)]
        lines.append(f"| {row} | {counts[0]} | {counts[1]} |")
    lines.append("\n| not full | proven | refused, because |\n|---|---|---|")
    for finding in sorted(built, key=lambda f: (rows.index(f.result), f.name)):
        if finding.result != "full":
            lines.append(f"| `{finding.name}` | {_proven(finding)} | {_refused(finding)} |")
    lines += ["", "Not built: " + "; ".join(f"`{f.name}` ({f.error[:90]})" for f in findings if f.error)]
    return "\n".join(lines)


def _proven(finding: Finding) -> str:
    cells = []
    for kind in CORE:
        layers = finding.proven.get(kind, [])
        share = "" if len(layers) == finding.n_layers else f" ({len(layers)} of {finding.n_layers})"
        cells += [f"{kind}{share}"] if layers else []
    return ", ".join(cells) or f"{finding.n_layers} blocks"


def _refused(finding: Finding) -> str:
    reasons = []
    for reason, names in finding.refused.items():
        kinds = [kind for kind in CORE if any(name.partition(".")[0] in (kind, "all") for name in names)]
        reasons += [f"{', '.join(kinds)}: {reason}"] if kinds and reason not in reasons else []
    return "; ".join([*finding.wrong, *reasons]).replace("|", "\\|")


def main(
    types: Annotated[list[str] | None, typer.Argument(help="Only these model types. Default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for survey.json and survey.md.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Most time for one type.")] = 120.0,
) -> None:
    """Survey the types, and fail if a site that was accepted is not what its name says."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    logging.set_verbosity_error()
    findings = []
    for name in types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        findings.append(_examine_apart(name, seconds))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            rows = [dataclasses.asdict(finding) | {"result": finding.result} for finding in findings]
            (out / "survey.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            (out / "survey.md").write_text(summary(findings) + "\n", encoding="utf-8")
    console.print(summary(findings))
    if any(finding.wrong for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except SAEError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        sys.exit(1)
