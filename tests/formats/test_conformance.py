"""Conformance tests of every registered format; a new file in `formats/` needs a reference and no change here."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from hf_gated_sae import SAEModel
from hf_gated_sae.formats import Example, formats, open_checkpoint, sae_addresses
from hf_gated_sae.hub import locate
from tests.support.example_saes import assert_same
from tests.support.mini_hub import MiniHub

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def examples_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format's examples, each below its repository's name."""
    return tmp_path_factory.mktemp("examples")


def _cases() -> Iterator[tuple[str, Example]]:
    """List the examples of every format but our own, by writing them once."""
    import tempfile

    for name, layout in formats.items():
        if name != "native":
            with tempfile.TemporaryDirectory() as folder:
                yield from ((name, example) for example in layout.examples(Path(folder)))


CASES = list(_cases())
every_example = pytest.mark.parametrize(
    "name, example", CASES, ids=[f"{name}-{example.repo}/{example.address}" for name, example in CASES]
)


def reference_of(name: str) -> ModuleType:
    """Return the module of a format's equations; the test fails if there is none."""
    if importlib.util.find_spec(f"tests.formats.references.{name}") is None:
        pytest.fail(
            f"The format {name!r} has no reference to compare with: write tests/formats/references/{name}.py, as "
            "described in the __init__.py beside it."
        )
    return importlib.import_module(f"tests.formats.references.{name}")


@pytest.mark.parametrize("name", [name for name in formats if name != "native"])
def test_every_format_has_examples_with_expected_fields(name: str) -> None:
    examples = {f"{example.repo}/{example.address}" for own, example in CASES if own == name}
    assert examples, f"examples() of the format {name!r} wrote none"
    assert set(reference_of(name).EXPECTED) == examples


@pytest.fixture
def repo(name: str, example: Example, examples_root: Path) -> Path:
    """The folder that stands for the example's repository; written once per format."""
    if not (examples_root / name).exists():
        formats[name].examples(examples_root / name)
    return examples_root / name / example.repo


def relative_error(ours: torch.Tensor, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours.detach().double().numpy() - theirs) / np.linalg.norm(theirs))


def activations(sae: SAEModel, tokens: int = 32) -> torch.Tensor:
    shape = (tokens, *sae.input_shape)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11)) * 2 + 0.3


@every_example
def test_equals_the_authors_equations(name: str, example: Example, repo: Path) -> None:
    sae = SAEModel.from_pretrained(repo, example.address).float()
    x = activations(sae)
    place = repo / example.address
    latents, output = reference_of(name).reference(place, x.double().numpy())
    got = sae(x)
    assert 0 < np.count_nonzero(latents), "an example whose latents are all off proves nothing"
    assert relative_error(got.latents, latents) < TOLERANCE
    assert relative_error(got.reconstruction, output) < TOLERANCE


@every_example
def test_the_configuration_is_complete(name: str, example: Example, repo: Path) -> None:
    sae = SAEModel.from_pretrained(repo, example.address)
    wanted = {"site": ..., "base_model": ..., **reference_of(name).EXPECTED[f"{example.repo}/{example.address}"]}
    for field, value in wanted.items():
        found = getattr(sae.config, field)
        assert found == value if value is not ... else found, f"{field} is {found!r}"
    assert sae.config.recorded_tokens == 0
    assert sae.checkpoint is not None and sae.checkpoint.format == name
    assert sae.checkpoint.subfolder == example.address and sae.checkpoint.files


@every_example
def test_any_loaded_sae_can_be_saved_again(name: str, example: Example, repo: Path, tmp_path: Path) -> None:
    sae = SAEModel.from_pretrained(repo, example.address)
    sae.save_pretrained(tmp_path / "ours")
    assert_same(SAEModel.from_pretrained(tmp_path / "ours"), sae)


@every_example
def test_some_latents_alone_are_those_of_the_full_sae(name: str, example: Example, repo: Path) -> None:
    full = SAEModel.from_pretrained(repo, example.address).double()
    if not full.sliceable:
        with pytest.raises(ValueError, match="latents="):
            SAEModel.from_pretrained(repo, example.address, latents=[1])
        return
    some = SAEModel.from_pretrained(repo, example.address, latents=[7, 2, 11]).double()
    ids = [2, 11]
    assert some.config.d_sae == full.config.d_sae and some.W_dec.shape[0] == 3
    assert torch.equal(some.W_dec[some.latent_indices(ids)], full.W_dec[ids])
    if full.elementwise:
        x = activations(full).double()
        torch.testing.assert_close(some.encode(x, ids), full.encode(x, ids), rtol=1e-12, atol=1e-12)


@every_example
def test_it_is_found_by_names_and_claimed_by_one_format(name: str, example: Example, repo: Path) -> None:
    location = locate(str(repo))
    assert example.address in sae_addresses(location)
    here = location.at(example.address)
    assert [other for other, layout in formats.items() if layout.claims(here)] == [name]


@every_example
def test_the_hub_gives_what_the_folder_gives(
    name: str, example: Example, repo: Path, examples_root: Path, hub: MiniHub, cache_dir: str
) -> None:
    for folder in (examples_root / name).glob("*/*"):  # with the repositories that this one may point to
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        hub.seed(folder.relative_to(examples_root / name).as_posix(), files)
    remote = SAEModel.from_pretrained(example.repo, example.address, cache_dir=cache_dir)
    assert_same(remote, SAEModel.from_pretrained(repo, example.address))
    assert remote.checkpoint.revision == hub.repo(example.repo).at("main").id
    described = open_checkpoint(example.repo, example.address, cache_dir=cache_dir + "2")
    fetched = {path.name for path in Path(cache_dir + "2").rglob("*") if path.is_symlink()}
    assert described.config.d_sae == remote.config.d_sae
    assert not {file for file in fetched if file.endswith((".safetensors", ".npz", ".pt", ".pth"))}
