"""Helpers for tests of the command line: its subcommands, and running one as a shell would."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import typer

from hf_gated_sae.cli import main
from hf_gated_sae.cli.app import app, load_commands

load_commands()
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]  # it is a group


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["hf-gated-sae", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)
