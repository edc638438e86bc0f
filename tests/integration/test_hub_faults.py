"""The real client against the loopback Hub: that each of its faults strikes."""

import hashlib
import json
import threading
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from tests.support import hub_client
from tests.support.hub_client import OID, REPO, SHARD, WEIGHTS, add, ask_once, commit, upload_weights
from tests.support.hub_server import Hub

hub, waits, api = hub_client.hub, hub_client.waits, hub_client.api  # fixtures


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
    hub.commit_quota, hub.quota_window_s = 2, 60
    for n in range(2):
        commit(api, add("note.txt", b"%d" % n))
    with pytest.raises(HfHubHTTPError, match=r"2 per hour.*about 1 minute") as refused:
        commit(api, add("note.txt", b"2"))
    assert refused.value.response.status_code == 429
    hub.quota_window_s = 0  # that minute is over
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
