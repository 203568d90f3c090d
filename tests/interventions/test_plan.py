"""A plan is saved and loaded without loss; a file that holds anything else is an error."""

import copy
import json
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_gated_sae import (
    Ablate,
    AblateSite,
    Clamp,
    InterventionPlan,
    ProjectOut,
    SAEModel,
    Splice,
    Steer,
    attach,
)
from hf_gated_sae.errors import InputError, MissingFileError, SAEError
from tests.hooks.support import IDS, SITE, logits_of, make_sae, model_of
from tests.support.example_saes import example

from .examples import every_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SAE on disk."""
    path = tmp_path_factory.mktemp("saved") / "sae"
    make_sae().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sae(folder):
    return SAEModel.from_pretrained(folder)


def same(one, other):
    """Whether two values are bit-identical and of the same type."""
    if isinstance(one, torch.Tensor):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.dtype.itemsize, one.dtype)
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(bits), other.view(bits))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and repr(one) == repr(other)


def test_every_verb_is_the_same_after_saving_and_loading(sae, folder, tmp_path):
    plan = InterventionPlan(every_plan(sae))
    plan.save(tmp_path / "plan.json")
    again = InterventionPlan.load(tmp_path / "plan.json")
    assert [type(each) for each in again] == [type(each) for each in plan]
    saes = set()
    for one, other in zip(plan, again, strict=True):
        for field in fields(one):
            left, right = getattr(one, field.name), getattr(other, field.name)
            if isinstance(left, SAEModel):
                saes.add(right)
            elif not isinstance(left, tuple) or not field.name.startswith("_"):
                assert same(left, right), (type(one).__name__, field.name)
    [loaded] = saes  # loaded once, for all interventions
    assert loaded is not sae
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in sae.state_dict().items())
    assert again.to_dict() == plan.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_loaded_plan_gives_the_same_logits(sae, tmp_path):
    model = model_of("llama")
    plan = InterventionPlan([Clamp(sae, {3: 8.0}, when={5: 0.0}, window=3), Steer(SITE, torch.ones(32))])
    plan.save(tmp_path / "plan.json")
    with attach(model, *plan, check=False):
        expected = logits_of(model, IDS)
    for loaded in (
        InterventionPlan.load(tmp_path / "plan.json"),
        InterventionPlan.load(str(tmp_path / "plan.json"), only_needed=True),
    ):
        with attach(model, *loaded, check=False):
            assert torch.equal(logits_of(model, IDS), expected)
    assert (len(plan), plan[0], list(plan)) == (2, plan.interventions[0], [*plan.interventions])


def test_only_the_latents_that_are_needed_are_loaded(sae, folder):
    needs = InterventionPlan([Clamp(sae, {9: 8.0}, when={5: 0.0}), Ablate(sae, [2]), ProjectOut(sae, [11])]).to_dict()
    loaded = InterventionPlan.from_dict(needs, only_needed=True)
    assert loaded[0].sae.config.kept_latents == [9, 5, 2, 11]
    assert InterventionPlan.from_dict(needs)[0].sae.config.kept_latents is None
    whole = InterventionPlan([Clamp(sae, {9: 8.0}), Splice(sae)]).to_dict()
    assert InterventionPlan.from_dict(whole, only_needed=True)[0].sae.config.kept_latents is None
    few = SAEModel.from_pretrained(folder, latents=[9, 5])
    kept = InterventionPlan.from_dict(InterventionPlan([Ablate(few, [5])]).to_dict())
    assert kept[0].sae.config.kept_latents == [9, 5]


def test_an_sae_is_loaded_as_it_was(folder, tmp_path):
    half = SAEModel.from_pretrained(folder, dtype=torch.bfloat16, site="resid_post.2")
    other = SAEModel.from_pretrained(folder)
    plan = InterventionPlan([Ablate(half, [1]), Ablate(other, [1])])
    first, second = InterventionPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert (first.sae.dtype, first.sae.config.site) == (torch.bfloat16, "resid_post.2")
    assert (second.sae.dtype, second.sae.config.site) == (torch.float32, SITE)


def test_an_sae_of_several_sites_acts_where_it_did(tmp_path):
    sae = example("cross_layer", sites=["resid_post.0", "resid_post.1"], d_in=32)
    sae.save_pretrained(tmp_path)
    sae = SAEModel.from_pretrained(tmp_path)
    sae.config.sites, sae.config.sites_out = ["resid_post.1", "resid_post.2"], ["mlp_out.1", "mlp_out.2"]
    content = json.loads(json.dumps(InterventionPlan([Splice(sae)]).to_dict()))
    again = InterventionPlan.from_dict(content)[0]
    assert again.sae.config.sites_read == ["resid_post.1", "resid_post.2"]
    assert list(map(str, again.sites)) == ["mlp_out.1", "mlp_out.2"]
    for name in ("sites", "sites_out", "files"):  # as in older plans, which do not have them
        del content["saes"][0][name]
    assert list(map(str, InterventionPlan.from_dict(content)[0].sites)) == ["resid_post.0", "resid_post.1"]


def test_an_sae_of_the_hub_is_pinned_to_its_commit(hub, repo_id, cache_dir):
    first = make_sae()
    first.push_to_hub(repo_id, subfolder="a")
    loaded = SAEModel.from_pretrained(repo_id, "a", cache_dir=cache_dir)
    content = InterventionPlan([Clamp(loaded, {3: 2.0})]).to_dict()
    [reference] = content["saes"]
    assert (reference["repo"], reference["subfolder"]) == (repo_id, "a")
    assert reference["revision"] == loaded.checkpoint.revision and len(reference["revision"]) == 40
    make_sae(seed=1).push_to_hub(repo_id, subfolder="a")
    again = InterventionPlan.from_dict(content, cache_dir=cache_dir)[0].sae
    assert torch.equal(again.W_dec, first.W_dec)
    assert not torch.equal(SAEModel.from_pretrained(repo_id, "a", cache_dir=cache_dir).W_dec, first.W_dec)


def test_an_sae_that_was_never_saved_is_refused(tmp_path):
    plan = InterventionPlan([Ablate(make_sae(), [3])])
    with pytest.raises(InputError, match=r"GatedSAE at resid_post.1 was not loaded .*save_pretrained or push_to_hub"):
        plan.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_file_as_it_was(sae, tmp_path):
    file = tmp_path / "plan.json"
    InterventionPlan([Ablate(sae, [3])]).save(file)
    before = file.read_text()
    with pytest.raises(InputError):
        InterventionPlan([Ablate(sae, [3]), Ablate(make_sae(), [3])]).save(file)
    assert file.read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_a_plan_of_anything_but_interventions_is_refused(sae):
    with pytest.raises(InputError, match="InterventionPlan was given GatedSAE"):
        InterventionPlan([Ablate(sae, [3]), sae])


# ------------------------------------------------------------------ what files may hold


def test_files_that_are_not_plans_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match="There is no file"):
        InterventionPlan.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="is a folder"):
        InterventionPlan([]).save(tmp_path)
    for path in (None, 3):
        with pytest.raises(InputError, match="expected the path of a file"):
            InterventionPlan.load(path)
    for text in ("", "{", "[" * 100_000, "1" * 5000, "\ud800".encode("utf-8", "surrogatepass")):
        file = tmp_path / "bad.json"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError, match=r"is not JSON|The plan is"):
            InterventionPlan.load(file)


def put(content, path, value):
    changed = copy.deepcopy(content)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


WRONG = {
    "another version": (["version"], 3, ["version is 3", "reads 1 and 2"]),
    "a version that is true": (["version"], True, ["version is True"]),
    "no list": (["interventions"], {}, ["interventions of the plan is {}", "a list"]),
    "a key too many": (["extra"], 1, ["'extra'", "unknown"]),
    "an unknown verb": (["interventions", 0, "verb"], "Ablat", ["Unknown verb 'Ablat'", "Did you mean 'Ablate'"]),
    "a verb that is a list": (["interventions", 0, "verb"], [], ["expected its 'verb'"]),
    "an unknown setting": (["interventions", 0, "modes"], "zero", ["'modes'", "Did you mean 'mode'"]),
    "a private setting": (["interventions", 0, "_pool"], None, ["'_pool'", "unknown"]),
    "an unknown mode": (["interventions", 0, "mode"], "zer", ["Did you mean 'zero'"]),
    "an SAE that is not there": (["interventions", 0, "sae"], {"sae": 7}, ["SAE 7", "has 1"]),
    "an SAE before the first": (["interventions", 0, "sae"], {"sae": -1}, ["SAE -1"]),
    "a value of no kind": (["interventions", 0, "latents"], {"set": [1]}, ["is not a value", "tensor"]),
    "a latent that does not exist": (["interventions", 0, "latents"], [64], ["Latent 64"]),
    "a latent beyond all numbers": (["interventions", 0, "latents"], [10**30], ["expected integers"]),
    "a tensor without data": (["interventions", 1, "samples"], {"tensor": {}}, ["is not a tensor", "dtype"]),
    "a site of no kind": (["interventions", 3, "site"], {"site": "resid_pst.1"}, ["is not a site", "Did you mean"]),
    "an SAE without a place": (["saes", 0, "repo"], None, ["repo", "expected text"]),
    "an SAE elsewhere": (["saes", 0, "repo"], "/nowhere/at/all", ["nowhere"]),
    "an SAE in no dtype": (["saes", 0, "dtype"], "int64", ["dtype", "int64"]),
    "latents that are none": (["saes", 0, "latents"], [1.5], ["whole numbers"]),
    "sites that are no list": (["saes", 0, "sites"], "resid_post.1", ["sites of an SAE", "a list"]),
    "sites that are no names": (["saes", 0, "sites_out"], [3], ["sites_out of an SAE", "a list"]),
    "an SAE of nothing": (["saes", 0], 3, ["An SAE of the plan is 3"]),
    "files that are no hashes": (["saes", 0, "files"], {"config.json": "12"}, ["files of an SAE", "sha256"]),
    "files that are a list": (["saes", 0, "files"], ["config.json"], ["files of an SAE", "sha256"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_says_what_is_wrong(case, sae):
    path, value, phrases = WRONG[case]
    content = put(InterventionPlan(every_plan(sae)).to_dict(), path, value)
    with pytest.raises(SAEError) as caught:
        InterventionPlan.from_dict(content)
    message = str(caught.value)
    assert [phrase for phrase in phrases if phrase not in message] == [], message
    assert "\n" not in message and len(message) < 700


@pytest.mark.parametrize("key", ["version", "saes", "interventions"])
def test_a_missing_key_is_refused(key, sae):
    content = InterventionPlan(every_plan(sae)).to_dict()
    del content[key]
    with pytest.raises(InputError, match=f"lacks {key}"):
        InterventionPlan.from_dict(content)


def test_tensors_whose_bytes_do_not_fit_are_refused(sae):
    content = InterventionPlan([AblateSite(SITE, torch.ones(3))]).to_dict()
    for changes in (
        {"shape": [4]},
        {"shape": [-3]},
        {"shape": [3, 0]},
        {"shape": [2**62, 4]},
        {"shape": "3"},
        {"data": "!!!"},
        {"data": 5},
        {"data": "AAAA"},
        {"dtype": "float64"},
        {"dtype": "bool"},
        {"dtype": "quint8"},
        {"dtype": ["float32"]},
        {"more": 1},
    ):
        tensor = {**content["interventions"][0]["value"]["tensor"], **changes}
        with pytest.raises(InputError, match="is not a tensor"):
            InterventionPlan.from_dict(put(content, ["interventions", 0, "value"], {"tensor": tensor}))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["Ablate", "Steer", "zero", "all", "generated", SITE, "float32", "resample"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=2)
        | st.sampled_from(["tensor", "mapping", "site", "slice", "token_ids", "sae"]).flatmap(
            lambda tag: inner.map(lambda value: {tag: value})
        )
    ),
    max_leaves=6,
)


def paths(content, here=()):
    yield here
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths(value, (*here, key))


@given(data=st.data())
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_fuzzed_plan_loads_or_raises_an_sae_error(data, sae):
    content = FUZZED.setdefault("content", InterventionPlan(every_plan(sae)[:6]).to_dict())
    places = [path for path in paths(content) if path and path[:1] != ("saes",)]
    changed = content
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places))
        try:
            changed = put(changed, path, data.draw(json_values))
        except (TypeError, KeyError, IndexError):  # the first change removed the place
            continue
    try:
        InterventionPlan.from_dict(changed)
    except SAEError as error:
        assert "\n" not in str(error)


FUZZED = {}


@given(content=json_values)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_arbitrary_json_raises_an_sae_error(content):
    with pytest.raises(SAEError):
        InterventionPlan.from_dict(content)
    with pytest.raises(SAEError):
        InterventionPlan.from_dict({"version": 1, "saes": [content], "interventions": []})
