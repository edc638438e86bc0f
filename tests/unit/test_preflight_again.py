"""What is looked at before a job is queued for a run that is there already, on disk and on the Hub."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from launcher.checks import preflight
from launcher.findings import Finding, fine
from llmtrain.config import load_config
from llmtrain.rundir import RunDir
from llmtrain.service import hub as conversation
from llmtrain.service.remote import Repo
from tests.support import hub_client
from tests.support.checkpoint_runs import config_of
from tests.support.hub_client import REPO, sent
from tests.support.hub_server import TOKEN, Hub, client_environment
from tests.unit.test_preflight import begun, findings, spec

waits, api, make_own = hub_client.waits, hub_client.api, hub_client.make_own

READER = "hf_" + "r" * 34


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(tmp_path / "hub", {TOKEN: "write", READER: "read"}) as running:
        wanted = client_environment(running.endpoint, tmp_path / "home")
        for name in os.environ.keys() - wanted.keys():
            monkeypatch.delenv(name)
        for name, value in wanted.items():
            monkeypatch.setenv(name, value)
        yield running


def ask_hub(tmp_path: Path) -> Finding:
    (found,) = preflight.check_hub(load_config(None, ["hub.repo=tester/gpt"])[0], RunDir(tmp_path / "run"))
    return found


def test_checkpoints_that_are_on_the_disk_need_no_room_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """191.6 MB in all."""
    profile = begun(tmp_path, monkeypatch, "{}\n")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000_000))
    (disk,) = [found for found in findings(spec(profile)) if found.what == "disk"]
    assert disk.severity == "error"
    weights = tmp_path / "runs/stdlib-gpt/checkpoints/step-00000100/weights"
    weights.touch()
    os.truncate(weights, 120_000_000)
    (disk,) = [found for found in findings(spec(profile)) if found.what == "disk"]
    assert disk.severity == "ok"


def test_a_runs_own_repository_is_not_taken_for_another_ones(api: HfApi, make_own: Callable[[str], RunDir]):
    run = make_own("run")
    conversation.check(Repo(api, REPO), config_of(run), run)
    sent(api, run)
    (found,) = preflight.check_hub(config_of(run), run)
    assert found.severity == "ok"
    run.origin.unlink()
    (found,) = preflight.check_hub(config_of(run), run)
    assert found.severity == "error"
    assert "another run" in found.message


def test_the_tokens_right_to_write_is_found_out(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    assert ask_hub(tmp_path) == fine("Hub", "tester/gpt (private) takes the checkpoints of this run")
    monkeypatch.setenv("HF_TOKEN", READER)
    found = ask_hub(tmp_path)
    assert found.severity == "error"
    assert "403" in found.message
    assert READER not in found.message
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token" in ask_hub(tmp_path).message


def test_a_hub_that_cannot_be_reached_is_a_warning(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.stop()
    found = ask_hub(tmp_path)
    assert found.severity == "warning"
    assert "uploads wait" in found.message
    monkeypatch.setattr(preflight, "_HUB_S", 0.01)
    assert ask_hub(tmp_path).severity == "warning"
