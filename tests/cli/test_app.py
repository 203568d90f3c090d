"""The command line as a whole."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from hf_gated_sae.cli import main

pytestmark = pytest.mark.slow


def test_what_looks_like_markup_is_printed_as_it_is(monkeypatch, capsys) -> None:
    for given in ("./no[/bold]such", "./no[red]such"):
        monkeypatch.setattr(sys, "argv", ["hf-gated-sae", "info", given])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        assert f"error: There is no folder '{given}'" in capsys.readouterr().err


def test_a_warning_is_one_line_without_source(monkeypatch, capsys) -> None:
    def search(*_, **__):
        warnings.warn("[bold] is not markup here", UserWarning, stacklevel=2)
        return []

    monkeypatch.setattr("hf_gated_sae.catalog.index_search.search", search)
    monkeypatch.setattr(sys, "argv", ["hf-gated-sae", "search", "--no-live"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.splitlines()[0] == "warning: [bold] is not markup here"


@pytest.mark.parametrize(
    "code",
    [
        "import hf_gated_sae; from transformers import AutoModel",
        "from transformers import AutoModel; import hf_gated_sae",
        "import transformers, hf_gated_sae; from transformers import AutoModel",
        "import hf_gated_sae, importlib.util as u; u.find_spec('transformers.models.auto.configuration_auto');"
        "from transformers import AutoModel",
    ],
)
def test_auto_classes_know_our_saes_however_they_are_imported(code) -> None:
    code += (
        "\nfrom hf_gated_sae.demo import bundled\n"
        "print(type(AutoModel.from_pretrained(bundled.SAES / 'resid_post.1/gated')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "GatedSAE\n", done.stderr


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, hf_gated_sae; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
