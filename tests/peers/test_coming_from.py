"""The documentation's code for other libraries runs there, and computes the same as ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import torch

from tests.support.documents import blocks, run
from tests.support.gpt2_small import seed_gpt2_small

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coming-from.md"
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SAVED = """
import numpy
named = {"x": x, "latents": latents, "logits": logits, "ablated": ablated, "tokens": tokens}
numpy.savez("theirs.npz", **{name: value.detach().numpy() for name, value in named.items()})
"""


def test_saelens_code_computes_the_same(hub, tmp_path, monkeypatch, capsys):
    seed_gpt2_small(hub, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    [code] = blocks(PAGE, "python saelens")
    (tmp_path / "theirs.py").write_text(code + SAVED, encoding="utf-8")
    environment = {**os.environ, **hub.env(token="hf_alice", home=str(tmp_path / "home")), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([PYTHON, "theirs.py"], env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    theirs = {name: torch.from_numpy(value) for name, value in np.load("theirs.npz").items()}
    ours = run(PAGE, tmp_path)
    # TransformerLens puts a BOS before the text, which this tokenizer does not.
    assert theirs["tokens"][0, 1:].tolist() == ours["batch"]["input_ids"][0].tolist()
    sae, model = ours["sae"], ours["model"]
    x = ours["capture"](model, ["resid_pre.8"], input_ids=theirs["tokens"])["resid_pre.8"]
    assert torch.allclose(x - x.mean(-1, keepdim=True), theirs["x"], atol=1e-4)  # its weights are processed
    assert torch.allclose(sae.encode(x), theirs["latents"], atol=1e-4)
    for name, edit in (("logits", ours["Splice"](sae, special_tokens=True)), ("ablated", None)):
        edit = edit or ours["Ablate"](sae, [7], special_tokens=True)
        with ours["attach"](model, edit, check=False):
            logits = model(theirs["tokens"]).logits
        assert torch.allclose(logits.log_softmax(-1), theirs[name].log_softmax(-1), atol=1e-3), name
