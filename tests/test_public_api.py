"""The names that users import, and the base class of all errors."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_gated_sae
from hf_gated_sae import errors, exports
from hf_gated_sae.architectures import architectures
from hf_gated_sae.interventions import interventions
from hf_gated_sae.registry import Registry

STUB = Path(hf_gated_sae.__file__).with_suffix(".pyi")


@pytest.mark.parametrize("name", hf_gated_sae.__all__)
def test_names_in_all_exist_at_run_time(name):
    assert getattr(hf_gated_sae, name).__name__ == name


def test_the_stub_is_what_is_exported():
    assert STUB.read_text(encoding="utf-8") == exports.stub(), "run make stub"


def test_every_built_in_plug_in_is_exported_and_in_dir():
    models = [cls for model in architectures.values() for cls in (model, model.config_class)]
    ours = {cls.__name__ for cls in [*models, *interventions.values()] if cls.__module__.startswith("hf_gated_sae.")}
    assert ours <= set(hf_gated_sae.__all__) <= set(dir(hf_gated_sae))


def test_a_new_file_is_exported_without_editing_another(tmp_path, monkeypatch):
    for room in ("architectures", "interventions"):
        (tmp_path / room).mkdir()
    (tmp_path / "architectures" / "their.py").write_text(
        "class TheirSAEConfig(SAEConfig): ...\nclass TheirSAE(SAEModel): ...\n"
    )
    (tmp_path / "interventions" / "turn_off.py").write_text(
        "class TurnOff(LatentEdit): ...\nclass Helper(object): ...\n"
    )
    (tmp_path / "interventions" / "_helper.py").write_text("class Helper(object): ...\n")
    monkeypatch.setattr(exports, "PACKAGE", tmp_path)
    found = exports.exported.__wrapped__()
    assert found["TheirSAE"] == found["TheirSAEConfig"] == "architectures.their"
    assert found["TurnOff"] == "interventions.turn_off" and "Helper" not in found


def test_importing_the_package_imports_no_torch():
    code = "import sys, hf_gated_sae; dir(hf_gated_sae); hf_gated_sae.__all__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="GatdSAE"):
        hf_gated_sae.GatdSAE  # noqa: B018  # reading it is the test


ERRORS = [error for _, error in inspect.getmembers(errors, inspect.isclass) if error.__module__ == errors.__name__]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_derives_from_sae_error_and_a_builtin_error(error):
    assert issubclass(error, errors.SAEError)
    if error is not errors.SAEError:
        builtin = (ValueError, IndexError, LookupError, RuntimeError, FileNotFoundError, ImportError)
        assert issubclass(error, builtin), "callers who know only Python should be able to catch it"


def test_close_names_are_suggested_and_others_listed():
    assert "Did you mean 'gated'?" in str(errors.unknown_name("architecture", "Gatd", ["gated", "topk"]))
    assert "Known: gated, topk" in str(errors.unknown_name("architecture", "llama", ["gated", "topk"]))


def test_a_name_can_be_registered_once():
    registry: Registry = Registry("thing", "hf_gated_sae.functional")
    registry.register("a", int)
    registry.register("a", int)  # a module imported twice is no conflict
    with pytest.raises(errors.InputError, match="already taken"):
        registry.register("a", str)


def test_an_architecture_of_another_package_is_found(tmp_path):
    """A third-party architecture needs one file and one entry point, and no change in this package."""
    package = tmp_path / "their_sae"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from huggingface_hub.dataclasses import strict\n"
        "from hf_gated_sae.architectures.standard import StandardSAE\n"
        "from hf_gated_sae.modeling import SAEConfig\n"
        "@strict\n"
        "class TheirSAEConfig(SAEConfig):\n"
        "    model_type = 'their_sae'\n"
        "class TheirSAE(StandardSAE):\n"
        "    config_class = TheirSAEConfig\n"
    )
    info = tmp_path / "their_sae-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-sae\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hf_gated_sae.architectures]\ntheir = their_sae\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import hf_gated_sae\n"
        "from transformers import AutoConfig, AutoModel\n"
        "config = AutoConfig.for_model('their_sae', d_in=4, d_sae=8)\n"
        "AutoModel.from_config(config).save_pretrained(sys.argv[1] + '/saved')\n"
        "again = hf_gated_sae.SAEModel.from_pretrained(sys.argv[1] + '/saved')\n"
        "assert type(again).__name__ == 'TheirSAE' and type(again) is hf_gated_sae.TheirSAE\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
