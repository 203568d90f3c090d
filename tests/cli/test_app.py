"""The command line as a whole."""

from __future__ import annotations

import sys

import pytest

from hf_gated_sae.cli import main


def test_what_looks_like_markup_is_printed_as_it_is(monkeypatch, capsys) -> None:
    for given in ("./no[/bold]such", "./no[red]such"):
        monkeypatch.setattr(sys, "argv", ["hf-gated-sae", "info", given])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        assert f"error: There is no folder '{given}'" in capsys.readouterr().err
