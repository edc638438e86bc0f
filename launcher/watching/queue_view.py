"""The jobs of runs, as they were submitted and as SLURM sees them now; for `llmtrain status` and what else asks."""

import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.display import duration, one_line, when
from launcher.jobs import JobDir, JobRecord, Kind, job_dirs, kept_going
from launcher.slurm import client
from launcher.slurm.client import Queued
from llmtrain.errors import EXIT_REQUEUE, SlurmError
from llmtrain.rundir import RunDir

_KINDS: tuple[Kind, ...] = ("train", "shard", "service")
_KEPT_S = 10.0
"""SLURM is not asked more often than that: --watch looks every two seconds, and every user's questions add up."""
_REASONS = {
    "BeginTime": "was requeued, and may start again soon",
    "Dependency": "waits for another job to end well",
    "DependencyNeverSatisfied": "the job that it waits for has failed: it will never start",
    "JobArrayTaskLimit": "waits for other tasks of its array",
    "JobHeldAdmin": "held by an administrator",
    "JobHeldUser": "held: scontrol release lets it go",
    "PartitionTimeLimit": "its time limit is longer than the partition's: it will never start",
    "Priority": "waits for jobs of higher priority",
    "Resources": "waits for free nodes",
}


@dataclass(frozen=True)
class Job:
    """The last one of its kind that was submitted for a run."""

    job_id: str
    kind: Kind
    cluster: str
    submitted: float
    after: str
    """The dependency, as sbatch was given it."""
    state: str | None
    """As SLURM calls it; None where SLURM has forgotten the job, or does not answer."""
    is_over: bool
    reason: str
    """Why it waits, or how it ended."""
    nodes: str
    left_s: float | None
    """Until the time limit, if it is running."""
    starts: float | None
    """When SLURM expects to start it; seconds since 1970."""

    @property
    def was_stopped(self) -> bool:
        """It saved and ended because it was asked to, which SLURM calls a failure."""
        return self.kind == "train" and self.state == "FAILED" and self.reason == f"exit code {EXIT_REQUEUE}"


@dataclass(frozen=True)
class Queue:
    """What is known of the jobs of several runs."""

    jobs: dict[Path, list[Job]]
    """By the absolute path of the run's folder."""
    problem: str | None
    """What SLURM said in place of an answer."""

    def of(self, run: RunDir) -> list[Job]:
        return self.jobs.get(run.path.absolute(), [])


def known_below(folder: Path) -> list[RunDir]:
    """Runs in a folder of runs that `is_known` is true of."""
    return [RunDir(jobs.path.parent.parent / jobs.name) for jobs in (*job_dirs(folder), *kept_going(folder))]


def is_known(run: RunDir) -> bool:
    """Whether a job was submitted for it, or `llmtrain run` keeps it going; it may have no folder of its own yet."""
    return was_submitted(run) or JobDir.of(run).is_kept_going()


def was_submitted(run: RunDir) -> bool:
    return JobDir.of(run).ledger.is_file()


def read_queue(runs: Iterable[RunDir]) -> Queue:
    """Asks SLURM once for all; not at all where no job was submitted for any of them."""
    records = {run.path.absolute(): _last_ones(JobDir.of(run)) for run in runs}
    ids = tuple(sorted({record.job_id for found in records.values() for record in found}))
    told, problem = _ask(ids, int(time.monotonic() // _KEPT_S)) if ids else ({}, None)
    jobs = {path: [_job(record, told.get(record.job_id)) for record in found] for path, found in records.items()}
    return Queue(jobs, problem)


def _last_ones(jobs: JobDir) -> list[JobRecord]:
    if not jobs.ledger.is_file():
        return []
    found = {record.kind: record for record in jobs.records()}
    return [found[kind] for kind in _KINDS if kind in found]


@functools.lru_cache(maxsize=1)
def _ask(ids: tuple[str, ...], moment: int) -> tuple[dict[str, Queued], str | None]:
    """Kept for a while: the moment is one of `_KEPT_S`."""
    del moment
    try:
        return client.queue(ids), None
    except SlurmError as error:
        return {}, one_line(str(error))


def _job(record: JobRecord, told: Queued | None) -> Job:
    return Job(
        job_id=record.job_id,
        kind=record.kind,
        cluster=record.cluster,
        submitted=record.time,
        after=record.after,
        state=None if told is None else told.state,
        is_over=told is not None and told.is_over,
        reason="" if told is None else told.reason,
        nodes="" if told is None else told.nodes,
        left_s=None if told is None else told.left_s,
        starts=None if told is None else told.starts,
    )


def outputs(run: RunDir, job_id: str) -> list[Path]:
    """What a job's nodes wrote, the newest last. The tasks of an array share a folder: others' output is there too."""
    found = JobDir.of(run).folder(job_id).glob(f"{job_id}_*.out")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def describe(job: Job, problem: str | None) -> tuple[str, str]:
    """A job in words, and their colour."""
    where = f" of {one_line(job.cluster)}" if job.cluster else ""
    name = f"job {one_line(job.job_id)}{where} ({job.kind}): "
    if job.state is None:
        if problem is not None:
            return f"{name}not known, because SLURM does not answer ({problem})", "yellow"
        return f"{name}over; SLURM has forgotten it (submitted {when(job.submitted)})", "dim"
    if job.was_stopped:
        return f"{name}saved and ended, as it was asked to", "dim"
    parts = [job.state.lower() + (f" on {one_line(job.nodes)}" if job.nodes else "")]
    if job.reason:
        parts.append(_REASONS.get(job.reason, one_line(job.reason)))
    if job.after and job.state == "PENDING":
        parts.append(f"submitted to start {one_line(job.after)}")
    if job.starts is not None:
        parts.append(f"expected to start {when(job.starts)}")
    if job.left_s is not None:
        parts.append(f"{duration(job.left_s)} until its time limit")
    colours = {"RUNNING": "green", "PENDING": "yellow", "COMPLETED": "dim", "CANCELLED": "dim"}
    return name + ", ".join(parts), colours.get(job.state, "red" if job.is_over else "yellow")


def word(jobs: Sequence[Job], problem: str | None, now: float) -> str:
    """For a column: the job that matters most, in short."""
    alive = [job for job in jobs if not job.is_over and job.state is not None]
    if not jobs or (not alive and problem is None and jobs[0].state is None):
        return ""
    job = (alive or list(jobs))[0]
    name = job.job_id if job.kind == "train" else f"{job.job_id} {job.kind}"
    if job.state is None:
        return f"{name} ?"
    how = f", starts in {duration(job.starts - now)}" if job.starts is not None else ""
    how = f", {duration(job.left_s)} left" if job.left_s is not None else how
    return one_line(f"{name} {job.state.lower()}{how}")


def failure(run: RunDir, jobs: Sequence[Job]) -> str | None:
    """What a person should look at: training's last job ended badly."""
    job = next((job for job in jobs if job.kind == "train"), None)
    if job is None or job.state in (None, "COMPLETED", "CANCELLED") or not job.is_over or job.was_stopped:
        return None
    written = outputs(run, job.job_id)
    seen = f"; its output: {written[-1]}" if written else ""
    return f"job {job.job_id} ended: {(job.state or '').lower()}{', ' + job.reason if job.reason else ''}{seen}"
