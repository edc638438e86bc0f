"""What befalls runs that last for weeks: cleaners of /tmp, countless failures, a run folder that is moved away."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.keeper import hangs, torchrun
from launcher.keeper.exit_codes import read_codes
from launcher.keeper.meeting import Meeting
from launcher.keeper.rules import Rules
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.torchrun import Start
from llmtrain import checkpoint, errors, ledger
from llmtrain.errors import EXIT_CODES, ConfigError, RunFolderError, leave_code
from llmtrain.failures import failures_noted
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import make_run
from tests.support.runs import environment

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "runs" / "gpt")


@pytest.fixture
def make_supervisor(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Supervisor]]:
    """Of scripts that take the place of training, one after the other."""

    def make(*scripts: str) -> Supervisor:
        left = list(scripts)
        monkeypatch.setattr(torchrun, "command", lambda *_: [sys.executable, "-c", left.pop(0)])
        return Supervisor(Start([], 1), run, Rules(10**6), Meeting(None), tmp_path / "logs", tmp_path / "stop")

    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield make
    for number, handler in before.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------- /tmp

BECOMES_OLD = """
import os, sys, time
from pathlib import Path
codes = Path(os.environ["LLMTRAIN_EXIT_CODES"])
stacks = Path(os.environ["LLMTRAIN_HEARTBEATS"]) / "stacks-0.txt"
stacks.touch()
for path in (codes, stacks):
    os.utime(path, (1000, 1000))
deadline = time.monotonic() + 20
while min(codes.stat().st_mtime, stacks.stat().st_mtime) == 1000 and time.monotonic() < deadline:
    time.sleep(0.05)
sys.exit(time.monotonic() >= deadline)
"""


def test_what_ranks_leave_never_looks_old(make_supervisor: Callable[..., Supervisor]):
    """systemd-tmpfiles deletes what nobody has touched for ten days: an empty folder, the file for stacks."""
    assert make_supervisor(BECOMES_OLD, "")._attempt(0, None).codes == [0]


CLEANED = "import os; os.rmdir(os.environ['LLMTRAIN_EXIT_CODES']); "


@pytest.mark.parametrize("ends", ["", "os.abort()"])
def test_a_folder_for_exit_codes_that_was_deleted_ends_no_run(make_supervisor: Callable[..., Supervisor], ends: str):
    assert make_supervisor(CLEANED + ends, "").supervise() == 0


def test_a_rank_makes_the_folder_for_its_exit_code_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(EXIT_CODES, str(tmp_path / "codes"))
    monkeypatch.setenv(errors._OWNER, str(os.getpid()))
    assert read_codes(tmp_path / "codes") == {}
    leave_code(13)
    assert [left.code for left in read_codes(tmp_path / "codes").values()] == [13]


def test_torchrun_leaves_nothing_in_tmp(tmp_path: Path):
    (tmp_path / "tmp").mkdir()
    command = torchrun.command(Start(["no.such=setting"], 2), None, False, tmp_path / "torchrun")
    done = subprocess.run(
        command,
        env={**environment(), "TMPDIR": str(tmp_path / "tmp")}, cwd=tmp_path, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert "unknown key" in done.stderr
    assert list((tmp_path / "tmp").glob("torchelastic*")) == []
    assert list((tmp_path / "torchrun").iterdir())


# ---------------------------------------------------------------------------------------------- failures


def test_the_pause_after_a_thousand_failures_can_be_counted(
    make_supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
):
    rested: list[float] = []
    monkeypatch.setattr(Supervisor, "_rest", lambda _, seconds: rested.append(seconds))
    own = make_supervisor("raise SystemExit(1)", "")
    own._failures = 5000
    assert own.supervise() == 0
    assert rested == [30.0]


@pytest.mark.parametrize("fails", ["exists", "mkdir", "glob", "stat"])
def test_a_file_server_that_fails_over_ends_no_supervisor(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
):
    """It ends the ranks, which are to be started again: a supervisor that ends with them leaves them to nobody."""
    scripts, logs, stop = ["raise SystemExit(1)", ""], tmp_path / "logs", tmp_path / "stop"
    monkeypatch.setattr(torchrun, "command", lambda *_: [sys.executable, "-c", scripts.pop(0)])
    logs.mkdir()
    log = logs / "rank-1.log"
    log.touch()
    works, stale_ones = getattr(Path, fails), (log,) if fails == "stat" else (logs, stop)

    def stale(path: Path, *words: object, **named: object) -> object:
        if path in stale_ones and len(scripts) < 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return works(path, *words, **named)

    monkeypatch.setattr(Path, fails, stale)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert Supervisor(Start([], 2), run, Rules(), Meeting(None), logs, stop).supervise() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert scripts == []


def test_a_hang_is_named_where_its_stacks_cannot_be_written(
    make_supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """What the ranks hang on may be that disk."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hangs, "write_stacks", full)
    seen = hangs.Seen(rank=3, phase="data", step=41, seconds=600.0, stands=True, frozen=False)
    named = make_supervisor()._write_down([seen], Path("beats"), Path("stacks.txt"))
    assert named == "rank 3 stands still since 600 s, at step 41, taking data"
    assert f"{named}: the stacks of all ranks cannot be written: [Errno 28]" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- a folder that goes


@pytest.mark.parametrize("is_mounted", [False, True])
def test_a_run_whose_folder_is_moved_away_says_so_and_leaves_nothing_there(run: RunDir, is_mounted: bool):
    """Else it would be moved back into the stray folder, and the next command would begin at step 0."""
    moved = run.move_aside()
    if is_mounted:  # the mount point stays
        run.path.mkdir()
    with pytest.raises(RunFolderError, match=f"{run.path}: the run folder is gone: was it moved"), failures_noted(run):
        (run.checkpoints / "step").open("ab")
    assert list(run.path.parent.rglob("*events*")) == []
    if is_mounted:
        run.path.rmdir()
    assert not run.path.exists()
    moved.rename(run.path)
    with pytest.raises(ConfigError), failures_noted(run):
        raise ConfigError(["a problem"])
    assert [event.kind for event in ledger.events(run)] == ["failed"]


def test_a_file_that_is_missing_is_no_folder_that_is_gone(run: RunDir):
    with pytest.raises(FileNotFoundError), failures_noted(run):
        (run.path / "other").open()
    (event,) = ledger.events(run)
    assert "exit code 1: FileNotFoundError: " in event.message


def test_nothing_is_written_where_the_run_folder_was(run: RunDir):
    run.move_aside()
    event = ledger.Event(kind="stalled", message="")
    status = ledger.Status(pid=1, host="here")
    for write in (
        lambda: ledger.append(run.events, event),
        lambda: ledger.append(run.service_events, event),
        lambda: ledger.write(run.service_status, status),
        lambda: checkpoint.write_share(checkpoint.aside(run, 10), [], 1, 2),
        lambda: checkpoint.write_model(checkpoint.aside(run, 10), {}, lambda *_: {}),
    ):
        with pytest.raises(FileNotFoundError):
            write()
    assert not run.path.exists()
