"""Write model_cards/: the cards of the bundled model and SAEs, and one example card per architecture."""

import sys
from pathlib import Path

from hf_gated_sae.architectures import architectures
from hf_gated_sae.demo import bundled
from hf_gated_sae.modeling import SAEModel
from hf_gated_sae.publishing import model_card, read_facts

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python hub_scripts/render_cards.py`
from hub_scripts.demo_assets.language_model_card import language_model_card

FOLDER = Path(__file__).parents[1] / "model_cards"
# An example has sizes, a site and a base model, and no metrics, since the SAE is not trained.
EXAMPLE = {"d_in": 768, "d_sae": 1024, "site": "resid_post.6", "base_model": "openai-community/gpt2"}


def render() -> dict[str, str]:
    """Return every card by its file name."""
    cards = {"python_stdlib_llama.md": language_model_card()}
    for config in sorted(bundled.SAES.rglob("config.json")):
        subfolder = config.parent.relative_to(bundled.SAES)
        sae = SAEModel.from_pretrained(bundled.SAES, str(subfolder))
        cards["_".join(("python_stdlib", *subfolder.parts)) + ".md"] = model_card(sae, read_facts(config.parent))
    for name, model_class in architectures.items():
        cards[f"example_{name}.md"] = model_card(model_class(model_class.config_class(**EXAMPLE)))
    return cards


def main() -> None:
    """Write the cards and remove those that are no longer rendered."""
    FOLDER.mkdir(exist_ok=True)
    cards = render()
    for stale in {path.name for path in FOLDER.glob("*.md")} - set(cards):
        (FOLDER / stale).unlink()
    for name, text in cards.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    (bundled.MODEL / "README.md").write_text(cards["python_stdlib_llama.md"], encoding="utf-8")


if __name__ == "__main__":
    main()
