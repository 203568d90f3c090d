"""The house plan: rooms stand on floors, and imports point down."""

import ast
import subprocess
from collections import Counter
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_gated_sae"
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
    """Return the rooms of this package that a file imports anywhere, except for type checking."""
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
    # transformers reaches the architectures through auto.py, which imports them only when they are used.
    allowed = {"architectures"} if path.name == "auto.py" else set()
    up = {room for room in imported_rooms(path) - allowed if FLOOR_OF.get(room, -1) > here}
    assert not up, f"{path.relative_to(PACKAGE)} (floor {here}) imports from a higher floor: {sorted(up)}"


UPWARD = {
    ("modeling/loading.py", "hf_gated_sae.formats", "open_checkpoint"),
    ("modeling/loading.py", "hf_gated_sae.formats", "described_tensors"),
    ("modeling/pretrained.py", "hf_gated_sae.publishing.push", "push_to_hub"),
}
"""Calls from a lower floor to a higher one, by name: users look for them on the model, which is below their code."""


def late_bound(tree: ast.AST) -> set[tuple[str, str]]:
    """Return the module and name of each `LateBound` in a file."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = (call for call in calls if getattr(call.func, "id", "") == "LateBound")
    return {(call.args[0].value, call.args[1].value) for call in named}


def test_late_bound_names_are_the_listed_ones():
    found = {
        (str(path.relative_to(PACKAGE)), *names)
        for path in FILES
        for names in late_bound(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == UPWARD


def imported_files(path: Path) -> set[Path]:
    """Return the files of this package that a file imports anywhere, except for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                candidates = (base / f"{alias.name}.py", base / alias.name / "__init__.py")
                candidates += (base.with_suffix(".py"), base / "__init__.py")
                found |= set([file for file in candidates if file.is_file()][:1])
    return found - {path}


CIRCLES = [{"hub/location.py", "hub/repository.py"}]
"""The one exception: a local folder may be a clone; `hub/location.py` imports the repository client only then."""


def test_there_are_no_other_import_circles():
    graph = networkx.DiGraph()
    for path in PACKAGE.rglob("*.py"):
        graph.add_edges_from((path, each) for each in imported_files(path) if each.name != "__init__.py")
        package = path.with_name("__init__.py")
        graph.add_edges_from(
            (path, each) for each in imported_files(path) if each.name == "__init__.py" and each != package
        )
    found = [circle for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]
    assert [{str(path.relative_to(PACKAGE)) for path in circle} for circle in found] == CIRCLES


SAME_JOB = {"__init__", "base", "saelens", "sparsify", "circuit_tracer", "temporal"}
"""File names that several rooms may have: base classes of registries, and files about one other library."""


def test_file_names_are_unique():
    names = Counter(path.stem for path in PACKAGE.rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} <= SAME_JOB


def test_the_repository_root_has_no_other_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    folders = {"hf_gated_sae", "hub_scripts", "model_cards", "tests", "docs"}
    files = {"pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"}
    files |= {"Makefile", "constraints.txt", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} == folders | files


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
