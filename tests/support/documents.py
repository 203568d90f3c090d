"""Running the code in Markdown documents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def blocks(path: Path, language: str = "python") -> list[str]:
    """Return the code blocks of a document in one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def run(path: Path, folder: Path) -> dict[str, Any]:
    """Run the Python code of a document, in order, in one process, as a user of the loopback Hub.

    Args:
        path: of the document.
        folder: where the code is written, since nnsight reads the source of a with-block.

    Returns:
        The variables that the code defines, by name.
    """
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(path)):
        code = block.replace("me/my-saes", "alice/my-saes")
        file = folder / f"block_{number}.py"
        file.write_text(code, encoding="utf-8")
        exec(compile(code, str(file), "exec"), names)
    return names


def assert_edits(names: dict[str, Any]) -> None:
    """Assert that the interventions of a document have an effect."""
    clamped, scaled = names["handle"].report().interventions
    assert sum(map(len, clamped.positions.values())) >= 3 and sum(map(len, scaled.positions.values())) > 10
    sae, model, batch = names["sae"], names["model"], names["batch"]
    clean = model(**batch).logits
    for intervention in (names["Ablate"](sae, [293, 327]), names["Scale"](sae, {397: 0.5})):
        with names["attach"](model, intervention):
            assert not (model(**batch).logits == clean).all()
