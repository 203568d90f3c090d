# SPDX-License-Identifier: Apache-2.0
# ruff: noqa
"""The real huggingface_hub client against MiniHub.  The hub of the session serves it."""

import hashlib, os, re, subprocess, sys, tempfile

import huggingface_hub
import pytest
from huggingface_hub import (
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from packaging.version import Version

from tests.support.cards import require_valid
from tests.support.loopback import HUB

pytestmark = pytest.mark.slow

API, BOB, ANON = HfApi(token="hf_alice"), HfApi(token="hf_bob"), HfApi(token=False)
BIG = os.urandom(25_000_000)
CARD = "---\nlicense: apache-2.0\nlibrary_name: hf_gated_sae\ntags: [sparse-autoencoder, {}]\n---\n"


@pytest.fixture
def repo(request, tmp_path):
    """A fresh repo with a card, a configuration (regular files) and weights (LFS)."""
    name = "acme/" + re.sub(r"\W+", "-", request.node.name).strip("-")[:90]
    (tmp_path / "layer_1").mkdir()
    (tmp_path / "README.md").write_text(CARD.format("x"))
    (tmp_path / "cfg.json").write_text('{"d_in": 4}')
    (tmp_path / "layer_1/sae.safetensors").write_bytes(os.urandom(5000))
    API.create_repo(name)
    API.upload_folder(repo_id=name, folder_path=tmp_path)
    HUB.requests.clear()
    yield name
    HUB.faults.clear()


def content(name, path="layer_1/sae.safetensors", **options):
    options.setdefault("cache_dir", tempfile.mkdtemp())
    with open(hf_hub_download(name, path, **options), "rb") as f:
        return f.read()


def stored(name, path="layer_1/sae.safetensors"):
    r = HUB.repo(name)
    return HUB.blob(r.at("main").files[path].sha256).read_bytes()


def test_whoami_and_bad_token():
    assert API.whoami()["name"] == "alice"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()


def test_create_twice(repo):
    with pytest.raises(HfHubHTTPError) as e:
        API.create_repo(repo)
    assert e.value.response.status_code == 409
    assert API.create_repo(repo, exist_ok=True).repo_id == repo
    assert not API.repo_exists("acme/none")
    API.delete_repo(repo)
    assert not API.repo_exists(repo)


def test_info_and_tree(repo):
    info = API.model_info(repo, files_metadata=True)
    files = {s.rfilename: s for s in info.siblings}
    data = stored(repo)
    assert info.library_name == "hf_gated_sae" and {"sparse-autoencoder", "license:apache-2.0", "safetensors"} <= set(
        info.tags
    )
    assert (
        files["layer_1/sae.safetensors"].lfs.sha256 == hashlib.sha256(data).hexdigest()
        and files["cfg.json"].lfs is None
    )
    assert [x.path for x in API.list_repo_tree(repo)] == [".gitattributes", "README.md", "cfg.json", "layer_1"]
    assert API.get_paths_info(repo, ["cfg.json", "none"])[0].size == 11
    with pytest.raises(EntryNotFoundError):
        list(API.list_repo_tree(repo, "none"))


def test_unchanged_upload_makes_no_commit(repo, tmp_path):
    before = API.model_info(repo).sha
    assert API.upload_folder(repo_id=repo, folder_path=tmp_path).oid == before


def test_download_headers_and_cache(repo):
    meta = get_hf_file_metadata(hf_hub_url(repo, "layer_1/sae.safetensors"))
    assert (
        meta.size == 5000
        and meta.etag == hashlib.sha256(stored(repo)).hexdigest()
        and meta.location.startswith(HUB.cdn_url)
    )
    home = tempfile.mkdtemp()
    assert content(repo, cache_dir=home) == stored(repo)
    assert all(r[4] is None for r in HUB.requests if r[1].startswith("/cdn/"))  # the token stays with the hub
    HUB.requests.clear()
    assert content(repo, cache_dir=home, revision=meta.commit_hash) == stored(repo) and not HUB.requests


def test_range_read(repo):
    with HfFileSystem().open(f"{repo}/layer_1/sae.safetensors", "rb", block_size=256) as f:
        f.seek(1000)
        assert f.read(100) == stored(repo)[1000:1100]
    ranged = [r for r in HUB.requests if r[3] and r[2] == 206]
    assert ranged and all(r[3] == "bytes=1000-1355" for r in ranged)


def test_revisions(repo):
    first = API.model_info(repo).sha
    API.create_tag(repo, tag="v1")
    API.create_branch(repo, branch="dev/a")
    API.upload_file(repo_id=repo, path_or_fileobj=b"dev", path_in_repo="x.txt", revision="dev/a")
    assert content(repo, "x.txt", revision="dev/a") == b"dev" and not API.file_exists(repo, "x.txt")
    API.create_commit(
        repo,
        [CommitOperationDelete("cfg.json"), CommitOperationCopy("layer_1/sae.safetensors", "b.safetensors")],
        commit_message="second",
    )
    assert content(repo, "cfg.json", revision="v1") == content(repo, "cfg.json", revision=first)
    assert [c.title for c in API.list_repo_commits(repo)][0] == "second"
    assert [b.name for b in API.list_repo_refs(repo).branches] == ["main", "dev/a"]
    for error, options in ((EntryNotFoundError, {}), (RevisionNotFoundError, {"revision": "none"})):
        with pytest.raises(error):
            content(repo, "cfg.json", **options)
    with pytest.raises(HfHubHTTPError) as e:
        API.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="q", parent_commit=first)
    assert e.value.response.status_code == 412


def test_pull_request(repo):
    pr = BOB.upload_file(repo_id=repo, path_or_fileobj=b"bob", path_in_repo="bob.txt", create_pr=True)
    assert content(repo, "bob.txt", revision=pr.pr_revision) == b"bob" and not API.file_exists(repo, "bob.txt")
    assert [(d.num, d.is_pull_request) for d in API.get_repo_discussions(repo)] == [(1, True)]


@pytest.mark.parametrize("api, status", [(BOB, 403), (HfApi(token="hf_read"), 403), (ANON, 401)])
def test_no_right_to_write(repo, api, status):
    with pytest.raises(HfHubHTTPError) as e:
        api.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="q")
    assert e.value.response.status_code == status


@pytest.mark.parametrize("api", [BOB, ANON])
def test_private_and_gated(repo, api):
    API.update_repo_settings(repo, private=True)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download(repo, "cfg.json", cache_dir=tempfile.mkdtemp())
    API.update_repo_settings(repo, private=False, gated="auto")
    assert api.model_info(repo).gated == "auto"
    for call in (
        lambda: api.auth_check(repo),
        lambda: api.hf_hub_download(repo, "cfg.json", cache_dir=tempfile.mkdtemp()),
    ):
        with pytest.raises(GatedRepoError):
            call()
    HUB.repo(repo).allowed.add("bob")
    BOB.auth_check(repo)


def test_search():
    for i in range(5):
        HUB.seed(f"seeds/sae-{i}", {"README.md": CARD.format(f"layer-{i}"), "cfg.json": "{}"})
    HUB.page_size = 2
    try:
        assert len(list(API.list_models(author="seeds", filter="sparse-autoencoder"))) == 5  # over three pages
        assert [m.id for m in API.list_models(filter=["hf_gated_sae", "layer-3"], full=True)] == ["seeds/sae-3"]
        assert [m.id for m in API.list_models(author="seeds", search="SAE-1")] == ["seeds/sae-1"]
        assert len(list(API.list_models(author="seeds", limit=3, sort="last_modified"))) == 3
        assert (
            next(iter(API.list_models(search="sae-2", author="seeds", cardData=True))).card_data.license
            == "apache-2.0"
        )
    finally:
        HUB.page_size = 1000


def test_card(repo):
    require_valid(ModelCard.load(repo))
    if Version(huggingface_hub.__version__) < Version("2"):
        pytest.skip("this client asks the public Hub before it pushes a card")
    ModelCard("---\nlicense: mit\n---\n# new").push_to_hub(repo)
    assert "license:mit" in API.model_info(repo).tags
    with pytest.raises(ValueError):
        API._validate_yaml("---\ntags: {a: 1}\n---\n")


def test_dataset():
    API.create_repo("alice/data", repo_type="dataset")
    API.upload_file(repo_id="alice/data", repo_type="dataset", path_or_fileobj=b"a\n", path_in_repo="d.csv")
    assert content("alice/data", "d.csv", repo_type="dataset") == b"a\n" and [d.id for d in API.list_datasets()] == [
        "alice/data"
    ]


def test_snapshot(repo):
    folder = snapshot_download(repo, cache_dir=tempfile.mkdtemp(), allow_patterns=["*.json", "layer_1/*"])
    assert sorted(os.listdir(folder)) == ["cfg.json", "layer_1"]


# ---- faults: what the client recovers from, and what it does not ----
def test_drop_is_resumed():
    HUB.seed("seeds/big", {"w.safetensors": BIG})
    HUB.fail("GET /cdn/", "drop", after=15_000_000)
    HUB.requests.clear()
    assert content("seeds/big", "w.safetensors") == BIG
    assert [(s, r) for m, _, s, r, _ in HUB.requests if m == "GET"] == [
        (200, None),
        (206, "bytes=10485760-"),
    ]  # 10 MiB pieces


def test_drop_and_range_ignored():
    HUB.seed("seeds/big", {"w.safetensors": BIG})
    HUB.fail("GET /cdn/", "drop", after=15_000_000)
    HUB.fail("GET /cdn/", "norange")
    assert content("seeds/big", "w.safetensors") == BIG


@pytest.mark.parametrize(
    "kind, options", [("reset", {}), ("status", {"status": 429, "headers": {"Retry-After": "1"}})]
)
def test_recovered(repo, kind, options):
    HUB.fail("GET /cdn/", kind, **options)
    assert content(repo) == stored(repo)


@pytest.mark.parametrize(
    "match, kind, options, error",
    [
        ("GET /cdn/", "status", {"status": 503}, HfHubHTTPError),
        ("GET /cdn/", "truncate", {"after": 100}, OSError),
        ("HEAD /acme", "status", {"status": 401}, HfHubHTTPError),
    ],
)
def test_refused(repo, match, kind, options, error):
    HUB.fail(match, kind, **options)
    with pytest.raises(error):
        content(repo)


def test_corruption_goes_unnoticed_by_the_client(repo):
    HUB.fail("GET /cdn/", "corrupt", after=1234)
    got, want = content(repo), stored(repo)
    assert got != want and len(got) == len(want)  # whoever needs to be sure compares the sha256 that the hub states


@pytest.mark.parametrize(
    "match, ok",
    [("PUT /upload", True), ("POST .*preupload", True), ("objects/batch", True), ("POST .*/commit/", False)],
)
def test_upload_faults(repo, match, ok):
    HUB.fail(match, "status", status=503)
    if ok:
        API.upload_file(repo_id=repo, path_or_fileobj=os.urandom(100), path_in_repo="u.bin")
    else:
        with pytest.raises(HfHubHTTPError):
            API.upload_file(repo_id=repo, path_or_fileobj=os.urandom(100), path_in_repo="u.bin")


def test_xet_left_on(repo):
    """With hf_xet in use an upload cannot work here, a download can."""
    code = (
        "from huggingface_hub import *\nassert hf_hub_download(%r, 'layer_1/sae.safetensors')\ntry:\n"
        "    HfApi().upload_file(repo_id=%r, path_or_fileobj=b'1' * 99, path_in_repo='x.bin')\n"
        "except Exception as e:\n    print('refused', e)\n" % (repo, repo)
    )
    env = {**os.environ, "HF_HUB_DISABLE_XET": "0", "HF_HOME": tempfile.mkdtemp()}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0 and "xet-write-token" in out.stdout, out
