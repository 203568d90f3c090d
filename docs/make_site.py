"""Prepare what `make docs` builds the site from: pages with their links as the site has them, and the API reference.

Only the standard library is needed: the package is read, not imported.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_gated_sae"
SOURCE = ROOT / "build" / "docs-source"

COMMANDS = frozenset({"cli", "demo"})
"""Rooms that are run, not imported."""

_TEXT_ALONE = "    options: {show_root_heading: false, members: false}\n"
_FENCE = re.compile(r"(^```.*?^```\n)", re.DOTALL | re.MULTILINE)
_WORDS = re.compile(r"^(```\w+) .*")  # after the language, for the tests
_CELLS = re.compile(r"<(table|tr|td)>")  # GitHub reads Markdown in them unasked
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def public_names() -> dict[str, list[str]]:
    """Return every name that `hf_gated_sae` exports, by room, as its type stub lists them."""
    names: dict[str, list[str]] = {}
    for node in _tree(PACKAGE / "__init__.pyi").body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.setdefault(node.module.split(".")[0], []).extend(alias.name for alias in node.names)
    return {room: sorted(names[room]) for room in sorted(names)}


def room_names(room: str) -> list[str]:
    """Return what a room lists in its `__all__`."""
    for node in _tree(PACKAGE / room / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def definition(file: Path, name: str) -> str | None:
    """Return the full name of a class or a function, or None if the name is of something else.

    A function may have the name of the file that it is in, so that its room's name and its own would be ambiguous.

    Args:
        file: where the name is defined, or imported to.
        name: the name.
    """
    for node in ast.walk(_tree(file)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return ".".join([*file.relative_to(ROOT).with_suffix("").parts, name]).replace(".__init__", "")
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            base = file.parents[node.level - 1].joinpath(*node.module.split("."))
            source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
            if node.level and source.is_file():
                return definition(source, name)
    return None


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def reference() -> dict[str, str]:
    """Return the pages of the API reference by name: one for each room, and one for the errors."""
    public, pages = public_names(), {}
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        room = folder.name
        exported = public.get(room, [])
        sections = {
            "hf_gated_sae": [definition(PACKAGE / "__init__.pyi", name) for name in exported],
            f"hf_gated_sae.{room}": [
                definition(folder / "__init__.py", name) for name in room_names(room) if name not in exported
            ],
        }
        text = ""
        for module, found in sections.items():
            names = [name for name in found if name is not None]
            text += f"\n## From `{module}`\n\n" * bool(names) + "\n".join(f"::: {name}\n" for name in names)
        if text and room not in COMMANDS:
            pages[room] = f"# {room}\n\n::: hf_gated_sae.{room}\n{_TEXT_ALONE}{text}"
    pages["errors"] = "# errors\n\n::: hf_gated_sae.errors\n    options: {show_root_heading: false}\n"
    return pages


def overview() -> str:
    """Return the first page of the reference."""
    rows = [
        f"| [{room}]({room}.md) | " + ", ".join(f"`{name}`" for name in names) + " |"
        for room, names in public_names().items()
    ]
    return (
        "# API reference\n\nMade from the docstrings. The names that `hf_gated_sae` exports, by room:\n\n"
        "| room | names |\n|---|---|\n" + "\n".join(rows) + "\n\nA room's page also lists the names that the room "
        "itself exports: the reports that functions return, and the base classes of new variants.\nEvery "
        "[error](errors.md) is a `SAEError`, and also one of Python's own.\n"
    )


def place(path: Path) -> Path:
    """Return where the site has a file of the repository."""
    relative = path.resolve().relative_to(ROOT)
    if relative == Path("README.md"):
        return Path("index.md")
    return relative.relative_to("docs") if relative.parts[0] == "docs" else relative


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the place and the text of every page, and copy the other files to which pages lead."""
    waiting = [ROOT / "README.md", ROOT / "docs" / "site.css", *sorted((ROOT / "docs").rglob("*.md"))]
    seen = set(waiting)
    for path in waiting:  # which grows
        here = place(path)

        def moved(link: re.Match[str], path: Path = path, here: Path = here) -> str:
            target = (path.parent / link[1]).resolve()
            if target not in seen:
                seen.add(target)
                waiting.append(target)
            return Path(os.path.relpath(place(target), here.parent)).as_posix()

        if path.suffix == ".md":
            parts = _FENCE.split(path.read_text(encoding="utf-8"))
            for number, part in enumerate(parts):
                if number % 2:
                    parts[number] = _WORDS.sub(r"\1", part, count=1)
                else:
                    parts[number] = _CELLS.sub(r'<\1 markdown="1">', _LINK.sub(moved, part))
            yield here, "".join(parts)
        else:
            (SOURCE / here).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, SOURCE / here)


def main() -> None:
    """Write everything to `build/docs-source`."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    made = reference()
    written = dict(pages())
    written |= {Path("reference", f"{name}.md"): text for name, text in made.items()}
    written[Path("reference", "index.md")] = overview()
    for where, text in written.items():
        file = SOURCE / where
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    entries = ["index", *sorted(made)]
    listing = "\n".join(f'        "reference/{name}.md",' for name in entries)
    settings = (ROOT / "docs" / "zensical.toml").read_text(encoding="utf-8")
    settings = settings.replace('{ "API reference" = [] }', f'{{ "API reference" = [\n{listing}\n    ] }}')
    (SOURCE.parent / "zensical.toml").write_text(settings, encoding="utf-8")


if __name__ == "__main__":
    main()
