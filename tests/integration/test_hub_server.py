"""The real client against the loopback Hub: first that it is a Hub, then that each of its faults strikes."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import psutil
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    close_session,
    constants,
    file_download,
)
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import _http, get_session

from tests.support.hub_server import TOKEN, Hub, HubProcess, client_environment

REPO = "tester/run"
READER, STRANGER = "hf_" + "r" * 34, "hf_" + "s" * 34
WEIGHTS = bytes(range(256)) * 4000  # 1,024,000 bytes: one piece
SHARD = WEIGHTS[::-1] * 3  # in parts
OID = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    sizes = {"multipart_above_bytes": 2_000_000, "part_bytes": 1_000_000, "page_size": 3}
    with Hub(tmp_path / "hub", {TOKEN: "write", READER: "read"}, **sizes) as hub:
        yield hub
    assert not hub.bugs


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited between its attempts."""
    waits: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def api(hub: Hub, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[HfApi]:
    """The client in this process, with the settings that it would have read from the environment."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    api = HfApi(hub.endpoint, token=TOKEN)
    api.create_repo(REPO, private=True)
    yield api
    close_session()


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(api: HfApi, *operations: object, message: str = "step", **settings: object) -> str:
    return api.create_commit(REPO, list(operations), commit_message=message, **settings).oid  # type: ignore[arg-type]


def upload_weights(api: HfApi) -> str:
    return commit(api, add("model.safetensors", WEIGHTS))


# A Hub


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


# Faults


def test_status_is_retried_for_the_bytes_and_not_for_the_commit(hub: Hub, api: HfApi, waits: list[float]):
    hub.faults.add("status", "objects/batch$", times=2, status=502)
    hub.faults.add("status", "^PUT ", status=503)
    upload_weights(api)
    assert waits == [1, 2, 1]
    assert hub.transfers(OID) == 2
    hub.faults.add("status", "/commit/")
    with pytest.raises(HfHubHTTPError, match="Out of order"):
        commit(api, add("note.txt", b""))
    hub.faults.add("status", "validate-yaml", status=503, html=True)
    with pytest.raises(json.JSONDecodeError):  # the client reads JSON before it looks at the status
        commit(api, add("README.md", b"# model"))
    assert [entry.fault for entry in hub.log if entry.status and entry.status >= 500] == ["status"] * 5
    assert len(hub.commits(REPO)) == 2


def test_retry_after_is_heard_where_the_client_retries(hub: Hub, api: HfApi, waits: list[float]):
    hub.faults.add("status", "/preupload/", status=429, retry_after_s=7)
    upload_weights(api)
    assert waits == [8]
    hub.faults.add("status", "/refs$", status=429, retry_after_s=7)
    with pytest.raises(HfHubHTTPError) as refused:
        api.list_repo_refs(REPO)
    assert refused.value.response.headers["Retry-After"] == "7"
    assert waits == [8]


def test_quota_on_command_and_as_a_count(hub: Hub, api: HfApi):
    hub.faults.add("quota", minutes=37)
    words = r"rate limit for repository commits \(128 per hour\).*about 37 minutes"
    with pytest.raises(HfHubHTTPError, match=words):
        upload_weights(api)
    hub.commit_quota, hub.quota_window_s = 2, 0.4
    for n in range(2):
        commit(api, add("note.txt", b"%d" % n))
    with pytest.raises(HfHubHTTPError, match=r"2 per hour.*about 1 minute") as refused:
        commit(api, add("note.txt", b"2"))
    assert refused.value.response.status_code == 429
    time.sleep(0.45)
    commit(api, add("note.txt", b"2"))
    assert len(hub.commits(REPO)) == 4


def test_a_cut_in_a_body_is_retried_for_the_bytes_and_not_for_the_commit(hub: Hub, api: HfApi, waits: list[float]):
    hub.faults.add("cut_request", "^PUT ", after_bytes=300_000)
    upload_weights(api)
    assert (hub.transfers(OID), hub.received_bytes(OID)) == (1, len(WEIGHTS) + 300_000)
    assert waits == [1]
    hub.faults.add("cut_request", "/commit/", after_bytes=10)
    with pytest.raises(httpx2.TransportError):
        commit(api, add("note.txt", b""))
    assert len(hub.commits(REPO)) == 2


def test_a_download_goes_on_after_a_close_and_not_after_a_reset(
    hub: Hub, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what it keeps of a broken download: whole ones
    upload_weights(api)
    hub.faults.add("cut_response", "^GET .*/resolve/", after_bytes=400_000, reset=False)
    path = api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == WEIGHTS
    gets = [entry.status for entry in hub.log if entry.method == "GET" and "/resolve/" in entry.path]
    assert gets == [200, 206]
    hub.faults.add("cut_response", "^GET .*/resolve/", after_bytes=400_000)
    with pytest.raises(httpx2.ReadError):
        api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path / "other")


def test_slow_bodies(hub: Hub, api: HfApi, tmp_path: Path):
    hub.faults.add("slow_request", "^PUT ", bytes_per_s=3_000_000)
    hub.faults.add("slow_response", "^GET .*/resolve/", bytes_per_s=3_000_000)
    started = time.monotonic()
    upload_weights(api)
    uploaded = time.monotonic()
    api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path / "cache")
    assert uploaded - started > 0.33
    assert time.monotonic() - uploaded > 0.33


def test_a_hang_ends_with_its_time(hub: Hub, api: HfApi):
    hub.faults.add("hang", f"/{REPO}$")
    with pytest.raises(httpx2.ReadTimeout):
        api.model_info(REPO, timeout=0.2)  # few calls take one, and by default none has any
    hub.faults.add("hang", "/refs$", seconds=0.1)
    with pytest.raises(httpx2.TransportError):
        api.list_repo_refs(REPO)


def test_a_stop_ends_a_hang_and_a_start_finds_all_as_it_was(hub: Hub, api: HfApi):
    head = upload_weights(api)
    hub.faults.add("hang")
    stop = threading.Timer(0.2, hub.stop)
    stop.start()
    with pytest.raises(httpx2.TransportError):
        api.list_repo_refs(REPO)
    stop.join()
    with pytest.raises(httpx2.ConnectError):
        api.list_repo_refs(REPO)
    hub.start()
    assert api.model_info(REPO).sha == head


def test_what_was_applied_without_an_answer(hub: Hub, api: HfApi, waits: list[float]):
    hub.faults.add("lost_answer", "^POST .*/(commit|tag)/", times=2)
    with pytest.raises(httpx2.TransportError):
        upload_weights(api)
    head = hub.commits(REPO)[0].oid
    assert len(hub.commits(REPO)) == 2
    assert upload_weights(api) == head
    with pytest.raises(httpx2.TransportError):
        api.create_tag(REPO, tag="step-1")
    api.create_tag(REPO, tag="step-1", exist_ok=True)
    assert hub.repos[REPO].tags == {"step-1": head}
    assert waits == []
    # The bytes of an object whose answer was lost are stored, and yet sent again: the client does not ask.
    other = WEIGHTS + b"x"
    hub.faults.add("lost_answer", "^PUT ")
    commit(api, add("other.bin", other))
    assert hub.transfers(hashlib.sha256(other).hexdigest()) == 2


def test_an_expired_token(hub: Hub, api: HfApi):
    fault = hub.faults.add("expired_token", skip=3)  # which modes, how to upload, whether it came
    api.preupload_lfs_files(REPO, [operation := add("model.safetensors", WEIGHTS)])
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
            commit(api, operation)
    assert fault.struck >= 2
    hub.faults.clear()
    commit(api, operation)


def test_wrong_hashes_and_a_refused_object(hub: Hub, api: HfApi, waits: list[float]):
    upload_weights(api)
    hub.faults.add("wrong_hash", r"\.safetensors$")
    told = api.get_paths_info(REPO, ["model.safetensors", ".gitattributes"])
    listed = {entry.path: entry for entry in api.list_repo_tree(REPO)}
    assert told[0].lfs.sha256[1:] == OID[1:]
    assert told[0].lfs.sha256 != OID == hub.files(REPO)["model.safetensors"].sha256
    assert listed["model.safetensors"].lfs == told[0].lfs
    assert told[1].blob_id == hub.files(REPO)[".gitattributes"].blob_id
    metadata = api.get_hf_file_metadata(url=f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors")
    assert metadata.etag == told[0].lfs.sha256
    hub.faults.clear()
    assert api.get_paths_info(REPO, ["model.safetensors"])[0].lfs.sha256 == OID
    hub.faults.add("reject_upload")
    with pytest.raises(RuntimeError, match="Error while uploading"):
        commit(api, add("other.bin", SHARD))
    assert waits == []
    assert hashlib.sha256(SHARD).hexdigest() not in hub.repos[REPO].objects


def test_a_wrong_visibility_shows_only_when_it_is_read_back(hub: Hub, api: HfApi):
    hub.faults.add("wrong_visibility")
    api.create_repo("tester/leak", private=True)
    assert api.model_info("tester/leak", token=False).private is False


def test_a_fault_on_every_second_request(hub: Hub, api: HfApi):
    asked = len(hub.log)
    hub.faults.every_nth(2, ["status", {"kind": "status", "status": 503}, "lost_answer"], exclude="^GET .*/refs$")
    for _ in range(12):
        ask_once(hub)
        api.list_repo_refs(REPO)
    struck = [(entry.fault, entry.status) for entry in hub.log[asked:] if not entry.path.endswith("/refs")]
    turn = [("", 200), ("status", 500), ("", 200), ("status", 503), ("", 200), ("lost_answer", None)]
    assert struck == turn * 2


def ask_once(hub: Hub) -> None:
    with contextlib.suppress(httpx2.TransportError):
        get_session().get(f"{hub.endpoint}/api/models/{REPO}", headers={"Authorization": f"Bearer {TOKEN}"})


def test_a_seed_draws_the_same_faults_again(hub: Hub, api: HfApi):
    drawn = []
    for _ in range(2):
        asked = len(hub.log)
        hub.faults.every_nth(2, ["status", "lost_answer", "quota"], seed=7)
        for _ in range(20):
            ask_once(hub)
        drawn.append([entry.fault for entry in hub.log[asked:]])
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"", "status", "lost_answer"}  # a quota falls on commits only
    with pytest.raises(ValueError, match="use one of status"):
        hub.faults.add("mistyped")


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
