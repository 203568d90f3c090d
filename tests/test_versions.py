"""Supported versions: pyproject.toml and the package state the same ranges, and other versions are refused."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hf_gated_sae.errors import VersionError
from hf_gated_sae.versions import SUPPORTED, require_supported

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_pyproject_and_the_package_state_the_same_ranges():
    extras = [each for several in PROJECT["optional-dependencies"].values() for each in several]
    stated = {each.name: each.specifier for each in map(Requirement, [*PROJECT["dependencies"], *extras])}
    for library, accepted in SUPPORTED.items():
        assert stated[library] == Requirement(f"x{accepted}").specifier


def test_the_oldest_tested_versions_are_the_oldest_supported():
    lines = (Path(__file__).parent / "matrix" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    promised = {library: accepted.split(",")[0].removeprefix(">=") for library, accepted in SUPPORTED.items()}
    del promised["torch"]  # its old builds are too large to install each time
    assert {library: pinned[library].removesuffix(".0") for library in promised} == promised


def test_installed_versions_are_supported():
    require_supported(*SUPPORTED)


@pytest.mark.parametrize("version", ["6.0.0", "6.0.0.dev0", "5.15.1", "4.57.6"])
def test_other_versions_are_refused_with_an_install_command(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda library: version)
    with pytest.raises(VersionError, match=rf"transformers {version} .* pip install 'transformers<6,>=5.16'"):
        require_supported("transformers")


def test_development_versions_within_the_range_are_accepted(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda library: "5.99.0.dev0")
    require_supported("transformers")


def test_a_newer_major_version_is_refused_when_hooks_are_imported():
    code = (
        "from importlib import metadata; real = metadata.version\n"
        "metadata.version = lambda name: '6.0.0' if name == 'transformers' else real(name)\n"
        "from hf_gated_sae import attach"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "VersionError: transformers 6.0.0 is installed" in done.stderr
