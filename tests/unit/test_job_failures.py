"""Why the jobs of a run do not run, in `llmtrain status`: what failed, what waits in vain, and what SLURM forgot."""

import json
import os
import time
from pathlib import Path

import pytest

from launcher.jobs import JobDir
from launcher.keeper.meeting import Meeting
from launcher.watching.logs import Wanted, find
from launcher.watching.queue_view import read_queue
from launcher.watching.status import read_status
from launcher.watching.status_display import show_status
from llmtrain.errors import RunFolderError
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import make_run, train
from tests.support.jobs import Slurm, submitted

UP = "Slurmctld(primary) at x is UP"
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def waiting(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "new")


def told(capsys: pytest.CaptureFixture[str], *paths: Path) -> str:
    show_status(list(paths), False, False)
    return " ".join(capsys.readouterr().out.split())


# Waiting in vain


@pytest.mark.parametrize("state", ["CANCELLED", "PENDING"])
def test_a_job_that_waits_for_one_that_failed(
    waiting: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str], state: str
):
    submitted(waiting, "13", after="afterok:11")
    slurm.says("scontrol", f"{UP}\nJobId=11 JobState=FAILED ExitCode=10:0")
    slurm.queued(f"13|{state}|DependencyNeverSatisfied||1:00:00|N/A", "11|FAILED|NonZeroExitCode|n1|1:00:00|1")
    output = told(capsys, waiting.path)
    never = "the job that it waits for has failed: it will never start, submitted to start afterok:11"
    assert f"job 13 of big (train): {state.lower()}, {never}" in output
    why = "it was submitted to start afterok:11, and job 11 ended: failed, exit code 10"
    assert output.endswith(f"mend job 13 never starts: {why}")


def test_a_job_that_waits_for_one_that_is_not_known(waiting: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    submitted(waiting, "13", after="afterany:11")
    slurm.queued("13|CANCELLED|DependencyNeverSatisfied||1:00:00|N/A")
    assert "submitted to start afterany:11, and that can no longer be" in told(capsys, waiting.path)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("11|OUT_OF_MEMORY|0:125|n1", ["start afterok:11, and job 11 ended: out_of_memory, signal 125"]),
        ("11|COMPLETED|0:0|n1", []),
    ],
)
def test_accounts_do_not_say_why_a_job_was_cancelled(waiting: RunDir, slurm: Slurm, other: str, expected: list[str]):
    submitted(waiting, "13", after="afterok:11")
    slurm.says("squeue", FORGOTTEN, 1)
    slurm.says("sacct", f"13|CANCELLED by 0|0:0|None assigned\n{other}")
    problems = read_status(waiting, read_queue([waiting])).problems
    assert [problem.partition("submitted to ")[2] for problem in problems] == expected


@pytest.mark.parametrize("after", ["", "afterok:11"])
@pytest.mark.parametrize("other", ["CANCELLED|None", "FAILED|NonZeroExitCode"])
def test_a_person_who_cancelled_need_not_be_told(
    waiting: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str], after: str, other: str
):
    submitted(waiting, "13", after=after)
    slurm.queued(f"13|CANCELLED|{'Dependency' if after else 'Priority'}||1:00:00|N/A", f"11|{other}|n1|1:00:00|1")
    output = told(capsys, waiting.path)
    assert "job 13 of big (train): cancelled training" in output
    assert "mend" not in output


# Sharding


def sharding(tmp_path: Path) -> RunDir:
    """The tokenizer, two parts, and what joins them."""
    run = RunDir(tmp_path / "runs" / "shard-new")
    for job_id, after in {"21": "", "22_0": "afterok:21", "22_1": "afterok:21", "23": "afterok:22"}.items():
        submitted(run, job_id, "shard", after)
    return run


def test_sharding_that_failed_is_named(tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    run = sharding(tmp_path)
    slurm.says("scontrol", f"{UP}\nJobId=23 JobState=FAILED ExitCode=19:0")
    slurm.queued("23|FAILED|NonZeroExitCode|n1|1:00:00|1")
    assert "mend job 23 ended: failed, exit code 19" in told(capsys, run.path)


@pytest.mark.parametrize(
    ("lines", "culprit"),
    [
        (["21|OUT_OF_MEMORY|None|n1|1:00|1", "22_0|CANCELLED|DependencyNeverSatisfied||1:00|N/A"], "21"),
        (["21|COMPLETED|None|n1|1:00|1", "22_0|COMPLETED|None|n1|1:00|1", "22_1|OUT_OF_MEMORY|None|n1|1:00|1"], "22_1"),
    ],
)
def test_of_sharding_the_job_is_named_that_failed_first(
    tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str], lines: list[str], culprit: str
):
    run = sharding(tmp_path)
    (JobDir.of(run).folder(culprit) / f"{culprit}_0_log.out").write_text("Killed")
    slurm.queued(*lines, "23|CANCELLED|DependencyNeverSatisfied||1:00|N/A")
    said = told(capsys, run.path)
    assert f"start afterok:22, and job {culprit} ended: out_of_memory; its output: " in said
    assert f"{culprit}_0_log.out" in said.replace(" ", "")


# Before Python


def test_a_file_in_which_nothing_stands_is_not_shown(waiting: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    jobs = submitted(waiting, "13")
    empty = jobs.folder("13") / "13_1_log.out"
    empty.touch()
    slurm.queued("13|TIMEOUT|TimeLimit|n1|1:00|1")
    with pytest.raises(RunFolderError, match=r"nothing was said yet; job 13 .*: timeout on n1"):
        find(waiting, Wanted())
    assert "its output" not in told(capsys, waiting.path)
    said = jobs.folder("13") / "13_0_log.out"
    said.write_text("slurmstepd: error: *** JOB 13 ON n1 CANCELLED DUE TO TIME LIMIT ***")
    os.utime(said, (1, 1))
    assert find(waiting, Wanted()) == said
    assert "13_0_log.out" in told(capsys, waiting.path).replace(" ", "")


def test_a_job_whose_output_could_not_be_opened(waiting: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    """Its folder was removed while it trained, or the disk is full."""
    jobs = submitted(waiting, "13")
    slurm.says("scontrol", f"{UP}\nJobId=13 JobState=FAILED ExitCode=0:53")
    slurm.queued("13|FAILED|RaisedSignal:53(Real-time_signal_19)|n1|1:00|1")
    said = told(capsys, waiting.path)
    assert "job 13 ended: SLURM could not open its output (signal 53) in " in said
    assert f"{jobs.folder('13')}: is it there, is the disk full? Then submit again" in said.replace(" /", "/").replace(
        "in/", "in /"
    )


# Saved, and not back


@pytest.mark.parametrize(("asked", "job"), [(True, "12"), (False, "12"), (True, "11"), (None, "")])
def test_whether_a_stop_was_asked_for(
    tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str], asked: bool | None, job: str
):
    """With requeue: false a time limit and a preemption end a job in the same way."""
    run = make_run(tmp_path / "runs" / "gpt", "train.steps=1000", "service.start=never")
    train(run, 500)
    jobs = submitted(run, "12")
    if asked is not None:
        jobs.progress.write_text(json.dumps({"job": job, "asked": asked}))
    slurm.says("scontrol", f"{UP}\nJobId=12 JobState=FAILED ExitCode=75:0")
    slurm.queued("12|FAILED|NonZeroExitCode|n1|1:00|1")
    said = told(capsys, run.path)
    mend = "mend job 12 ended before training was finished, and does not come back: submit the run again"
    if asked and job == "12":
        assert "job 12 of big (train): ended, as 'llmtrain stop' asked it to" in said
        assert "mend" not in said
    else:
        assert "job 12 of big (train): ended before training was finished (exit code 75)" in said
        assert mend in said
    make_run(tmp_path / "runs" / "other", "service.start=never")
    assert "12 stopped" in told(capsys, tmp_path / "runs")


# Forgotten


@pytest.fixture
def stopped(tmp_path: Path, slurm: Slurm) -> RunDir:
    """A run whose job SLURM has forgotten, on a cluster without accounts."""
    run = make_run(tmp_path / "runs" / "gpt", "train.steps=1000", "service.start=never")
    train(run, 500)
    submitted(run, "12")
    slurm.says("squeue", FORGOTTEN, 1)
    slurm.says("sacct", "Slurm accounting storage is disabled", 1)
    return run


def decide(run: RunDir, restart: int, *decisions: tuple[bool, int]) -> Meeting:
    meeting = Meeting(submitted(run, "12").start("12", restart))
    meeting.tell("begin", 0, 0.0)
    for attempt, (again, code) in enumerate(decisions):
        meeting.tell("decision", attempt, {"again": again, "code": code})
    return meeting


def test_how_a_forgotten_job_failed_stands_in_its_folder(stopped: RunDir, capsys: pytest.CaptureFixture[str]):
    decide(stopped, 9, (False, 75))
    decide(stopped, 10, (True, 1), (True, 1), (False, 19))
    output = told(capsys, stopped.path)
    assert "job 12 of big (train): failed, exit code 19" in output
    assert "mend job 12 ended: failed, exit code 19" in output
    show_status([stopped.path], True, False)
    (found,) = json.loads(capsys.readouterr().out)
    assert [(job["state"], job["is_over"]) for job in found["jobs"]] == [("FAILED", True)]


def test_a_forgotten_job_that_had_ended_too_often(stopped: RunDir, capsys: pytest.CaptureFixture[str]):
    decide(stopped, 3).tell("begin", 0, None)
    assert "mend job 12 ended: failed, exit code 1" in told(capsys, stopped.path)


@pytest.mark.parametrize("decisions", [(), ((True, 1),), ((True, 1), (False, 0)), ((False, 75),)])
def test_a_forgotten_job_of_which_no_failure_is_written(
    stopped: RunDir, capsys: pytest.CaptureFixture[str], decisions: tuple[tuple[bool, int], ...]
):
    decide(stopped, 0, *decisions)
    output = told(capsys, stopped.path)
    assert "over; SLURM has forgotten it" in output
    assert "mend" not in output


def test_an_older_failure_is_not_the_last_word(stopped: RunDir, capsys: pytest.CaptureFixture[str]):
    """Trained since, by hand; or of a job of the same number before the cluster was set up again."""
    folder = decide(stopped, 0, (False, 19)).folder
    later = time.time() + 60
    os.utime(stopped.metrics, (later, later))
    assert "mend" not in told(capsys, stopped.path)
    os.utime(stopped.metrics, (1, 1))
    assert "mend" in told(capsys, stopped.path)
    os.utime(folder, (2, 2))
    assert "mend" not in told(capsys, stopped.path)


def test_a_slurm_that_is_silent_may_know_of_a_new_start(
    stopped: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]
):
    decide(stopped, 0, (False, 19))
    slurm.says("scontrol", "Slurmctld(primary) at x is DOWN", 1)
    assert "mend" not in told(capsys, stopped.path)
