"""What is written down of jobs where something fails in between; without SLURM (tests/slurm/test_submit.py has one)."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.checks import preflight
from launcher.jobs import JobDir, JobRecord
from launcher.slurm import batch
from launcher.slurm.batch import JobSpec
from launcher.submitting import dependencies, submit
from launcher.submitting.command import act
from launcher.submitting.order import Order, order_of
from launcher.submitting.variables import forget_overrides
from llmtrain.errors import ConfigError, SlurmError
from llmtrain.rundir import RunDir
from tests.support.jobs import Slurm


def order(tmp_path: Path, time: str = "", more: str = "") -> Order:
    profile = tmp_path / "c.yaml"
    profile.write_text(f"gpus_per_node: 0\n{more}")
    return order_of(profile, 1, None, None, time)


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
        submit.submit(words, order(tmp_path), sweep, True, Console())
    said = str(caught.value)
    assert "QOSMaxSubmitJobPerUserLimit" in said
    assert "Training is queued (7_0, 7_1, 7_2), and 1 of 3 services are" in said
    assert "python -m llmtrain.service --run" in said
    runs = sorted((tmp_path / "runs/sweep/.jobs").glob("*/jobs.jsonl"))
    found = [[(record.job_id, record.kind) for record in JobDir(ledger.parent).records()] for ledger in runs]
    assert found == [[("7_0", "train"), ("8", "service")], [("7_1", "train")], [("7_2", "train")]]


def test_a_run_that_is_submitted_again_is_not_stopped_by_an_older_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And the job that is queued knows how long before its limit the signal comes."""
    queued: list[Any] = []

    def queue_jobs(_: JobSpec, jobs: Sequence[Any]) -> list[str]:
        queued.extend(jobs)
        return ["8"]

    monkeypatch.setattr(submit, "queue_jobs", queue_jobs)
    monkeypatch.setattr(preflight, "check", lambda *_: [])
    stop_file = JobDir.of(RunDir(tmp_path / "runs" / "gpt")).stop
    stop_file.parent.mkdir(parents=True)
    stop_file.touch()
    words, asked = [f"run.dir={tmp_path}/runs", "run.name=gpt"], order(tmp_path, more="signal_s: 77\n")
    [record] = submit.submit(words, asked, [], False, Console())
    assert (record.job_id, stop_file.exists()) == ("8", False)
    job = queued[0]
    assert (job.rules.lead_s, job.rules.may_requeue) == (77, True)
    assert "--lead 77" in submit.preview(words, asked, [], plain=True)
    submit.submit([*words, "run.name=once"], order(tmp_path, more="requeue: false\n"), [], False, Console())
    assert not queued[-1].rules.may_requeue


def test_a_signal_of_the_users_own_does_not_reach_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SLURM hands the shell's variables on to the job, where submitit would wait for another signal than it is sent."""
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    spec = JobSpec("gpt", tmp_path, order(tmp_path).profile)
    forget_overrides(batch.parameters(spec))
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
        order(tmp_path, time)


@pytest.mark.parametrize("time", ["", "90", "24:00:00", "2-12:00:00", "UNLIMITED"])
def test_time_limits(tmp_path: Path, time: str):
    assert order(tmp_path, time).time == time


@pytest.mark.parametrize(("time", "minutes"), [("0:90", 2), ("2:00", 2), ("1:00:01", 61), ("90", 90)])
def test_a_job_has_all_of_the_time_that_was_asked_for(tmp_path: Path, time: str, minutes: int):
    """submitit takes whole minutes."""
    assert JobSpec("gpt", tmp_path, order(tmp_path).profile, time=time).minutes == minutes


def test_variables_of_the_shell_do_not_beat_what_the_script_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """sbatch takes SBATCH_NO_REQUEUE over --requeue: the job would not come back. What the script leaves open stays."""
    for name in ("NO_REQUEUE", "REQUEUE", "SIGNAL", "TIMELIMIT", "JOB_NAME", "PARTITION", "ACCOUNT", "MEM_BIND"):
        monkeypatch.setenv(f"SBATCH_{name}", "mine")
    profile = order(tmp_path).profile.model_copy(update={"partition": "gpu"})
    forget_overrides(batch.parameters(JobSpec("gpt", tmp_path, profile)))
    assert {name for name in os.environ if name.startswith("SBATCH_")} == {"SBATCH_ACCOUNT", "SBATCH_MEM_BIND"}


ALWAYS = ["GPUS", "GPUS_PER_NODE", "GRES", "ARRAY_INX", "WAIT", "OPEN_MODE", "OUTPUT", "ERROR"]
MEMORY = ["MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"]


@pytest.mark.parametrize("more", ["", "mem: 64G\nextra: {reservation: mine}\n"])
def test_nor_do_those_of_gpus_memory_and_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str):
    for name in (*ALWAYS, *MEMORY, "RESERVATION"):
        monkeypatch.setenv(f"SBATCH_{name}", "1")
    forget_overrides(batch.parameters(JobSpec("gpt", tmp_path, order(tmp_path, more=more).profile)))
    left = {name.removeprefix("SBATCH_") for name in os.environ if name.startswith("SBATCH_")}
    assert left == (set() if more else {*MEMORY, "RESERVATION"})


def test_in_an_allocation_its_variables_are_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A job with two settings of its memory dies at its start; submitit reads which job it is from the others."""
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "MEM_PER_CPU", "NTASKS", "CONF", "CLUSTERS"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    forget_overrides(batch.parameters(JobSpec("gpt", tmp_path, order(tmp_path).profile)))
    assert {name for name in os.environ if name.startswith("SLURM_")} == {"SLURM_CONF", "SLURM_CLUSTERS"}


@pytest.mark.parametrize("plain", [False, True])
def test_the_script_starts_python_with_its_own_environment(tmp_path: Path, plain: bool):
    """Where sbatch was told --export=NONE, srun would start it with none."""
    profile = order(tmp_path, more="environment: {A: b}\nextra: {hold: '', nice: 5}\n").profile
    spec = JobSpec("gpt", tmp_path, profile)
    script = (batch.render_plain(spec, ["node"]) if plain else batch.render(spec)).splitlines()
    setup = script.index("# setup")
    assert script[setup + 1 : setup + 3] == ["unset SLURM_EXPORT_ENV", "export A=b"]
    assert {"#SBATCH --hold", "#SBATCH --nice=5"} <= set(script)


# After other jobs


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("", ""),
        ("4711", "afterok:4711"),
        ("4711,4712", "afterok:4711:4712"),
        ("4711, 4712:4713_2", "afterok:4711:4712:4713_2"),
        ("afterany:4711:4712", "afterany:4711:4712"),
        ("after:1+10,afternotok:2?singleton", "after:1+10,afternotok:2?singleton"),
    ],
)
def test_after(after: str, expected: str):
    assert dependencies.parse(after) == expected


@pytest.mark.parametrize("after", ["gpt", "4711;4712", "afterok:gpt", "afterok:4711,4712", "afterever:1", "afterok:"])
def test_after_what_is_neither_a_job_nor_a_dependency(after: str):
    with pytest.raises(ConfigError, match=f"--after {after}: write a job's number"):
        dependencies.parse(after)


def test_after_a_job_that_slurm_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Slurm(tmp_path / "bin", monkeypatch).queued("4711|RUNNING|None|n1|1:00|1", "4712_0|COMPLETED|None|n1|1:00|1")
    assert dependencies.check_known("afterok:4711:4712_0,after:4711+10") == []
    [found] = dependencies.check_known("afterok:4711:4799")
    assert (found.severity, found.message) == (
        "warning", "SLURM does not know job 4799, and does not wait for it: is the number right?",
    )  # fmt: skip


# Names


def test_a_folder_that_slurm_would_look_for_elsewhere(tmp_path: Path):
    words = [f"run.dir={tmp_path}/100%j", "run.name=gpt"]
    with pytest.raises(ConfigError, match=r"100%j/.jobs/gpt: SLURM takes % in a path for the start of a pattern"):
        submit.preview(words, order(tmp_path), [], plain=False)


def test_names_of_a_sweep_are_names_of_runs(tmp_path: Path):
    words = [f"run.dir={tmp_path}/runs", "run.name=gpt"]
    [training] = submit.plan_runs(words, ["optim.lr=1e+1", f"data.dir=é/{'b' * 200}"])
    assert training.run.path.name == f"00-lr_1e_1-dir___{'b' * 83}"


def test_the_runs_of_a_sweep_do_not_share_a_repository():
    with pytest.raises(ConfigError, match=r"--sweep with hub.repo=me/gpt: a repository holds one run; leave it out"):
        submit.plan_runs(["hub.repo=me/gpt"], ["optim.lr=1e-3,1e-2"])


def test_a_sweep_keeps_lists_whole(tmp_path: Path):
    runs = submit.plan_runs([f"run.dir={tmp_path}"], ["optim.betas=[0.9,0.95],[0.9,0.99]", "optim.lr=1e-3,1e-2"])
    found = [(list(training.config.optim.betas), training.config.optim.lr) for training in runs]
    assert found == [([0.9, 0.95], 1e-3), ([0.9, 0.95], 1e-2), ([0.9, 0.99], 1e-3), ([0.9, 0.99], 1e-2)]


@pytest.mark.parametrize(("at_once", "limit"), [(2, 2), (300, 300), (None, 301)])
def test_how_many_runs_of_a_sweep_train_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], at_once: int | None, limit: int
):
    """submitit by itself lets 256 jobs of an array run."""
    sweep = ["run.seed=" + ",".join(map(str, range(301)))]
    act([f"run.dir={tmp_path}"], replace(order(tmp_path), at_once=at_once), sweep, False, dry_run=True, plain=False)
    assert f"#SBATCH --array=0-300%{limit}\n" in capsys.readouterr().out


def test_at_once_is_for_a_sweep(tmp_path: Path):
    with pytest.raises(ConfigError, match="--at-once: it is for the runs of a sweep, and there is no --sweep"):
        act([], replace(order(tmp_path), at_once=2), [], False, dry_run=True, plain=False)
