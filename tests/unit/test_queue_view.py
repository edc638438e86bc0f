"""Jobs in `llmtrain status`: joined with what SLURM says of them, or with its silence."""

import json
import time
from pathlib import Path

import pytest

from launcher.jobs import JobDir, JobRecord
from launcher.runs import find_runs
from launcher.slurm import client
from launcher.watching.logs import Wanted, find
from launcher.watching.queue_view import Queue, find_submitted, outputs, read_queue
from launcher.watching.status import read_status
from launcher.watching.status_display import show_status
from llmtrain.errors import RunFolderError
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import make_run, train
from tests.support.jobs import Slurm, submitted


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path / "runs" / "gpt", "train.steps=1000", "service.start=never")
    train(made, 500)
    return made


def told(capsys: pytest.CaptureFixture[str], *paths: Path) -> str:
    show_status(list(paths), False, False)
    return " ".join(capsys.readouterr().out.split())


def test_without_jobs_slurm_is_not_asked(run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    assert "queue" not in told(capsys, run.path)
    assert slurm.calls == []


def test_a_running_job(run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    submitted(run, "12")
    slurm.queued("12|RUNNING|None|n[1-2]|2-03:20:00|1")
    assert "queue job 12 of big (train): running on n[1-2], 2 d 3 h until its time limit training" in told(
        capsys, run.path
    )
    show_status([run.path], True, False)
    (found,) = json.loads(capsys.readouterr().out)
    assert found["slurm"] is None
    (job,) = found["jobs"]
    assert (job["job_id"], job["state"], job["left_s"], job["is_over"]) == ("12", "RUNNING", 184_800, False)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("12|PENDING|Resources||1:00:00|{soon}", "pending, waits for free nodes, expected to start 20"),
        ("12|PENDING|BeginTime||1:00:00|N/A", "pending, was requeued, and may start again soon"),
        ("12|PENDING|QOSMaxJobs||1:00:00|N/A", "pending, QOSMaxJobs"),
        ("12|COMPLETED|None|n1|1:00:00|1", "completed on n1"),
        ("", "over; SLURM has forgotten it (submitted 20"),
    ],
)
def test_a_job_that_does_not_run(
    run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str], line: str, expected: str
):
    submitted(run, "12")
    slurm.queued(line.format(soon=int(time.time()) + 3600)) if line else None
    assert f"job 12 of big (train): {expected}" in told(capsys, run.path)


def test_a_job_that_failed_is_for_a_person(run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    jobs = submitted(run, "12")
    (jobs.folder("12") / "12_0_log.out").write_text("error: no such GPU")
    slurm.queued("12|FAILED|NonZeroExitCode|n1|1:00:00|1")
    slurm.says("scontrol", "Slurmctld(primary) at x is UP\nJobId=12 JobState=FAILED ExitCode=2:0")
    output = told(capsys, run.path)
    assert "mend job 12 ended: failed, exit code 2; its output: " in output
    assert "12_0_log.out" in output.replace(" ", "")


def test_of_a_sweep_each_run_has_its_own_output(tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    """The tasks of an array share a folder."""
    runs = [RunDir(tmp_path / "runs" / "sweep" / f"lr-{number}") for number in range(3)]
    shared = tmp_path / "runs" / ".jobs" / "sweep" / "submitted"
    shared.mkdir(parents=True)
    for number, run in enumerate(runs):
        JobDir.of(run).add(JobRecord(job_id=f"20_{number}", kind="train"), shared)
    (shared / "20_1_0_log.out").write_text("error: no such GPU")
    assert [len(outputs(run, f"20_{number}")) for number, run in enumerate(runs)] == [0, 1, 0]
    with pytest.raises(RunFolderError, match="nothing was said yet"):
        find(runs[2], Wanted())
    with pytest.raises(RunFolderError, match="no node of it has said anything yet"):
        find(runs[0], Wanted(node=0))
    slurm.queued("20_0|CANCELLED|None|n1|1:00|1", "20_1|RUNNING|None|n1|1:00|1", "20_2|NODE_FAIL|None|n1|1:00|1")
    output = told(capsys, runs[2].path)
    assert "job 20_2 ended: node_fail" in output
    assert "its output" not in output


def test_before_the_first_start_there_is_no_folder(
    tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "runs").mkdir()
    waiting, shards = RunDir(tmp_path / "runs" / "new"), RunDir(tmp_path / "runs" / "shards")
    submitted(waiting, "13", after="afterok:11")
    submitted(shards, "11", kind="shard")
    slurm.queued(
        "11_0|COMPLETED|None|n1|1:00:00|1", "11_1|RUNNING|None|n2|59:00|1", "13|PENDING|Dependency||1:00:00|N/A"
    )
    output = told(capsys, waiting.path)
    assert "job 13 of big (train): pending, waits for another job to end well, submitted to start afterok:11" in output
    assert "training not started; its folder comes when the job starts" in output
    monkeypatch.chdir(tmp_path)
    status = {run.path.name: told(capsys, run.path) for run in find_submitted([])}
    assert set(status) == {"new", "shards"}
    assert "job 11 of big (shard): running on n2, 1 running, 1 completed, 59 min until" in status["shards"]
    assert "13 pending" in told(capsys)
    assert "11 shard running, 59 min left" in told(capsys)
    with pytest.raises(RunFolderError):
        find_runs([])


def test_one_question_for_all_runs_and_for_those_of_sweeps(
    run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    submitted(run, "12")
    for number in range(3):
        submitted(RunDir(run.path.parent / "sweep" / f"lr-{number}"), f"20_{number}")
    slurm.queued("12|RUNNING|None|n1|10:00|1", *(f"20_{number}|PENDING|Priority||10:00|N/A" for number in range(3)))
    monkeypatch.chdir(run.path.parent.parent)
    output = told(capsys)
    assert all(text in output for text in ("runs/gpt", "12 running", "runs/sweep/lr-2", "20_2 pending"))
    told(capsys)
    assert [call.split()[0] for call in slurm.calls] == ["scontrol", "squeue"]
    assert "--jobs=12,20 " in slurm.calls[1]


def test_a_slurm_that_is_silent(run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    submitted(run, "12")
    slurm.says("scontrol", "Slurmctld(primary) at x is DOWN", 1)
    output = told(capsys, run.path)
    assert (
        "not known, because SLURM does not answer (slurmctld does not answer: Slurmctld(primary) at x is DOWN" in output
    )
    assert "stopped" in output
    assert "step 500 of 1,000" in output
    other = make_run(run.path.parent / "other")
    output = told(capsys, run.path, other.path)
    assert output.count("SLURM does not answer") == 1
    assert "12 ?" in output


def test_accounts_remember_longer(run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    submitted(run, "12")
    slurm.says("squeue", "slurm_load_jobs error: Invalid job id specified", 1)
    slurm.says("sacct", "12|TIMEOUT|0:0|n1")
    assert "job 12 of big (train): timeout on n1" in told(capsys, run.path)


def test_a_service_job_is_shown_below_training(run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    submitted(run, "12")
    submitted(run, "14", kind="service")
    submitted(run, "15")  # the newer training job
    slurm.queued("14|RUNNING|None|n3|UNLIMITED|1", "15|RUNNING|None|n1|UNLIMITED|1")
    output = told(capsys, run.path)
    assert "queue job 15 of big (train): running on n1 job 14 of big (service): running on n3 training" in output
    assert "job 12" not in output


def test_a_damaged_record_of_a_job_hides_nothing_of_a_run_that_has_stopped(
    run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]
):
    ledger = submitted(run, "12").ledger
    ledger.write_text('{"job\n' + ledger.read_text())
    output = told(capsys, run.path)
    assert "training stopped, step 500 of 1,000" in output
    assert "line 1 is damaged" in output
    assert "go on" not in output  # how it was submitted is not known


def test_reading_starts_no_process(run: RunDir, slurm: Slurm):
    submitted(run, "12")
    assert read_status(run, Queue({}, None)).jobs == []
    assert slurm.calls == []


def test_a_job_that_waits_again_does_not_train(run: RunDir, slurm: Slurm):
    """Within a minute of its last line, from a machine whose locks are not seen here."""
    submitted(run, "12")
    (run.path / "lock").write_text("process 7 on n1")
    for state, expected in {"RUNNING": "running", "PENDING": "stopped", "CANCELLED": "stopped"}.items():
        slurm.queued(f"12|{state}|None||10:00|1")
        assert read_status(run, read_queue([run])).training.state == expected


def test_an_array_of_which_one_failed_has_failed(slurm: Slurm):
    slurm.queued("7_0|COMPLETED|None|n1|1:00|1", "7_1|FAILED|NonZeroExitCode|n2|1:00|1")
    told = client.queue(["7"])["7"]
    assert (told.state, told.reason, told.nodes) == ("FAILED", "1 failed, 1 completed", "n2")
    slurm.queued("7_0|FAILED|NonZeroExitCode|n1|1:00|1", "7_1|PENDING|Resources||1:00|N/A")
    assert client.queue(["7"])["7"].state == "PENDING"
