"""The house plan: rooms stand on floors, and imports point down."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_gated_sae"
FLOORS = [
    {"errors", "registry", "auto", "versions", "exports", "upstream"},
    {"functional", "storage"},
    {"hub"},
    {"modeling"},
    {"architectures"},
    {"formats"},
    {"catalog"},
    {"sites"},
    {"interventions"},
    {"hooks"},
    {"evaluation"},
    {"training"},
    {"publishing"},
    {"dashboard", "cli", "demo"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in FLOOR_OF)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports, wherever in the file, type-checking imports left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    rooms = set()
    package = ("hf_gated_sae", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("hf_gated_sae.")}
    return rooms


def test_every_room_has_a_floor():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert (files | rooms) - {"__init__"} <= set(FLOOR_OF), "a room without a floor: add it to the house plan"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = FLOOR_OF[room_of(path)]
    # auto.py is the door through which transformers reaches the architectures; it opens it only when asked.
    allowed = {"architectures"} if path.name == "auto.py" else set()
    up = {room for room in imported_rooms(path) - allowed if FLOOR_OF.get(room, -1) > here}
    assert not up, f"{path.relative_to(PACKAGE)} (floor {here}) imports from a higher floor: {sorted(up)}"


def test_an_upward_import_is_found(tmp_path, monkeypatch):
    package = tmp_path / "hf_gated_sae"
    (package / "functional").mkdir(parents=True)
    file = package / "functional" / "bad.py"
    file.write_text("def f():\n    from ..hooks import attach\n    from hf_gated_sae.sites import resolve\n")
    monkeypatch.setitem(globals(), "PACKAGE", package)
    assert imported_rooms(file) == {"hooks", "sites"}


def test_nnsight_is_not_imported():
    import subprocess
    import sys

    code = "import sys, hf_gated_sae; from hf_gated_sae import attach; assert 'nnsight' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
