"""model_cards/ is up to date with the code and the bundled files."""

import pytest
from huggingface_hub import ModelCard

from hub_scripts.render_cards import FOLDER, render

CARDS = render()


def test_the_folder_holds_exactly_the_rendered_cards():
    assert {path.name for path in FOLDER.glob("*.md")} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_up_to_date_and_its_metadata_can_be_read(name):
    stored = (FOLDER / name).read_text(encoding="utf-8")
    assert stored == CARDS[name], "run: make cards"
    data = ModelCard(stored).data.to_dict()
    assert name.startswith("example_") or data["license"] == "apache-2.0"
    assert data["library_name"] in ("hf-gated-sae", "transformers")
