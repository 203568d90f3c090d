"""The built site: the pages in its menu exist, and its API reference has every public name, with a docstring."""

from __future__ import annotations

import importlib.util
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import hf_gated_sae
from hf_gated_sae.architectures import architectures

ROOT = Path(__file__).parents[1]


def _make_site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = _make_site()
PAGES = SITE.reference()
ENTRIES = [(page, name) for page, text in PAGES.items() for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)]


def _found(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_in_the_reference_and_is_what_users_import():
    built_in = {cls.__name__ for model in architectures.values() for cls in (model, model.config_class)}
    public = set(hf_gated_sae.__all__) | {name for name in built_in if hasattr(hf_gated_sae, name)}
    entries = {path.rpartition(".")[2]: path for _, path in ENTRIES}
    assert public <= set(entries)
    assert all(_found(entries[name]) is getattr(hf_gated_sae, name) for name in public)
    assert {name for names in SITE.public_names().values() for name in names} == public


@pytest.mark.parametrize("path", sorted({path for _, path in ENTRIES}))
def test_every_name_in_the_reference_has_a_docstring(path):
    found = importlib.import_module(path) if path.count(".") == 1 else _found(path)
    assert vars(found).get("__doc__") if inspect.isclass(found) else inspect.getdoc(found)


def test_no_page_of_the_reference_is_empty():
    for page in PAGES:
        assert page == "errors" or sum(name == page for name, _ in ENTRIES) > 1, page


def _targets(entries: list[object]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from _targets(value) if isinstance(value, list) else [value]


def test_the_menu_has_every_page_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(SITE, "SOURCE", tmp_path / "docs-source")
    SITE.main()
    settings = tomllib.loads((tmp_path / "zensical.toml").read_text(encoding="utf-8"))["project"]
    menu = list(_targets(settings["nav"]))
    made = {path.relative_to(tmp_path / "docs-source").as_posix() for path in tmp_path.rglob("*.md")}
    assert len(menu) == len(set(menu)) and set(menu) == made
    assert all((tmp_path / "docs-source" / name).is_file() for name in settings["extra_css"])
