"""What is looked at before a job is queued for a run that is there already, on disk and on the Hub."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from launcher.checks import preflight
from llmtrain.rundir import RunDir
from llmtrain.service import hub as conversation
from llmtrain.service.remote import Repo
from tests.support import hub_client
from tests.support.checkpoint_runs import config_of
from tests.support.hub_client import REPO, sent
from tests.unit import test_preflight
from tests.unit.test_preflight import begun, findings, spec

hub, waits, api, make_own = test_preflight.hub, hub_client.waits, hub_client.api, hub_client.make_own


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
