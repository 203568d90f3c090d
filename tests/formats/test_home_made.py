"""Checkpoints in no known layout, which the user describes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_gated_sae import SAEModel, TopKSAE
from hf_gated_sae.errors import CheckpointError, InputError, MissingFileError, UnknownNameError
from hf_gated_sae.modeling import architectures
from tests.support.example_saes import assert_same, example
from tests.support.mini_hub import MiniHub

D_IN, D_SAE = 6, 16
Tensors = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def linear() -> Tensors:
    """Two linear layers and a bias that is subtracted first."""
    return {
        "encoder.weight": random(D_SAE, D_IN),
        "encoder.bias": random(D_SAE),
        "decoder.weight": random(D_IN, D_SAE),
        "pre_bias": random(D_IN),
    }


def expected(held: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents and reconstruction of `linear`, by hand."""
    latents = torch.relu((x - held["pre_bias"]) @ held["encoder.weight"].T + held["encoder.bias"])
    return latents, latents @ held["decoder.weight"].T + held["pre_bias"]


def assert_computes(sae: SAEModel, held: Tensors) -> None:
    x = random(5, D_IN) * 3
    latents, reconstruction = expected(held, x)
    assert latents.any()
    torch.testing.assert_close(sae.encode(x), latents)
    torch.testing.assert_close(sae(x).reconstruction, reconstruction)


def write(held: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in held.items()})
    else:
        torch.save(held, path)
    return path


# ---------------------------------------------------------------- every kind of file


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth", ".bin"])
def test_every_kind_of_file_and_place(suffix: str, tmp_path: Path) -> None:
    held = linear()
    path = write(held, tmp_path / "run" / f"mine{suffix}")
    places: list[tuple[Any, ...]] = [(path,), (tmp_path / "run",), (tmp_path, "run"), (tmp_path, f"run/mine{suffix}")]
    for place in places:
        sae = SAEModel.from_pretrained(
            *place, architecture="standard", site="resid_post.3", base_model="me/model", dtype=torch.float32
        )
        assert_computes(sae, held)
        assert (sae.config.d_in, sae.config.d_sae, sae.config.d_out) == (D_IN, D_SAE, D_IN)
        assert (sae.config.site, sae.config.base_model) == ("resid_post.3", "me/model")
        assert not sae.max_activation.any() and not sae.mean_activation.any() and sae.config.recorded_tokens == 0
        assert sae.checkpoint is not None and sae.checkpoint.format == "home_made" and not sae.training
        assert sae.checkpoint.files == (f"mine{suffix}",)


def test_some_latents_alone(tmp_path: Path) -> None:
    held = linear()
    write(held, tmp_path / "mine.pt")
    full = SAEModel.from_pretrained(tmp_path, architecture="standard")
    some = SAEModel.from_pretrained(tmp_path, architecture="standard", latents=[7, 2])
    torch.testing.assert_close(some.W_dec, held["decoder.weight"].T[[7, 2]])
    x = random(5, D_IN)
    torch.testing.assert_close(some.encode(x, [2]), full.encode(x, [2]))


def test_a_state_dict(tmp_path: Path) -> None:
    held = linear()
    before = {name: tensor.clone() for name, tensor in held.items()}
    sae = SAEModel.from_pretrained(None, architecture="standard", state_dict=held, site="resid_post.3")
    assert_computes(sae, held)
    assert sae.config.site == "resid_post.3" and sae.checkpoint is None
    wrapped = {"model": {f"sae.{name}": tensor for name, tensor in held.items()}, "cfg": {"k": 3}}
    topk = SAEModel.from_pretrained(None, architecture="topk", state_dict=wrapped)
    assert isinstance(topk, TopKSAE) and topk.config.k == 3
    sae.save_pretrained(tmp_path)
    assert_same(SAEModel.from_pretrained(tmp_path), sae)
    assert all(torch.equal(held[name], tensor) for name, tensor in before.items())


def test_a_repository_at_its_commit(hub: MiniHub, repo_id: str, cache_dir: str, tmp_path: Path) -> None:
    held = linear()
    content = write(held, tmp_path / "mine.pt").read_bytes()
    commit = hub.seed(repo_id, {"layer_3/mine.pt": content, "README.md": "mine"})
    for place in ("layer_3", "layer_3/mine.pt"):
        sae = SAEModel.from_pretrained(repo_id, place, architecture="standard", cache_dir=cache_dir)
        assert_computes(sae, held)
        assert sae.checkpoint is not None and sae.checkpoint.revision == commit
    hub.seed(repo_id, {"layer_3/mine.pt": b"another"})
    again = SAEModel.from_pretrained(
        repo_id, "layer_3", revision=commit, architecture="standard", cache_dir=cache_dir + "2"
    )
    assert_computes(again, held)
    with pytest.raises(CheckpointError, match="mine.pt.*cannot be read"):
        SAEModel.from_pretrained(repo_id, "layer_3", cache_dir=cache_dir)


# ---------------------------------------------------------------- wrappers and prefixes


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "sae.", "_orig_mod.module.sae."])
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "sae", None])
def test_wrappers_and_prefixes(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    held = linear()
    inner: Any = {prefix + name: tensor for name, tensor in held.items()}
    training = {"optimizer": {"state": {0: {"exp_avg": random(D_SAE, D_IN)}}}, "rng_state": torch.zeros(9).byte()}
    content = {wrapper: inner, "cfg": {"lr": 1e-3}, "step": 3, **training} if wrapper else inner
    write(content, tmp_path / "mine.pt")
    assert_computes(SAEModel.from_pretrained(tmp_path, architecture="standard"), held)


def test_what_may_belong_to_the_sae_is_never_dropped(tmp_path: Path) -> None:
    held = linear()
    write({"state_dict": held, "mean": random(D_IN)}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"mean \[6\] would be left over.*ignore=\['mean'\]"):
        SAEModel.from_pretrained(tmp_path, architecture="standard")
    assert_computes(SAEModel.from_pretrained(tmp_path, architecture="standard", ignore="mean"), held)


def test_two_saes_in_one_file(tmp_path: Path) -> None:
    first, second = linear(), {name: tensor * 2 for name, tensor in linear().items()}
    write({"model": first, "ema": second}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"'ema' and 'model' each hold one.*names=\{'W_enc': 'model.enc"):
        SAEModel.from_pretrained(tmp_path, architecture="standard")
    for names, held in (({"W_dec": "ema.decoder.weight"}, second), ({"b_dec": "model.pre_bias"}, first)):
        assert_computes(SAEModel.from_pretrained(tmp_path, architecture="standard", names=names), held)


def test_one_file_of_several_fits(tmp_path: Path) -> None:
    held = linear()
    write(held, tmp_path / "mine.pt")
    write({"state": {0: random(3, 3)}}, tmp_path / "other.pt")
    (tmp_path / "empty.pt").touch()
    assert_computes(SAEModel.from_pretrained(tmp_path, architecture="standard"), held)
    write(held, tmp_path / "second.pt")
    with pytest.raises(CheckpointError, match=r"Each of mine.pt, second.pt .*could be the SAE"):
        SAEModel.from_pretrained(tmp_path, architecture="standard")
    assert_computes(SAEModel.from_pretrained(tmp_path, "second.pt", architecture="standard"), held)


# ---------------------------------------------------------------- names, orientations, options

OURS = {"encoder.weight": "left", "encoder.bias": "up", "decoder.weight": "right", "pre_bias": "down"}
STATED = {"W_enc": "left", "b_enc": "up", "W_dec": "right", "b_dec": "down"}


@pytest.mark.parametrize("encoder", ["left", "left.T"])
@pytest.mark.parametrize("key", ["W_enc", "W_enc_T"])
def test_the_shape_decides_the_orientation_whatever_was_stated(key: str, encoder: str, tmp_path: Path) -> None:
    held = linear()
    renamed = {OURS[name]: tensor for name, tensor in held.items()}
    names = {**{name: theirs for name, theirs in STATED.items() if name != "W_enc"}, key: encoder}
    for turned in (renamed, {**renamed, "left": renamed["left"].T, "right": renamed["right"].T}):
        write(turned, tmp_path / "mine.safetensors")
        assert_computes(SAEModel.from_pretrained(tmp_path, architecture="standard", names=names), held)


@pytest.mark.parametrize("form", ["file", "state_dict"])
def test_a_square_matrix_is_oriented_as_stated(form: str, tmp_path: Path) -> None:
    held = {"W_enc": random(D_IN, D_IN), "W_dec": random(D_IN, D_IN) + 1, "b_enc": random(D_IN), "b_dec": random(D_IN)}
    place: dict[str, Any] = {"state_dict": held} if form == "state_dict" else {}
    path = None if form == "state_dict" else write(held, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError) as raised:
        SAEModel.from_pretrained(path, architecture="standard", **place)
    said = str(raised.value)
    assert "{'W_enc_T': 'W_enc'} if it is [d_sae, d_in], as nn.Linear stores it" in said
    assert "{'W_enc_T': 'W_enc.T'} if it is [d_in, d_sae]" in said
    assert "{'W_dec_T': 'W_dec'} if it is [d_out, d_sae], as nn.Linear stores it" in said
    for encoder, is_linear in (("W_enc", True), ("W_enc.T", False)):
        for decoder, is_linear_too in (("W_dec", True), ("W_dec.T", False)):
            names = {"W_enc_T": encoder, "W_dec_T": decoder}
            sae = SAEModel.from_pretrained(path, architecture="standard", names=names, **place)
            W_enc = held["W_enc"].T if is_linear else held["W_enc"]
            W_dec = held["W_dec"].T if is_linear_too else held["W_dec"]
            x = random(4, D_IN)
            latents = torch.relu((x - held["b_dec"]) @ W_enc + held["b_enc"])
            torch.testing.assert_close(sae.encode(x), latents)
            torch.testing.assert_close(sae(x).reconstruction, latents @ W_dec + held["b_dec"])


def test_a_skip_connection_of_a_square_matrix(tmp_path: Path) -> None:
    held = {**linear(), "skip.weight": random(D_IN, D_IN)}
    write(held, tmp_path / "mine.pt")
    options = {"architecture": "standard", "site": "mlp_in.1", "site_out": "mlp_out.1", "skip_connection": True}
    with pytest.raises(CheckpointError, match=r"'skip.weight.T'\} if it is \[d_out, d_in\], as nn.Linear stores it"):
        SAEModel.from_pretrained(tmp_path, **options)
    sae = SAEModel.from_pretrained(tmp_path, **options, names={"W_skip_T": "skip.weight.T"})
    x = random(4, D_IN)
    latents = torch.relu(x @ held["encoder.weight"].T + held["encoder.bias"])  # a transcoder subtracts no bias
    wanted = latents @ held["decoder.weight"].T + held["pre_bias"] + x @ held["skip.weight"].T
    torch.testing.assert_close(sae(x).reconstruction, wanted)


def test_a_missing_vector_is_zero_if_its_name_is_none(tmp_path: Path) -> None:
    held = linear()
    write({name: held[name] for name in ("encoder.weight", "decoder.weight", "encoder.bias")}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"b_dec \[d_out\].*None instead of a name.*b_dec is then zero"):
        SAEModel.from_pretrained(tmp_path, architecture="standard")
    sae = SAEModel.from_pretrained(tmp_path, architecture="standard", names={"b_dec": None})
    assert_computes(sae, {**held, "pre_bias": torch.zeros(D_IN)})
    with pytest.raises(CheckpointError, match="there is no W_dec; only vectors can be zero"):
        SAEModel.from_pretrained(tmp_path, architecture="standard", names={"b_dec": None, "W_dec": None})
    some = SAEModel.from_pretrained(tmp_path, architecture="standard", names={"b_dec": None}, latents=[3])
    torch.testing.assert_close(some.W_dec, held["decoder.weight"].T[[3]])


def test_a_matrix_that_is_used_twice(tmp_path: Path) -> None:
    matrix = random(D_SAE, D_IN)
    write({"dictionary": matrix, "encoder.bias": random(D_SAE), "pre_bias": random(D_IN)}, tmp_path / "mine.pt")
    sae = SAEModel.from_pretrained(
        tmp_path, architecture="standard", names={"W_enc": "dictionary", "W_dec": "dictionary"}
    )
    with torch.no_grad():
        sae.W_enc_T.zero_()
    assert torch.equal(sae.W_dec, matrix)


def test_vectors_with_axes_of_length_one(tmp_path: Path) -> None:
    held = linear()
    write(
        {**held, "pre_bias": held["pre_bias"][None], "encoder.bias": held["encoder.bias"][:, None]}, tmp_path / "m.pt"
    )
    assert_computes(SAEModel.from_pretrained(tmp_path, architecture="standard"), held)


def test_a_gated_sae_with_the_names_of_the_paper(tmp_path: Path) -> None:
    gated = example("gated", site="resid_post.1")
    held = {name: tensor for name, tensor in gated.state_dict().items() if "activation" not in name}
    held["W_enc"] = held.pop("W_enc_T").T.contiguous()
    write(held, tmp_path / "mine.pt")
    sae = SAEModel.from_pretrained(tmp_path, architecture="gated", site="resid_post.1")
    x = random(4, gated.config.d_in)
    torch.testing.assert_close(sae.encode(x), gated.encode(x))


def test_recorded_statistics_are_kept(tmp_path: Path) -> None:
    original = example("gated")
    torch.save(original.state_dict(), tmp_path / "mine.pt")
    loaded = SAEModel.from_pretrained(tmp_path, architecture="gated").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.state_dict().items())


def test_k_is_read_from_the_file_or_passed(tmp_path: Path) -> None:
    held = linear()

    def load(content: Any, **options: Any) -> int:
        write(content, tmp_path / "mine.pt")
        return SAEModel.from_pretrained(tmp_path, architecture="topk", **options).config.k

    with pytest.raises(CheckpointError, match="it does not state k: pass k="):
        load(held)
    assert load(held, k=5) == 5
    assert load({"state_dict": held, "cfg": {"top_k": 4}}) == 4
    assert load({"state_dict": held, "cfg": {"top_k": 4}}, k=5) == 5
    assert load({**held, "k": torch.tensor(3)}) == 3
    with pytest.raises(CheckpointError, match=r"it states cfg.k = 3, args.top_k = 4: pass k= to choose"):
        load({"state_dict": held, "cfg": {"k": 3}, "args": {"top_k": 4}})
    with pytest.raises(CheckpointError, match="does not state k"):
        load({"state_dict": held, "cfg": {"k": "many"}})


def test_a_wrapper_says_whether_the_bias_is_subtracted(tmp_path: Path) -> None:
    write({"state_dict": linear(), "cfg": {"apply_b_dec_to_input": False}}, tmp_path / "mine.pt")
    assert SAEModel.from_pretrained(tmp_path, architecture="standard").config.apply_b_dec_to_input is False
    options = {"architecture": "standard", "apply_b_dec_to_input": True}
    assert SAEModel.from_pretrained(tmp_path, **options).config.apply_b_dec_to_input is True


@pytest.mark.parametrize("name", [name for name, model_class in architectures.items() if model_class.sliceable])
def test_every_architecture_under_its_own_names(name: str, tmp_path: Path) -> None:
    original = example(name)
    held = {key: value for key, value in original.state_dict().items() if "activation" not in key}
    torch.save({"sae": held}, tmp_path / "mine.pt")
    own = original.config.to_dict()
    options = {key: own[key] for key in ("k", "groups", "residual_threshold", "max_iterations") if key in own}
    sae = SAEModel.from_pretrained(tmp_path, architecture=name, **options)
    x = random(4, original.config.d_in)
    torch.testing.assert_close(sae.encode(x), original.encode(x))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, options, phrases",
    [
        ({"extra": 3}, {}, [r"extra \[3\] would be left over", r"ignore=\['extra'\]", r"encoder.weight \[16, 6\]"]),
        ({"pre_bias": None}, {}, [r"no tensor is known to be b_dec \[d_out\]", r"names=\{'b_dec': \.\.\.\}"]),
        ({"pre_bias": 7}, {}, [r"\[16, 6\].*\[6, 16\] cannot be W_enc \[d_in, d_sae\], W_dec", "d_out = 7"]),
        ({"encoder.bias": 15}, {}, ["cannot be W_enc .*where .*d_sae = 15"]),
        ({}, {"d_sae": 17}, [r"encoder.bias has shape \[16\] and cannot be b_enc \[d_sae\] with d_sae = 17"]),
        ({}, {"names": {"W_encoder": "encoder.weight"}}, ["has 'W_encoder'", "Did you mean 'W_enc'"]),
        ({}, {"names": {"encoder.weight": "W_enc"}}, ["maps this library's names to the file's"]),
        ({}, {"names": {"W_enc": "encoder.weigth"}}, ["no 'encoder.weigth'", "Did you mean 'encoder.weight'"]),
        ({}, {"names": {"W_enc": "encoder.weight", "W_enc_T": "encoder.weight"}}, ["has W_enc twice"]),
        ({"decoder.bias": 6}, {}, ["pre_bias and decoder.bias could both be b_dec: choose one"]),
        ({"pre_bias": None, "extra": 3}, {"names": {"b_enc": "bias"}}, ["no 'bias'", "b_dec", "extra"]),
    ],
)
def test_one_error_lists_all_that_does_not_fit(
    change: dict[str, int | None], options: dict[str, Any], phrases: list[str], tmp_path: Path
) -> None:
    held = {**linear(), **{name: random(size) for name, size in change.items() if size}}
    held = {name: tensor for name, tensor in held.items() if change.get(name, 1)}
    write(held, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match="mine.pt of .* does not fit architecture 'standard'") as raised:
        SAEModel.from_pretrained(tmp_path, architecture="standard", **options)
    for phrase in phrases:
        assert re.search(phrase, str(raised.value)), (phrase, str(raised.value))
    with pytest.raises(CheckpointError, match="state_dict= does not fit architecture 'standard'"):
        SAEModel.from_pretrained(None, architecture="standard", state_dict=held, **options)


def test_wrong_arguments(tmp_path: Path) -> None:
    write(linear(), tmp_path / "mine.pt")
    with pytest.raises(UnknownNameError, match="'standart'.*Did you mean 'standard'"):
        SAEModel.from_pretrained(tmp_path, architecture="standart")
    with pytest.raises(InputError, match="names=.*without architecture="):
        SAEModel.from_pretrained(tmp_path, names={"W_enc": "encoder.weight"})
    with pytest.raises(InputError, match="names is .*expected names of the file's tensors"):
        SAEModel.from_pretrained(tmp_path, architecture="standard", names={"W_enc": 3})
    with pytest.raises(InputError, match="no argument 'sitee'.*Did you mean 'site'"):
        SAEModel.from_pretrained(tmp_path, architecture="standard", sitee="resid_post.1")
    with pytest.raises(InputError, match="no argument 'sitee'.*Did you mean 'site'"):
        SAEModel.from_pretrained(None, architecture="standard", state_dict=linear(), sitee="resid_post.1")
    with pytest.raises(InputError, match="CrossLayerSAE are of other shapes than one row per latent"):
        SAEModel.from_pretrained(tmp_path, architecture="cross_layer")
    with pytest.raises(InputError, match="format='native' and architecture="):
        SAEModel.from_pretrained(tmp_path, architecture="standard", format="native")
    with pytest.raises(InputError, match="format='home_made'.*without architecture="):
        SAEModel.from_pretrained(tmp_path, format="home_made")
    with pytest.raises(InputError, match="state_dict= is None; expected its tensors"):
        SAEModel.from_pretrained(None, architecture="standard")
    with pytest.raises(CheckpointError, match="is a StandardSAE, not a TopKSAE"):
        TopKSAE.from_pretrained(tmp_path, architecture="standard")
    with pytest.raises(MissingFileError, match="no folder 'nowhere'"):
        SAEModel.from_pretrained(tmp_path, "nowhere", architecture="standard")


def test_a_known_layout_takes_no_architecture(tmp_path: Path) -> None:
    example("standard", site="resid_post.1").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="in the layout 'native', which states its own architecture.*'home_made'"):
        SAEModel.from_pretrained(tmp_path, architecture="standard")
    read = SAEModel.from_pretrained(tmp_path, architecture="standard", format="home_made")
    assert read.config.site is None and torch.equal(read.W_dec, SAEModel.from_pretrained(tmp_path).W_dec)


def test_no_code_is_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "boom",))

    torch.save({"state_dict": linear(), "cfg": Bomb()}, tmp_path / "mine.pt")
    for options in ({}, {"architecture": "standard"}):
        with pytest.raises(CheckpointError, match="without running code"):
            SAEModel.from_pretrained(tmp_path, **options)
    assert not (tmp_path / "boom").exists()


# ---------------------------------------------------------------- checkpoints without a description


def test_the_error_has_the_tensors_the_nearest_architecture_and_the_call(tmp_path: Path) -> None:
    path = write({"state_dict": linear()}, tmp_path / "mine.pt")
    for place in (path, tmp_path):
        with pytest.raises(CheckpointError) as raised:
            SAEModel.from_pretrained(place)
        said = str(raised.value)
        assert "mine.pt holds state_dict.encoder.weight [16, 6], state_dict.encoder.bias [16]" in said
        assert "nearest to architecture 'standard'" in said
        assert f"SAEModel.from_pretrained({str(tmp_path)!r}, 'mine.pt', architecture='standard', site=" in said


@pytest.mark.parametrize(
    "change, phrases",
    [
        ({"pre_bias": None}, ["'standard'", ", lacking b_dec", "names={'b_dec': '...'}"]),
        ({"extra": 3}, ["'standard'", "with extra left over", "ignore=['extra']"]),
        ({"threshold": D_SAE}, ["'jumprelu'"]),
        ({"encoder.bias": None, "b_gate": D_SAE, "b_mag": D_SAE, "r_mag": D_SAE}, ["'gated'"]),
    ],
)
def test_the_nearest_architecture(change: dict[str, int | None], phrases: list[str], tmp_path: Path) -> None:
    held = {**linear(), **{name: random(size) for name, size in change.items() if size}}
    write({name: tensor for name, tensor in held.items() if change.get(name, 1)}, tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match="holds no SAE in a known format") as raised:
        SAEModel.from_pretrained(tmp_path)
    assert all(phrase in str(raised.value) for phrase in phrases), str(raised.value)


def test_an_unreadable_file_beside_it_does_not_hide_it(tmp_path: Path) -> None:
    write(linear(), tmp_path / "mine.safetensors")
    (tmp_path / "optimizer.pt").touch()
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="optimizer.pt.*is empty") as raised:
        SAEModel.from_pretrained(tmp_path)
    assert "config.json" in str(raised.value) and "nearest to architecture 'standard'" in str(raised.value)
    assert_computes(SAEModel.from_pretrained(tmp_path, architecture="standard"), linear())


def test_a_file_that_states_k_is_nearest_to_a_topk(tmp_path: Path) -> None:
    write({"state_dict": linear(), "cfg": {"k": 3}}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match="nearest to architecture 'topk'.*architecture='topk', site="):
        SAEModel.from_pretrained(tmp_path)


def test_tensors_that_do_not_look_like_an_sae(tmp_path: Path) -> None:
    write({"step": torch.tensor(3)}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"mine.pt holds step \[\]. They do not look like an SAE's"):
        SAEModel.from_pretrained(tmp_path)
    write({f"model.layers.{number}.mlp.weight": random(3, 4) for number in range(80)}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"\.\.\. \(80 tensors\). They do not look like an SAE's"):
        SAEModel.from_pretrained(tmp_path)
