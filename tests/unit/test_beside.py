"""What training does about the checkpoint service: how it starts it, and what it waits for."""

import os
import subprocess
from pathlib import Path

import pytest

from llmtrain import ledger
from llmtrain.ledger import Status
from llmtrain.service.beside import Companion, waiting
from tests.support.checkpoint_runs import config_of, make_run, save, score, stretches

OF_A_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"}


def test_the_service_is_not_told_that_it_is_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It takes the cores that it may have, not those that torchrun gave to one rank of many."""
    given: dict[str, str] = {}

    def start(*_: object, env: dict[str, str], **__: object) -> None:
        given.update(env)

    monkeypatch.setattr(subprocess, "Popen", start)
    for name in OF_A_RANK:
        monkeypatch.setenv(name, "1")
    run = make_run(tmp_path / "run")
    Companion(run, config_of(run)).start()
    assert given["PATH"] == os.environ["PATH"]
    assert not OF_A_RANK & set(given)


def test_nobody_waits_for_uploads_that_the_hub_refuses(tmp_path: Path):
    """A person has to mend that."""
    run = make_run(tmp_path / "run", "hub.repo=ada/gpt")
    save(run, 100)
    score(run, 100, stretches(0.0))
    assert waiting(run, config_of(run), since=0.0) == "0 to score, 1 to upload (Ctrl-C leaves it at work)"
    ledger.write(run.service_status, Status(pid=1, host="here", problem="the Hub refuses (401)"))
    assert waiting(run, config_of(run), since=0.0) is None
