"""What is written down of jobs where something fails in between; without SLURM (tests/slurm/test_submit.py has one)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.checks import preflight
from launcher.jobs import JobDir, JobRecord
from launcher.slurm import batch
from launcher.slurm.batch import JobSpec
from launcher.submitting import submit
from launcher.submitting.command import Wishes, order_of
from llmtrain.errors import ConfigError, SlurmError
from llmtrain.rundir import RunDir


def wishes(tmp_path: Path, time: str = "") -> Wishes:
    profile = tmp_path / "c.yaml"
    profile.write_text("gpus_per_node: 0\n")
    return Wishes([], profile, 1, None, None, time, "", [], True, 3, 600.0)


def test_a_service_that_cannot_be_queued_leaves_no_training_job_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    queued: list[Sequence[Any]] = []

    def queue_jobs(spec: JobSpec, jobs: Sequence[Any]) -> list[str]:
        queued.append(jobs)
        if len(queued) == 3:
            raise SlurmError("sbatch: error: QOSMaxSubmitJobPerUserLimit")
        return [f"7_{number}" for number in range(len(jobs))] if len(jobs) > 1 else ["8"]

    monkeypatch.setattr(submit, "queue_jobs", queue_jobs)
    for name in ("check", "check_side"):
        monkeypatch.setattr(preflight, name, lambda *_: [])
    words, sweep = [f"run.dir={tmp_path}/runs", "run.name=sweep"], ["optim.lr=1e-3,1e-2,1e-1"]
    with pytest.raises(SlurmError) as caught:
        submit.submit(words, order_of(wishes(tmp_path)), sweep, True, Console())
    said = str(caught.value)
    assert "QOSMaxSubmitJobPerUserLimit" in said
    assert "Training is queued (7_0, 7_1, 7_2), and 1 of 3 services are" in said
    assert "python -m llmtrain.service --run" in said
    runs = sorted((tmp_path / "runs/sweep/.jobs").glob("*/jobs.jsonl"))
    found = [[(record.job_id, record.kind) for record in JobDir(ledger.parent).records()] for ledger in runs]
    assert found == [[("7_0", "train"), ("8", "service")], [("7_1", "train")], [("7_2", "train")]]


def test_a_signal_of_the_users_own_does_not_reach_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SLURM hands the shell's variables on to the job, where submitit would wait for another signal than it is sent."""
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    spec = JobSpec("gpt", tmp_path, order_of(wishes(tmp_path)).profile, ())
    submit.forget_overrides(batch.parameters(spec))
    assert "SUBMITIT_PREEMPT_SIGNAL" not in os.environ


def test_job_numbers_may_begin_anew(tmp_path: Path):
    jobs = JobDir.of(RunDir(tmp_path / "runs" / "gpt"))
    folders = [jobs.path / f"submitted-{number}" for number in range(2)]
    for folder in folders:
        folder.mkdir(parents=True)
        jobs.add(JobRecord(job_id="12", kind="train"), folder)
        assert jobs.folder("12").resolve() == folder
    assert [record.job_id for record in jobs.records()] == ["12", "12"]


def test_a_job_that_is_queued_is_written_down_before_anything_can_fail(tmp_path: Path):
    jobs = JobDir.of(RunDir(tmp_path / "runs" / "gpt"))
    jobs.folder("12").mkdir(parents=True)  # a folder in the link's place
    with pytest.raises(OSError, match="12"):
        jobs.add(JobRecord(job_id="12", kind="train"), jobs.path / "submitted")
    assert [record.job_id for record in jobs.records()] == ["12"]


@pytest.mark.parametrize("time", ["24h", "1d", "tomorrow", "24:00:00:00"])
def test_a_time_limit_that_is_none_is_refused(tmp_path: Path, time: str):
    with pytest.raises(ConfigError, match=f"--time '{time}' is not a time such as 90, 24:00:00 or 2-12:00:00"):
        order_of(wishes(tmp_path, time))


@pytest.mark.parametrize("time", ["", "90", "24:00:00", "2-12:00:00", "UNLIMITED"])
def test_time_limits(tmp_path: Path, time: str):
    assert order_of(wishes(tmp_path, time)).request.time == (time or None)


def test_variables_of_the_shell_do_not_beat_what_the_script_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """sbatch takes SBATCH_NO_REQUEUE over --requeue: the job would not come back. What the script leaves open stays."""
    for name in ("NO_REQUEUE", "REQUEUE", "SIGNAL", "TIMELIMIT", "JOB_NAME", "PARTITION", "ACCOUNT", "MEM_BIND"):
        monkeypatch.setenv(f"SBATCH_{name}", "mine")
    profile = order_of(wishes(tmp_path)).profile.model_copy(update={"partition": "gpu"})
    submit.forget_overrides(batch.parameters(JobSpec("gpt", tmp_path, profile, ())))
    assert {name for name in os.environ if name.startswith("SBATCH_")} == {"SBATCH_ACCOUNT", "SBATCH_MEM_BIND"}
