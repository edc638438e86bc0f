"""The lock of a run folder: who holds it, one that is about to be let go, and file systems without locks."""

import errno
import fcntl
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from launcher.checks import preflight
from launcher.cluster import Profile
from launcher.slurm.batch import JobSpec
from llmtrain import rundir
from llmtrain.config import load_config
from llmtrain.errors import RunFolderError
from llmtrain.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "runs" / "gpt")
    made.create()
    return made


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_run_goes_on_without(run: RunDir, number: int, monkeypatch: pytest.MonkeyPatch):
    """Lustre without flock, NFS without its lock service: nobody else trains there."""
    rundir._say_once.cache_clear()
    without_locks(monkeypatch, number)
    said: list[str] = []
    monkeypatch.setattr(rundir.log, "warning", said.append)
    with run.lock(), run.lock():
        assert len(said) == 1
        assert f"{run.path}: no locks here ({os.strerror(number)})" in said[0]
        assert run.is_training()  # this process is there, and wrote so
    (run.path / "lock").write_text("process 7 on faraway")
    assert not run.is_training()
    ended = subprocess.Popen(["true"])
    ended.wait()
    (run.path / "lock").write_text(f"process {ended.pid} on {os.uname().nodename}")
    assert not run.is_training()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_one_that_is_held_is_refused(run: RunDir, number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(rundir.RESTARTED, raising=False)
    without_locks(monkeypatch, number)
    with pytest.raises(RunFolderError, match="is training in this run folder"):
        run.lock()


def test_a_former_start_that_is_dying_is_waited_for(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """Killed ranks give their GPUs back first; 17 would end the run for good."""
    rundir._say_once.cache_clear()
    said: list[str] = []
    monkeypatch.setattr(rundir.log, "warning", said.append)
    former = run.lock()
    with pytest.raises(RunFolderError):
        run.lock()
    assert said == []
    monkeypatch.setenv(rundir.RESTARTED, "1")
    threading.Timer(1.5, former.close).start()
    began = time.monotonic()
    run.lock().close()
    assert 1.0 < time.monotonic() - began < 20
    assert said == [
        f"waiting    up to 90 s for process {os.getpid()} on {os.uname().nodename}, which still holds {run.path}"
    ]


def test_it_is_not_waited_for_without_end(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rundir, "_DYING_S", 1.0)
    monkeypatch.setenv(rundir.RESTARTED, "1")
    with run.lock(), pytest.raises(RunFolderError, match="is training in this run folder"):
        run.lock()


def test_preflight_says_that_there_are_none(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    before = sorted(run.path.iterdir())
    config, origins = load_config(None, [f"run.dir={run.path.parent}", f"run.name={run.path.name}"])
    job = JobSpec("gpt", run.path, Profile(name="p", gpus_per_node=1, shared=[str(run.path)]), ())
    assert {found.severity for found in preflight._check_folder(config, origins, run, job)} == {"ok"}
    without_locks(monkeypatch, errno.ENOSYS)
    (found,) = (each for each in preflight._check_folder(config, origins, run, job) if each.severity != "ok")
    assert found.severity == "warning"
    assert f"{run.path} has no locks ({os.strerror(errno.ENOSYS)}; Lustre" in found.message
    assert sorted(run.path.iterdir()) == before
