"""The real client in this process, on the loopback Hub: fixtures and helpers of the tests of that Hub.

A test file takes the fixtures by naming them: `hub, waits, api = hub_client.hub, hub_client.waits, hub_client.api`.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, close_session, constants, file_download
from huggingface_hub.utils import _http, get_session

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


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(api: HfApi, *operations: object, message: str = "step", **settings: object) -> str:
    return api.create_commit(REPO, list(operations), commit_message=message, **settings).oid  # type: ignore[arg-type]


def upload_weights(api: HfApi) -> str:
    return commit(api, add("model.safetensors", WEIGHTS))


def ask_once(hub: Hub) -> None:
    with contextlib.suppress(httpx2.TransportError):
        get_session().get(f"{hub.endpoint}/api/models/{REPO}", headers={"Authorization": f"Bearer {TOKEN}"})
