"""`llmtrain stop`: who is asked, and what is said, where nothing real runs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from launcher import stop
from launcher.jobs import JobDir
from launcher.keeper.one_machine import train_here
from launcher.keeper.rules import Rules
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.torchrun import Start
from launcher.slurm import client
from launcher.stop import alive_jobs, ask, stop_runs
from launcher.watching.queue_view import find_submitted
from launcher.watching.status_display import show_status
from llmtrain import locks
from llmtrain.errors import RunFolderError, SlurmError
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import make_run, save, train
from tests.support.jobs import Slurm, status_of, submitted

HOLD = """
import signal, sys, time
from pathlib import Path
from llmtrain.rundir import RunDir
run = RunDir(Path(sys.argv[1]))
lock = run.lock()
if len(sys.argv) > 2:
    lock.truncate(0), lock.write(sys.argv[2]), lock.flush()
signal.signal(signal.SIGTERM, lambda *_: (run.checkpoint(9).mkdir(), sys.exit(75)))
print("here", flush=True)
time.sleep(60)
"""
KEEP = """
import sys, time
from launcher.keeper import torchrun
from launcher.keeper.one_machine import train_here
from launcher.keeper.rules import Rules
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.torchrun import Start
torchrun.command = lambda *_: [sys.executable, "-c", "import os; os.abort()"]
paused = Supervisor._rest
def rest(own, _):
    print("pauses", flush=True)
    paused(own, 600.0)
Supervisor._rest = rest
sys.exit(train_here(Start(sys.argv[1:], 1), Rules()))
"""
Holder = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setattr(stop, "_ASK_SLURM_S", 0.1)
    return Slurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path / "runs" / "gpt", "train.steps=1000")
    save(made, 5)
    return made


@pytest.fixture
def hold(run: RunDir) -> Iterator[Holder]:
    """Starts a process that holds the run, as training does."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(run.path), *words]
        started.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "here\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_does_not_run_is_no_error(run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    stop_runs([run.path], False)
    output = capsys.readouterr().out
    assert output == f"{run.path}: does not run; last checkpoint: step 5 ({run.checkpoint(5)})\n"
    assert slurm.calls == []


def test_a_process_here_saves_and_ends(run: RunDir, hold: Holder, capsys: pytest.CaptureFixture[str]):
    process = hold()
    stop_runs([run.path], False)
    output = capsys.readouterr().out
    assert f"process {process.pid} is asked to save and to end" in output
    assert f"has ended; last checkpoint: step 9 ({run.checkpoint(9)})" in output
    assert process.wait() == 75


def test_now_means_without_a_save(run: RunDir, hold: Holder, capsys: pytest.CaptureFixture[str]):
    process = hold()
    stop_runs([run.path], True)
    assert f"killed process {process.pid}\n" in capsys.readouterr().out
    assert process.wait() == -9
    assert run.checkpoint_steps() == [5]


@pytest.fixture
def pausing(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    """What `llmtrain run` does between two attempts: no rank is there."""
    words = [f"run.dir={run.path.parent}", f"run.name={run.path.name}"]
    process = subprocess.Popen(
        [sys.executable, "-c", KEEP, *words], text=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "pauses\n"
    yield process
    process.kill()
    process.communicate()


def test_one_that_pauses_between_attempts_is_stopped(
    run: RunDir, pausing: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
):
    assert not run.is_training()
    assert status_of(run).training.state == "starting"
    stop_runs([run.path], False)
    assert pausing.wait(20) == 75
    output = capsys.readouterr().out
    assert f"process {pausing.pid} on {os.uname().nodename} is asked to save and to end. It is starting" in output
    assert output.endswith(f"has ended; last checkpoint: step 5 ({run.checkpoint(5)})\n")
    assert not JobDir.of(run).stop.exists()
    assert status_of(run).training.state == "not started"


def test_before_there_is_a_folder_it_is_found(
    run: RunDir, pausing: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As it is while the first shards are built."""
    shutil.rmtree(run.path)
    show_status([run.path], False, False)
    assert f"starting (process {pausing.pid} on " in capsys.readouterr().out
    assert [found.path for found in find_submitted([run.path.parent])] == [run.path]
    stop_runs([run.path], False)
    assert pausing.wait(20) == 75


def test_a_second_llmtrain_run_is_refused_and_takes_no_stop_away(run: RunDir, pausing: subprocess.Popen[str]):
    words = [f"run.dir={run.path.parent}", f"run.name={run.path.name}"]
    with pytest.raises(RunFolderError, match=rf"process {pausing.pid} on .* keeps this run going already"):
        train_here(Start(words, 1), Rules())
    pausing.send_signal(signal.SIGSTOP)  # so that it does not see the file before the second look
    stop_file = JobDir.of(run).stop
    stop_file.touch()
    with pytest.raises(RunFolderError, match="keeps this run going already"):
        train_here(Start(words, 1), Rules())
    assert stop_file.exists()


def test_a_stop_of_before_llmtrain_run_is_not_meant_for_it(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    stop_file = JobDir.of(run).stop
    stop_file.parent.mkdir(parents=True)
    stop_file.touch()
    monkeypatch.setattr(Supervisor, "supervise", lambda _: 75 if stop_file.exists() else 0)
    assert train_here(Start([f"run.dir={run.path.parent}", f"run.name={run.path.name}"], 1), Rules()) == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("process 7 on faraway", "process 7 on faraway keeps it going; kill it there: ssh faraway llmtrain stop /"),
        (f"process 4194304 on {os.uname().nodename}", "process 4194304 keeps it going, and is not seen here"),
        (f"process {{other}} on {os.uname().nodename}", "keeps it going, and is not seen here"),
        ("", "has not said who it is; try again"),
    ],
)
def test_nothing_else_is_killed(run: RunDir, said: str, expected: str):
    """A number may be that of another process by now."""
    lock = JobDir.of(run).local_lock
    lock.parent.mkdir(parents=True)
    with hold_file(lock) as held, subprocess.Popen(["sleep", "60"]) as other:
        held.truncate(0)
        held.write(said.format(other=other.pid))
        held.flush()
        with pytest.raises(RunFolderError, match=expected):
            stop_runs([run.path], True)
        assert other.poll() is None
        other.kill()


def hold_file(path: Path) -> IO[str]:
    held = locks.hold(path, "nobody else does")
    assert held is not None
    return held


def test_a_process_elsewhere_is_named(run: RunDir, hold: Holder):
    hold("process 7 on faraway")
    with pytest.raises(RunFolderError, match=r"process 7 on faraway trains it.*: ssh faraway kill -TERM 7"):
        stop_runs([run.path], False)


def test_a_process_in_another_container_is_named(run: RunDir, hold: Holder):
    hold(f"process 4194304 on {os.uname().nodename}")
    with pytest.raises(RunFolderError, match="process 4194304 trains it, and is not seen here"):
        stop_runs([run.path], False)


def test_one_that_cannot_be_stopped_does_not_keep_the_others(
    run: RunDir, hold: Holder, capsys: pytest.CaptureFixture[str]
):
    process = hold()
    with pytest.raises(RunFolderError, match="nope: no such folder"):
        stop_runs([run.path.parent / "nope", run.path], False)
    assert process.wait() == 75
    assert "has ended" in capsys.readouterr().out


def test_a_waiting_job_is_cancelled_and_a_running_one_asked(
    tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
):
    run = RunDir(tmp_path / "runs" / "new")
    jobs = submitted(run, "11")
    submitted(run, "12")
    submitted(run, "13", kind="service")
    slurm.queued("11|RUNNING|None|n1|10:00|1", "12|PENDING|Resources||10:00|N/A", "13|RUNNING|None|n2|1:00|1")
    stopping = ask(run, alive_jobs(run), False)
    assert stopping is not None
    assert jobs.stop.exists()
    assert not stopping.is_over()
    slurm.queued("11|COMPLETED|None|n1|10:00|1", "12|CANCELLED|None||10:00|N/A", "13|RUNNING|None|n2|1:00|1")
    stop.wait([stopping])
    assert not jobs.stop.exists()  # the next job is not asked to end
    output = capsys.readouterr().out
    assert "job 11 is asked to save and to end" in output
    assert "job 12 waited and is cancelled" in output
    assert output.endswith(f"{run.path}: has ended; no checkpoint yet\n")
    assert next(call for call in slurm.calls if call.startswith("scancel")) == "scancel --state=PENDING 12"


def test_of_several_runs_those_that_wait_are_cancelled_first(
    tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
):
    """Or the nodes that the first one's end sets free would start the second."""
    first, second = RunDir(tmp_path / "runs" / "first"), RunDir(tmp_path / "runs" / "second")
    asked = submitted(first, "11").stop
    submitted(second, "12")
    squeue, later, seen = tmp_path / "bin" / "squeue", tmp_path / "later", tmp_path / "seen"
    slurm.queued("11|COMPLETED|None|n1|10:00|1", "12|CANCELLED|None||10:00|N/A")
    squeue.rename(later)
    slurm.queued("11|RUNNING|None|n1|10:00|1", "12|PENDING|Resources||10:00|N/A")
    scancel = tmp_path / "bin" / "scancel"
    scancel.write_text(f"#!/bin/sh\n[ ! -e {asked} ] && echo $@ > {seen}\nmv {later} {squeue}\n")
    stop_runs([first.path, second.path], False)
    assert seen.read_text() == "--state=PENDING 12\n"
    assert capsys.readouterr().out.count("has ended") == 2


def test_a_job_that_is_requeued_meanwhile_does_not_come_back(run: RunDir, slurm: Slurm):
    submitted(run, "11")
    slurm.queued("11|RUNNING|None|n1|10:00|1")
    stopping = ask(run, alive_jobs(run), False)
    assert stopping is not None
    slurm.queued("11|PENDING|BeginTime||10:00|N/A")
    assert not stopping.is_over()
    assert slurm.calls[-1] == "scancel --state=PENDING 11"


def test_a_job_is_cancelled_now(run: RunDir, slurm: Slurm):
    jobs = submitted(run, "11")
    slurm.queued("11|RUNNING|None|n1|10:00|1")
    ask(run, alive_jobs(run), True)
    assert slurm.calls[-1] == "scancel 11"
    assert not jobs.stop.exists()


def test_where_slurm_is_silent_the_nodes_are_asked_all_the_same(run: RunDir, slurm: Slurm):
    jobs = submitted(run, "11")
    slurm.says("scontrol", "Slurmctld(primary) at x is DOWN", 1)
    with pytest.raises(SlurmError, match=r"slurmctld does not answer.*whether job 11 waits .* is not known"):
        ask(run, alive_jobs(run), False)
    assert jobs.stop.exists()


def started(run: RunDir, job: str) -> JobDir:
    """As by a script that was given to sbatch itself: nothing was written down when it was queued."""
    jobs = JobDir.of(run)
    jobs.start(job, 0).mkdir(parents=True)
    return jobs


def test_a_job_of_sbatchs_own_is_asked(run: RunDir, slurm: Slurm, hold: Holder, capsys: pytest.CaptureFixture[str]):
    """A signal would make it queue itself again."""
    jobs = started(run, "11")
    hold("process 7 on faraway")
    slurm.says("scontrol", f"Slurmctld(primary) at x is UP\nJobId=11 StartTime={time.time():.0f} Restarts=0")
    slurm.queued("11|RUNNING|None|n1|10:00|1")
    stopping = ask(run, alive_jobs(run), False)
    assert stopping is not None
    assert stopping.job_ids == ["11"]
    assert jobs.stop.exists()
    assert "job 11 is asked to save and to end" in capsys.readouterr().out
    slurm.says("scontrol", "Slurmctld(primary) at x is UP\nJobId=11 Restarts=1")
    slurm.queued("11|PENDING|BeginTime|n1|10:00|1")
    assert [told.job_id for told in alive_jobs(run)] == ["11"]


@pytest.mark.parametrize("line", ["11|RUNNING|None|n1|10:00|1", "11|PENDING|Priority||10:00|N/A"])
def test_another_job_of_that_number_is_left_alone(run: RunDir, slurm: Slurm, line: str):
    """The cluster was set up again since, and counts from the beginning."""
    started(run, "11")
    slurm.says("scontrol", f"Slurmctld(primary) at x is UP\nJobId=11 StartTime={time.time() + 3600:.0f} Restarts=0")
    slurm.queued(line)
    assert alive_jobs(run) == []


def test_where_slurm_is_not_at_hand_the_job_is_asked_through_its_file(
    run: RunDir, hold: Holder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(client, "is_here", lambda: False)
    jobs = started(run, "11")
    hold("process 7 on faraway")
    with pytest.raises(
        RunFolderError, match=r"A job .* is asked to save and to end .*stop\)\. Of another job: scancel"
    ):
        stop_runs([run.path], False)
    assert jobs.stop.exists()


@pytest.mark.parametrize("write_down", [submitted, started])
def test_a_job_that_was_cancelled_does_not_train(
    run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str], write_down: Callable[[RunDir, str], JobDir]
):
    """Though it wrote a moment ago, on a machine whose locks are not seen here."""
    write_down(run, "11")
    train(run, 10)
    (run.path / "lock").write_text("process 7 on faraway")
    slurm.queued("11|CANCELLED|None|n1|10:00|1")
    stop_runs([run.path], False)
    assert "does not run (job 11 is over: cancelled); last checkpoint: step 5" in capsys.readouterr().out


def test_what_is_not_yours_is_said_in_words(run: RunDir, hold: Holder, monkeypatch: pytest.MonkeyPatch):
    process = hold()

    def refuse(*_: object) -> None:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "send_signal", refuse)
    with pytest.raises(RunFolderError, match="it is not yours to stop"):
        stop_runs([run.path], False)
    assert process.poll() is None
