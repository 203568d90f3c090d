"""Time that `import hf_gated_sae` adds to a program that imports torch and transformers' AutoModel."""

import subprocess
import sys

import pytest

from tests.benchmarks.measure import ratio, show

REFERENCE = "import torch; from transformers import AutoModel"


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.benchmark
def test_import_costs_little():
    measured = ratio(lambda: run(f"{REFERENCE}; import hf_gated_sae"), lambda: run(REFERENCE), rounds=15)
    show("import, 1.0 = torch + transformers.AutoModel", [("with hf_gated_sae", measured, 1.15)])
    assert measured <= 1.15


def test_the_slow_modules_are_not_imported():
    """The import is cheap because it loads only the lowest floor; other modules are loaded on first use."""
    slow = ["transformers.modeling_utils", "nnsight", "rich", "typer", "matplotlib", "jinja2"]
    code = (
        f"{REFERENCE}; import sys; before = set(sys.modules); import hf_gated_sae; "
        f"new = set(sys.modules) - before; assert not new & set({slow}), new & set({slow})"
    )
    run(code)
