"""The lock of a run folder: who holds it, one that is about to be let go, and file systems without locks."""

import errno
import fcntl
import os
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from launcher.checks import preflight
from launcher.cluster import Profile
from launcher.jobs import JobDir
from launcher.keeper.one_machine import _take_lock
from launcher.slurm.batch import JobSpec
from llmtrain import locks, log, rundir
from llmtrain.config import load_config
from llmtrain.errors import RunFolderError
from llmtrain.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "runs" / "gpt")
    made.create()
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    log.warn_once.cache_clear()
    monkeypatch.setattr(log, "warning", lines.append)
    return lines


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_run_goes_on_without(
    run: RunDir, number: int, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Lustre without flock, NFS without its lock service: nobody else trains there."""
    without_locks(monkeypatch, number)
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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_also_without_locks_one_process_of_a_machine_trains_in_it(
    run: RunDir, number: int, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(rundir.RESTARTED, raising=False)
    without_locks(monkeypatch, number)
    other = subprocess.Popen(["sleep", "60"])
    (run.path / "lock").write_text(f"process {other.pid} on {os.uname().nodename}")
    with pytest.raises(RunFolderError, match=f"process {other.pid} on .* is training in this run folder"):
        run.lock()
    assert said == []
    other.kill()
    while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not run.is_training()  # it has ended, though nobody has asked how
    run.lock().close()
    assert (run.path / "lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    other.wait()


def test_a_number_that_a_lock_names_may_be_another_processs_by_now(
    run: RunDir, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    without_locks(monkeypatch, errno.ENOLCK)
    lock, here = run.path / "lock", os.uname().nodename
    for process, written in ((os.getpid(), 1e9), (os.getpid(), time.time()), (os.getppid(), 1e9)):
        lock.write_text(f"process {process} on {here}")
        os.utime(lock, (written, written))
        run.lock().close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_no_disk_without_locks(
    run: RunDir, number: int, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    """It may do better at the next start; until then another process may be training there."""
    without_locks(monkeypatch, number)
    (run.path / "lock").write_text("process 7 on faraway")
    for take, file in ((run.lock, "lock"), (run.lock_service, "service/lock")):
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            take()
        assert (caught.value.errno, caught.value.filename) == (number, str(run.path / file))
    assert (run.path / "lock").read_text() == "process 7 on faraway"
    assert said == []
    with pytest.raises(OSError, match=os.strerror(number)):
        locks.why_none(run.path)


def test_each_lock_says_what_nobody_else_should_do(run: RunDir, said: list[str], monkeypatch: pytest.MonkeyPatch):
    without_locks(monkeypatch, errno.ENOSYS)
    jobs = JobDir.of(run)
    for handle in (run.lock(), run.lock_service(), run.lock_service(), _take_lock(run, jobs)):
        assert handle is not None
        handle.close()
    why = f"no locks here ({os.strerror(errno.ENOSYS)}): be sure that no other"
    assert said == [
        f"{run.path}: {why} process trains in it",
        f"{run.service}: {why} checkpoint service is at work on this run",
        f"{jobs.local}: {why} 'llmtrain run' keeps this run going",
    ]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_one_that_is_held_is_refused(run: RunDir, number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(rundir.RESTARTED, raising=False)
    without_locks(monkeypatch, number)
    with pytest.raises(RunFolderError, match="is training in this run folder"):
        run.lock()


def test_a_former_start_that_is_dying_is_waited_for(run: RunDir, said: list[str], monkeypatch: pytest.MonkeyPatch):
    """Killed ranks give their GPUs back first; 17 would end the run for good."""
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


def test_a_stop_of_an_earlier_start_does_not_end_the_next_one(run: RunDir):
    """And one of this start stays, though somebody starts the run once more."""
    jobs = JobDir.of(run)
    jobs.path.mkdir(parents=True)
    jobs.stop.touch()
    with _take_lock(run, jobs):
        assert not jobs.stop.exists()
        jobs.stop.touch()
        with pytest.raises(RunFolderError, match="keeps this run going already"):
            _take_lock(run, jobs)
        assert jobs.stop.exists()


def test_preflight_says_that_there_are_none(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    before = sorted(run.path.iterdir())
    config, origins = load_config(None, [f"run.dir={run.path.parent}", f"run.name={run.path.name}"])
    job = JobSpec("gpt", run.path, Profile(name="p", gpus_per_node=1, shared=[str(run.path)]))
    assert {found.severity for found in preflight._check_folder(config, origins, run, job)} == {"ok"}
    without_locks(monkeypatch, errno.ENOSYS)
    (found,) = (each for each in preflight._check_folder(config, origins, run, job) if each.severity != "ok")
    assert found.severity == "warning"
    assert f"{run.path} has no locks ({os.strerror(errno.ENOSYS)}; Lustre" in found.message
    assert sorted(run.path.iterdir()) == before


def test_two_that_look_do_not_see_each_other(run: RunDir):
    """Looking takes the lock for an instant; another who looks then should not say that training runs."""
    with run.lock():
        assert run.is_training()
    with (run.path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not run.is_training()
