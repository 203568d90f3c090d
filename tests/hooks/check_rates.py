"""Measure the error rates of attach()'s site check: python -m tests.hooks.check_rates MODEL SAES.

MODEL is a folder with a model and its tokenizer, SAES a folder with SAEs at any depth. Each SAE is checked on several
texts at every site of its width. An error or a warning at the SAE's own site is a false alarm; neither at another site
is a miss. Other names of the tensor at the SAE's own site are skipped.
"""

import collections
import dataclasses
import itertools
import pydoc_data.topics
import random
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gated_sae import SAEModel, Splice, capture, resolve
from hf_gated_sae.demo import corpus
from hf_gated_sae.errors import SiteError
from hf_gated_sae.hooks.probe_text import TEXT
from hf_gated_sae.hooks.site_check import check_saes


@dataclasses.dataclass
class Rates:
    """Numbers of checks at right and at wrong sites, with false alarms and misses counted by SAE and site."""

    right: int = 0
    wrong: int = 0
    false_alarms: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    misses: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def false_alarm_rate(self) -> float:
        return self.false_alarms.total() / self.right

    @property
    def miss_rate(self) -> float:
        return self.misses.total() / self.wrong

    def __add__(self, other):
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Rates(*(mine + theirs for mine, theirs in pairs))

    def __str__(self) -> str:
        lines = [
            f"false alarms: {self.false_alarms.total()} of {self.right}, {self.false_alarm_rate:.1%}",
            f"misses: {self.misses.total()} of {self.wrong}, {self.miss_rate:.1%}",
        ]
        for what, found in (("false alarm", self.false_alarms), ("missed", self.misses)):
            lines += [f"    {count} x {what}: {sae} at {site}" for (sae, site), count in found.most_common(20)]
        return "\n".join(lines)


def texts(tokenizer, *, lengths=(48, 128, 256), seeds=(0, 1)):
    """Return attach()'s own text and pieces of Python code and English prose, as token ids [1, S]."""
    sources = {
        "code": "\n".join(itertools.islice(corpus.texts("held_out"), 8)),
        "prose": "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)),
    }
    found = [TEXT]
    for (kind, source), length, seed in itertools.product(sources.items(), lengths, seeds):
        at = random.Random(f"{kind} {length} {seed}").randrange(len(source) - 16 * length)
        found.append(source[at : at + 16 * length])
    cuts = [128, *(length for _, length, _ in itertools.product(sources, lengths, seeds))]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in found]
    return [torch.tensor([[*first, *each[: cut - len(first)]]]) for each, cut in zip(ids, cuts, strict=True)]


def complains(model, sae, ids):
    """Whether the check gives an error or a warning."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            check_saes(model, [Splice(sae)], ids)
        except SiteError:
            return True
    return any(issubclass(each.category, UserWarning) for each in seen)


def count(model, saes, batches, sites=None):
    """Check SAEs at all sites of their width, on all texts.

    Args:
        model: the model.
        saes: SAEs by name, each with its own site.
        batches: token ids ``[1, S]``.
        sites: sites to check at; all of the model's by default.
    """
    slots, rates = resolve(model), Rates()
    for name, sae in saes.items():
        own = sae.config.site
        names = [site for site in sites or slots.names() if slots[site].width == sae.config.d_in]
        values = capture(model, [own, *names], input_ids=batches[0])
        for site, ids in itertools.product(dict.fromkeys([own, *names]), batches):
            same = site == own or torch.allclose(values[site], values[own], rtol=1e-4, atol=1e-5)
            if same and site != own:
                continue
            sae.config.site = site
            alarm = complains(model, sae, ids)
            rates.right, rates.wrong = rates.right + same, rates.wrong + (not same)
            if alarm == same:
                (rates.false_alarms if same else rates.misses)[name, site] += 1
        sae.config.site = own
    return rates


def main(model_folder, sae_folder, *sites):
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    folder = Path(sae_folder)
    paths = sorted(path.parent for path in folder.rglob("config.json"))
    saes = {str(path.relative_to(folder)): SAEModel.from_pretrained(path) for path in paths}
    sys.stdout.write(f"{count(model, saes, texts(tokenizer), sites)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
