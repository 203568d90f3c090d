"""Resolve the sites of every causal language model type of transformers: python -m hub_scripts.site_survey --out DIR.

Each type is built with tiny sizes from its default configuration, in its own process, and checked on another batch: by
reading and writing at the sites, and by the operations of the forward, which show what is added to the residual stream
and what the products read.
"""

import dataclasses
import json
import math
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_gated_sae.errors import SAEError
from hf_gated_sae.sites import SiteMap, resolve
from hf_gated_sae.sites.site import LAYERED
from hub_scripts.operations import Block, Recording, is_same
from hub_scripts.tiny_types import build, some_ids

CORE = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

_ABSENT = r"^nothing in it|only one kind of contribution|in parallel"
_INSIDE = {"attn_in": "attn_out", "attn_z": "attn_out", "mlp_in": "mlp_out", "mlp_neurons": "mlp_out"}


@dataclass
class Finding:
    """The results for one model type.

    Args:
        name: the model type.
        error: why it could not be built, run or resolved; empty if it could.
        decoder: whether it is a decoder-only model: not part of an encoder-decoder, and causal.
        n_layers: number of proven blocks.
        places: for each kind of site, its tensor paths with ``L`` for the layer.
        proven: for each kind of site, the layers in which it is proven.
        refused: for each reason, the sites to which it applies.
        stream: the number of times that each relation between stream and contributions was found on another batch.
        traced: number of sites that were compared with the operations of a forward.
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
    traced: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """The class of the result."""
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
        """Whether all contributions of a block have a site, and so does the stream between them, if there is one."""
        has = {kind for kind, layers in self.proven.items() if layer in layers}
        named = all(kind in has or f"{kind}.{layer}" in self.absent for kind in ("attn_out", "mlp_out"))
        between = "resid_mid" in has or f"resid_mid.{layer}" in self.absent
        return named and between and {"resid_pre", "resid_post"} <= has

    @property
    def absent(self) -> set[str]:
        """The sites that a block does not have: it has only one contribution, or adds both to the same stream."""
        return {name for why, names in self.refused.items() if re.search(_ABSENT, why) for name in names}


def _is_causal(model: nn.Module) -> bool:
    ids, later = some_ids(), some_ids()
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
        finding.places.setdefault(row.name, []).extend([row.tensor_path] if row.proven else [])
    finding.refused |= {} if sites.n_layers else {sites.evidence: ["all"]}
    if "resid_pre.0" in sites:
        check(model, sites, finding)
        finding.traced, faults = traced_faults(model, sites)
        finding.wrong += faults
    return finding


def traced_faults(model: nn.Module, sites: SiteMap, ids: Tensor | None = None) -> tuple[int, list[str]]:
    """Compare the sites within blocks with the operations of one forward.

    Args:
        model: the model.
        sites: its sites.
        ids: tokens ``[B, S]``; arbitrary ones by default.

    Returns:
        The number of sites that were compared, and the mismatches. Contributions of zeros are left out, as they cannot
        be compared.
    """
    with Recording() as recording:
        seen, _ = _run(model, sites, dict.fromkeys(sites.names(), lambda x: None), some_ids() if ids is None else ids)
    compared: list[str] = []
    wrong: list[str] = []

    def compare(site: str, allowed: Sequence[Tensor], what: str) -> None:
        if site in seen:
            compared.append(site)
            wrong.extend([] if any(is_same(seen[site], value) for value in allowed) else [f"{site} is not {what}"])

    for layer in range(sites.n_layers):
        ends = [seen.get(f"{kind}.{layer}") for kind in ("resid_pre", "resid_post")]
        if ends[0] is None or ends[1] is None:
            continue
        block = Block(recording, ends[0], ends[1])
        compare(f"resid_mid.{layer}", block.values, "a value of the residual stream")
        terms = block.terms()
        for kind, last in (("attn", "attn_z"), ("mlp", "mlp_neurons")):
            out = seen.get(f"{kind}_out.{layer}")
            if out is None or not out.any():
                continue
            compare(f"{kind}_out.{layer}", [term.content for term in terms], "an operand of an addition to the stream")
            for term in [term for term in terms if is_same(out, term.content)][:1]:
                compare(f"{kind}_in.{layer}", block.first_operands(term), "what the sublayer's first product reads")
                compare(f"{last}.{layer}", block.last_operands(term), "what the sublayer's last product reads")
    return len(compared), wrong


def check(model: nn.Module, sites: SiteMap, finding: Finding) -> None:
    """Check on another batch that the proven sites are what their names say, and record mismatches."""
    ids = some_ids()
    seen, clean = _run(model, sites, dict.fromkeys(sites.names(), lambda x: None), ids)
    relations: Counter[str] = Counter()
    for layer in range(sites.n_layers):
        here = {kind: seen[f"{kind}.{layer}"] for kind in LAYERED if f"{kind}.{layer}" in seen}
        follows = seen.get(f"resid_pre.{layer + 1}")
        if follows is not None and "resid_post" in here and not _continues(here["resid_post"], follows):
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
                finding.wrong.append(
                    f"writing {'the same' if same else 'something else'} to {site} is not distinguished"
                )
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


def _continues(before: Tensor, after: Tensor) -> bool:
    """Whether the stream is unchanged, or multiplied by a power of two."""
    factor = float(after.flatten()[before.abs().argmax()]) / float(before.flatten()[before.abs().argmax()])
    return math.frexp(factor)[0] == 0.5 and torch.equal(before * factor, after)


def _shift(x: Tensor) -> Tensor:
    return x + 0.5 * x.roll(1, -1)


def _steps(here: Mapping[str, Tensor], finding: Finding, layer: int) -> Iterator[tuple[str, list[str], str]]:
    """Yield start, contributions and result of each sum that the names of one block's sites imply."""
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
    """Return the simplest relation that gives `goal` from the stream and what is added to it; empty if none does."""
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
    """Return the best fit ``x * gain + bias`` to ``y``, with one gain and bias per channel."""
    x, y = x.double(), y.double()
    centred = x - x.mean((0, 1))
    gain = (centred * y).sum((0, 1)) / centred.square().sum((0, 1))
    return centred * gain + y.mean((0, 1))


def _run(
    model: nn.Module, sites: SiteMap, edits: Mapping[str, Callable[[Tensor], Tensor | None]], ids: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Run one forward with edits, and return the activations at their sites, and the logits."""
    seen: dict[str, Tensor] = {}

    def recorded(name: str, edit: Callable[[Tensor], Tensor | None], value: Tensor) -> Tensor | None:
        seen[name] = value.detach().clone()
        return edit(value)

    handles = [
        sites[name].register(partial(recorded, name, edit), lambda: (ids.shape[0], ids.shape[1]))
        for name, edit in edits.items()
    ]
    try:
        with torch.no_grad():
            return seen, model(input_ids=ids, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()


def _examine_apart(name: str, seconds: float) -> Finding:
    """Examine a type in its own process, which is killed after `seconds`."""

    def work(pipe: Connection) -> None:
        torch.set_num_threads(1)
        pipe.send(examine(name))

    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(sender,))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(seconds) else Finding(name, f"took more than {seconds:g} s")
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
        f"{len(findings)} types, {len(built)} built and run, {len(decoders)} of them decoder-only. "
        f"{sum(finding.traced for finding in built)} sites were compared with the operations of a forward.",
        "\n| result | decoder-only | other |\n|---|---|---|",
    ]
    rows = ("full", "in part", "stream only", "blocks, but no single stream", "no blocks", "wrong")
    for row in rows:
        counts = [sum(f.result == row and f.decoder is decoder for f in built) for decoder in (True, False)]
        lines.append(f"| {row} | {counts[0]} | {counts[1]} |")
    lines.append("\n| not full | proven | refused, with reason |\n|---|---|---|")
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
    seconds: Annotated[float, typer.Option(min=1, help="Time limit for one type.")] = 120.0,
) -> None:
    """Survey the types; the exit status is 1 if an accepted site is not what its name says."""
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
