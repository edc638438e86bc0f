"""The real client against the loopback Hub: that it is a Hub (its faults: test_hub_faults.py)."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pytest
from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

from tests.support import hub_client
from tests.support.hub_client import OID, READER, REPO, SHARD, STRANGER, WEIGHTS, add, commit, upload_weights
from tests.support.hub_server import TOKEN, Hub, HubProcess, client_environment

hub, waits, api = hub_client.hub, hub_client.waits, hub_client.api  # fixtures


def test_what_is_committed_comes_back_under_the_names_that_git_gives_it(hub: Hub, api: HfApi, tmp_path: Path):
    commit(api, add("note.txt", b"hello\n"), add("a/model.safetensors", WEIGHTS), add("a/shard.bin", SHARD))
    files = hub.files(REPO)
    assert files["note.txt"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert files["a/model.safetensors"].sha256 == OID
    assert hub.read(REPO, "a/shard.bin") == SHARD
    parts = [entry for entry in hub.log if entry.method == "PUT" and entry.path[-2:] in ("/1", "/2", "/3", "/4")]
    assert [entry.received for entry in parts] == [1_000_000, 1_000_000, 1_000_000, 72_000]
    assert hub.transfers(OID) == hub.transfers(hashlib.sha256(SHARD).hexdigest()) == 1
    folder = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert (folder / "a/shard.bin").read_bytes() == SHARD
    checked = api.verify_repo_checksums(REPO, cache_dir=tmp_path / "cache")
    assert (checked.checked_count, checked.mismatches, checked.missing_paths) == (4, [], [])


def test_bytes_that_are_stored_are_not_sent_again(hub: Hub, api: HfApi):
    api.preupload_lfs_files(REPO, [add("model.safetensors", WEIGHTS)])
    upload_weights(api)
    commit(api, add("copy.safetensors", WEIGHTS))
    assert hub.transfers(OID) == 1


def test_a_commit_without_a_change_is_the_head(hub: Hub, api: HfApi):
    first = upload_weights(api)
    # The client sees it by itself, and then does not look at the parent that it was given.
    assert upload_weights(api) == first
    assert commit(api, add("model.safetensors", WEIGHTS), parent_commit="0" * 40) == first
    body = b'{"key": "header", "value": {"summary": "no change"}}\n'
    url = f"{hub.endpoint}/api/models/{REPO}/commit/main"
    told = httpx2.post(url, content=body, headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert told["commitOid"] == first
    assert len(hub.commits(REPO)) == 2


def test_a_stale_parent_is_refused(hub: Hub, api: HfApi):
    first = upload_weights(api)
    second = commit(api, add("note.txt", b"1"), message="two\n\nmore", commit_description="marker", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        commit(api, add("note.txt", b"2"), parent_commit=first)
    assert refused.value.response.status_code == 412
    told = api.list_repo_commits(REPO)
    assert [(c.commit_id, c.title, c.message) for c in told[:1]] == [(second, "two", "more\n\nmarker")]
    assert [c.oid for c in hub.changes(REPO, "model.safetensors")] == [first]
    assert [c.oid for c in hub.changes(REPO, "note.txt")] == [second]


def test_copies_from_another_revision_and_deletions(hub: Hub, api: HfApi):
    first = commit(api, add("last/model.safetensors", WEIGHTS), add("last/config.json", b"{}"))
    api.create_branch(REPO, branch="best/loss", revision=first)
    api.create_tag(REPO, tag="step-1", revision=first)
    commit(api, CommitOperationDelete("last/"))
    assert set(hub.files(REPO)) == {".gitattributes"}
    copies = [
        CommitOperationCopy(f"last/{name}", f"best/{name}", src_revision=revision)
        for name, revision in (("model.safetensors", "step-1"), ("config.json", "best/loss"))
    ]
    commit(api, *copies)
    assert hub.read(REPO, "best/model.safetensors") == WEIGHTS
    assert hub.read(REPO, "best/config.json") == b"{}"
    assert hub.transfers(OID) == 1
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        commit(api, CommitOperationDelete("nothing"))


def test_branches_and_tags(hub: Hub, api: HfApi):
    first = upload_weights(api)
    second = commit(api, add("note.txt", b"2"))
    api.create_tag(REPO, tag="step-1", revision=first)
    api.create_tag(REPO, tag="step-1", revision=second, exist_ok=True)  # in silence
    with pytest.raises(HfHubHTTPError, match="exists"):
        api.create_tag(REPO, tag="step-1", revision=second)
    refs = api.list_repo_refs(REPO)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"step-1": first} == hub.repos[REPO].tags
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": second}
    api.delete_tag(REPO, tag="step-1")
    assert not hub.repos[REPO].tags
    api.create_branch(REPO, branch="x")
    api.delete_branch(REPO, branch="x")
    api.super_squash_history(REPO)
    assert len(hub.commits(REPO)) == 1
    assert set(hub.files(REPO)) == {".gitattributes", "model.safetensors", "note.txt"}


def test_listings_in_pages_and_parts_of_a_file(hub: Hub, api: HfApi):
    oid = commit(api, *(add(f"f/{n}.txt", b"%d" % n) for n in range(7)), add("model.safetensors", WEIGHTS))
    for n in range(4):
        commit(api, add("note.txt", b"%d" % n))
    assert len(list(api.list_repo_tree(REPO, recursive=True))) == 11
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [
        ".gitattributes",
        "f",
        "model.safetensors",
        "note.txt",
    ]
    assert [entry.path for entry in api.list_repo_tree(REPO, "f")] == [f"f/{n}.txt" for n in range(7)]
    assert len(api.list_repo_commits(REPO)) == 6
    told = api.get_paths_info(REPO, ["f", "model.safetensors", "nothing"], revision=oid, expand=True)
    assert [entry.path for entry in told] == ["f", "model.safetensors"]
    assert (told[1].lfs.sha256, told[1].last_commit.oid) == (OID, oid)
    sibling = next(s for s in api.model_info(REPO, files_metadata=True).siblings if s.rfilename == "model.safetensors")
    assert (sibling.size, sibling.lfs.sha256) == (len(WEIGHTS), OID)
    headers = {"Authorization": f"Bearer {TOKEN}", "Range": "bytes=10-19"}
    answer = httpx2.get(f"{hub.endpoint}/{REPO}/resolve/{oid}/model.safetensors", headers=headers)
    assert (answer.status_code, answer.content) == (206, WEIGHTS[10:20])


def test_who_may_do_what(hub: Hub, api: HfApi):
    upload_weights(api)
    assert api.whoami()["name"] == "tester"
    api.create_repo(REPO, private=False, exist_ok=True)  # does not change what is there
    assert api.model_info(REPO, token=READER).private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO, token=False)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info(REPO, token=STRANGER)
    with pytest.raises(HfHubHTTPError, match="write access"):
        api.create_tag(REPO, tag="mine", token=READER)
    api.create_repo("tester/open", private=False)
    assert api.model_info("tester/open", token=False).private is False
    assert not any(token in str(hub.state()) for token in (TOKEN, READER, STRANGER))
    assert {entry.authorised for entry in hub.log if entry.method == "PUT"} == {False}
    assert {entry.authorised for entry in hub.log if "/commit/" in entry.path} == {True}


@pytest.mark.parametrize(
    ("card", "wrong"),
    [
        ("---\nlicense: mit\nlanguage: [en]\n---\n", ""),
        ("---\nlanguage: no\n---\n", "language"),
        ("---\na: [\n---\n", "YAML"),
    ],
)
def test_model_cards(api: HfApi, card: str, wrong: str):
    if not wrong:
        commit(api, add("README.md", card.encode()))
        return
    with pytest.raises(ValueError, match=wrong):
        commit(api, add("README.md", card.encode()))


def test_only_what_was_announced_is_stored(hub: Hub, api: HfApi):
    url = f"{hub.endpoint}/{REPO}.git/info/lfs/objects/batch"
    wish = {"operation": "upload", "objects": [{"oid": OID, "size": len(WEIGHTS)}]}
    told = httpx2.post(url, json=wish, headers={"Authorization": f"Bearer {TOKEN}"}).json()
    href = told["objects"][0]["actions"]["upload"]["href"]
    assert httpx2.put(href, content=WEIGHTS[:-1] + b"x").status_code == 400
    assert httpx2.put(href, content=WEIGHTS[:-1]).status_code == 400
    assert OID not in hub.repos[REPO].objects
    chunked = (WEIGHTS[at : at + 9999] for at in range(0, len(WEIGHTS), 9999))
    assert httpx2.put(href, content=chunked).status_code == 200
    assert OID in hub.repos[REPO].objects


# A process of its own

CLIENT = f"""
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi()
assert api.whoami()["name"] == "tester"
api.create_repo("{REPO}", private=True, exist_ok=True)
assert api.repo_info("{REPO}").private
head = api.list_repo_refs("{REPO}").branches[0].target_commit
files = [CommitOperationAdd("model.safetensors", bytes(2_000_000)), CommitOperationAdd("README.md", b"# no metadata")]
oid = api.create_commit("{REPO}", files, commit_message="step 1", parent_commit=head).oid
api.create_tag("{REPO}", tag="step-1", revision=oid)
assert api.hf_hub_download("{REPO}", "model.safetensors", revision="step-1")
"""


def test_a_hub_and_a_client_in_processes_of_their_own(tmp_path: Path):
    with HubProcess(tmp_path / "hub") as hub:
        hub.control(add=[{"kind": "status", "match": "/preupload/"}], set={"commit_quota": 1})
        environment = client_environment(hub.endpoint, tmp_path / "home")
        subprocess.run([sys.executable, "-c", CLIENT], env=environment, check=True, timeout=60, cwd=tmp_path)
        state = hub.state()
        repo = state["repos"][REPO]
        assert repo["private"]
        assert repo["tags"] == {"step-1": repo["branches"]["main"]}
        assert list(state["transfers"].values()) == [1]
        assert [entry["path"] for entry in state["log"] if entry["fault"]] == [f"/api/models/{REPO}/preupload/main"]
        with pytest.raises(OSError, match="400"):
            hub.control(add=[{"kind": "mistyped"}])
    assert hub.process.poll() is not None


def test_the_process_ends_with_the_one_that_started_it(tmp_path: Path):
    start = "import os, sys; from pathlib import Path; from tests.support.hub_server import HubProcess\n"
    start += "print(HubProcess(Path(sys.argv[1])).process.pid, flush=True); os._exit(0)"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", start, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=root, env={**os.environ})
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(done.stdout))
