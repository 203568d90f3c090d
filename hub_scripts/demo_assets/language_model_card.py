"""The card of the bundled language model; `hf_gated_sae.publishing` generates the SAEs' cards."""

from __future__ import annotations

import json
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from hf_gated_sae.demo import bundled


def language_model_card() -> str:
    """Return the bundled language model's card, with all numbers read from its ``training.json``."""
    facts = json.loads((bundled.MODEL / "training.json").read_text(encoding="utf-8"))
    template = (files(__package__) / "language_model.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    sections = {name: facts[name] for name in ("recipe", "corpus", "held_out", "samples")}
    return environment.from_string(template).render(facts=facts, **sections)
