"""The real client in this process, on the loopback Hub: fixtures and helpers of the tests of that Hub.

A test file takes the fixtures by naming them: `hub, waits, api = hub_client.hub, hub_client.waits, hub_client.api`.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, close_session, constants, file_download
from huggingface_hub.utils import _http, get_session

from llmtrain import ledger, origin
from llmtrain.rundir import RunDir
from llmtrain.service import hub as conversation
from llmtrain.service.remote import Repo
from tests.support import checkpoint_runs
from tests.support.hub_server import TOKEN, Hub

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
    assert not hub.bugs, hub.bugs


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


@pytest.fixture
def make_own(tmp_path: Path) -> Callable[[str], RunDir]:
    """Makes runs with one scored checkpoint, step 100, to be uploaded to REPO."""

    def make(name: str) -> RunDir:
        made = checkpoint_runs.make_run(tmp_path / name, f"hub.repo={REPO}")
        origin.note(made, "cpu", 1, 1)
        checkpoint_runs.save(made, 100, content=name)
        checkpoint_runs.score(made, 100, checkpoint_runs.stretches(0.0))
        return made

    return make


def sent(api: HfApi, run: RunDir) -> dict[str, Any]:
    """Upload step 100, as the service does and records it."""
    answer = conversation.upload(Repo(api, REPO), checkpoint_runs.config_of(run), run, 100, TOKEN)
    ledger.append(run.uploads, ledger.Upload(step=100, repo=REPO, **answer["upload"]))
    return answer


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(api: HfApi, *operations: object, message: str = "step", **settings: object) -> str:
    return api.create_commit(REPO, list(operations), commit_message=message, **settings).oid  # pyright: ignore[reportArgumentType]


def upload_weights(api: HfApi) -> str:
    return commit(api, add("model.safetensors", WEIGHTS))


def ask_once(hub: Hub) -> None:
    with contextlib.suppress(httpx2.TransportError):
        get_session().get(f"{hub.endpoint}/api/models/{REPO}", headers={"Authorization": f"Bearer {TOKEN}"})
