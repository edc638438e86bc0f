"""The jobs of runs, as they were submitted and as SLURM sees them now; for `llmtrain status` and what else asks."""

import contextlib
import functools
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher.display import duration, one_line, when
from launcher.jobs import JobDir, JobRecord, Kind, job_dirs, kept_going
from launcher.keeper.meeting import Meeting
from launcher.runs import find_runs, runs_below
from launcher.slurm import client
from launcher.slurm.client import NEVER_STARTS, NO_OUTPUT, Queued
from llmtrain.errors import EXIT_REQUEUE, RunFolderError, SlurmError
from llmtrain.rundir import RunDir

_KINDS: tuple[Kind, ...] = ("train", "shard", "service")
_KEPT_S = 10.0
"""SLURM is not asked more often than that: --watch looks every two seconds, and every user's questions add up."""
_REASONS = {
    "BeginTime": "was requeued, and may start again soon",
    "Dependency": "waits for another job to end well",
    NEVER_STARTS: "the job that it waits for has failed: it will never start",
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
    """As SLURM calls it; None where SLURM has forgotten the job, or does not answer. FAILED also where SLURM has
    forgotten it, and the job's own files hold its exit code."""
    is_over: bool
    reason: str
    """Why it waits, or how it ended."""
    nodes: str
    left_s: float | None
    """Until the time limit, if it is running."""
    starts: float | None
    """When SLURM expects to start it; seconds since 1970."""
    blocked_by: str = ""
    """How the job ended that it waited for in vain; empty where it did not, or where that is not known."""
    from_accounts: bool = False
    """Told by sacct, not by squeue."""
    was_asked: bool = False
    """`llmtrain stop` has asked its last start to end."""

    @property
    def may_be_blocked(self) -> bool:
        """Accounts hold no reason: there it looks as if a person had cancelled it. squeue's reason tells them apart."""
        return self.reason == NEVER_STARTS or (self.from_accounts and self.state == "CANCELLED" and self.after != "")

    @property
    def was_stopped(self) -> bool:
        """It ended with "run me again": because `llmtrain stop` asked it to, or where it must not requeue itself. SLURM
        calls that a failure."""
        return self.kind == "train" and self.state == "FAILED" and self.reason == f"exit code {EXIT_REQUEUE}"


@dataclass(frozen=True)
class Queue:
    """What is known of the jobs of several runs."""

    jobs: dict[Path, list[Job]]
    """By the absolute path of the run's folder."""
    problem: str | None
    """What SLURM said in place of an answer."""
    damaged: dict[Path, str] = field(default_factory=dict[Path, str])
    """Why the jobs of a run are not known, by the same path."""

    def of(self, run: RunDir) -> list[Job]:
        return self.jobs.get(run.path.absolute(), [])


def find_submitted(paths: Sequence[Path]) -> list[RunDir]:
    """As `find_runs`, with those that have jobs in the queue, or are being started here, and no folder yet.

    Raises:
        RunFolderError: there is no run in one of these places, and none is on its way there.
    """
    found: dict[Path, RunDir] = {}
    for path in paths or [Path("runs")]:
        runs = [RunDir(path)] if is_known(RunDir(path)) else _known_below(path)
        if not runs or runs_below(path):
            runs += find_runs([path] if paths else [])
        for run in sorted(runs, key=lambda run: run.path):
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


def _known_below(folder: Path) -> list[RunDir]:
    """Runs in a folder of runs that `is_known` is true of."""
    return [RunDir(jobs.path.parent.parent / jobs.name) for jobs in (*job_dirs(folder), *kept_going(folder))]


def is_known(run: RunDir) -> bool:
    """Whether a job was submitted for it, or `llmtrain run` keeps it going; it may have no folder of its own yet."""
    jobs = JobDir.of(run)
    return jobs.ledger.is_file() or jobs.is_kept_going()


def read_queue(runs: Iterable[RunDir]) -> Queue:
    """Asks SLURM once for all; not at all where no job was submitted for any of them. A second time where jobs can
    never start: about those that they waited for."""
    records: dict[Path, list[JobRecord]] = {}
    damaged: dict[Path, str] = {}
    for run in runs:
        try:
            records[run.path.absolute()] = _last_ones(JobDir.of(run))
        except RunFolderError as error:
            damaged[run.path.absolute()] = str(error)
    answers, problem = _ask_about(record.job_id for found in records.values() for record in found)
    jobs: dict[Path, list[Job]] = {}
    for path, found in records.items():
        run, seen = RunDir(path), [_job(record, answers.get(record.job_id)) for record in found]
        if problem is None:
            seen = [_remembered(run, job) if job.state is None else job for job in seen]
        jobs[path] = [replace(job, was_asked=_was_asked(run, job)) for job in seen]
    return Queue(_with_blockers(jobs), problem, damaged)


def _was_asked(run: RunDir, job: Job) -> bool:
    if not job.was_stopped:
        return False
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads(JobDir.of(run).progress.read_text())
        return noted.get("job") == job.job_id and noted.get("asked", False)
    return False


def _remembered(run: RunDir, job: Job) -> Job:
    """A job that SLURM has forgotten, with its failure where its own files hold one. A stop they do not tell from a
    return to the queue."""
    starts = JobDir.of(run).starts(job.job_id) if job.kind == "train" else []
    if not starts:
        return job
    ended = starts[-1].stat().st_mtime
    if ended < job.submitted or (run.metrics.exists() and run.metrics.stat().st_mtime > ended):
        return job  # of an older job of that number: a cluster that is set up again counts anew; or trained since
    code = _final_code(Meeting(starts[-1]))
    if code in (None, 0, EXIT_REQUEUE):
        return job
    return replace(job, state="FAILED", is_over=True, reason=f"exit code {code}")


def _final_code(meeting: Meeting) -> int | None:
    """What the first node decided last; None where it did not come so far."""
    if meeting.told("begin", 0).get(0, 0.0) is None:
        return 1  # it had ended too often without a new checkpoint
    attempt, decision = 0, None
    while decisions := meeting.told("decision", attempt):
        attempt, decision = attempt + 1, decisions[0]
    return None if decision is None or decision["again"] else decision["code"]


def _with_blockers(jobs: dict[Path, list[Job]]) -> dict[Path, list[Job]]:
    chains = {
        (path, job.job_id): _waited_for(JobDir.of(RunDir(path)).records(), job.after)
        for path, found in jobs.items()
        for job in found
        if job.may_be_blocked
    }
    answers, _ = _ask_about(job_id for chain in chains.values() for job_id in chain)
    blockers = {key: _blocker(RunDir(key[0]), chain, answers) for key, chain in chains.items()}
    return {
        path: [replace(job, blocked_by=blockers.get((path, job.job_id), "")) for job in found]
        for path, found in jobs.items()
    }


def _waited_for(records: Sequence[JobRecord], after: str) -> list[str]:
    """Jobs that had to end well, and those before them in turn where they were submitted for the same run; the first
    of all first."""
    found: list[str] = []
    for part in re.split("[,?]", after):
        if not part.startswith(("afterok:", "aftercorr:")):
            continue
        for wanted in re.findall(r":(\d+(?:_\d+)?)", part):
            tasks = [n for n, record in enumerate(records) if f"{record.job_id}_".startswith(f"{wanted}_")]
            if tasks:
                found += _waited_for(records[: tasks[0]], records[tasks[0]].after)
            found += [records[number].job_id for number in tasks] or [wanted]
    return found


def _blocker(run: RunDir, chain: Sequence[str], answers: Mapping[str, Queued]) -> str:
    """How the first one of them ended that failed, or else that was cancelled."""
    over = [found for job_id in chain if (found := answers.get(job_id)) is not None and found.is_over]
    failed = [found for found in over if found.state not in ("COMPLETED", "CANCELLED")]
    cancelled = [found for found in over if found.state == "CANCELLED"]
    return next((_ending(run, each.job_id, each.state, each.reason) for each in (*failed, *cancelled)), "")


def _last_ones(jobs: JobDir) -> list[JobRecord]:
    if not jobs.ledger.is_file():
        return []
    found = {record.kind: record for record in jobs.records()}
    return [found[kind] for kind in _KINDS if kind in found]


def _ask_about(job_ids: Iterable[str]) -> tuple[Mapping[str, Queued], str | None]:
    ids = tuple(sorted(set(job_ids)))
    return _ask(ids, int(time.monotonic() // _KEPT_S)) if ids else ({}, None)


@functools.lru_cache(maxsize=2)
def _ask(ids: tuple[str, ...], _moment: int) -> tuple[dict[str, Queued], str | None]:
    """Cached for `_KEPT_S`: `_moment` is the time in that unit, and part of the cache's key."""
    try:
        return client.queue(ids), None
    except SlurmError as error:
        return {}, one_line(str(error))


def _job(record: JobRecord, queued: Queued | None) -> Job:
    return Job(
        job_id=record.job_id,
        kind=record.kind,
        cluster=record.cluster,
        submitted=record.time,
        after=record.after,
        state=None if queued is None else queued.state,
        is_over=queued is not None and queued.is_over,
        reason="" if queued is None else queued.reason,
        nodes="" if queued is None else queued.nodes,
        left_s=None if queued is None else queued.left_s,
        starts=None if queued is None else queued.starts,
        from_accounts=queued is not None and queued.from_accounts,
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
    if job.was_asked:
        return f"{name}ended, as 'llmtrain stop' asked it to", "dim"
    if job.was_stopped:
        return f"{name}ended before training was finished ({job.reason})", "yellow"
    parts = [job.state.lower() + (f" on {one_line(job.nodes)}" if job.nodes else "")]
    if job.reason:
        parts.append(_REASONS.get(job.reason, one_line(job.reason)))
    if job.after and (job.state == "PENDING" or job.reason == NEVER_STARTS):
        parts.append(f"submitted to start {one_line(job.after)}")
    if job.starts is not None:
        parts.append(f"expected to start {when(job.starts)}")
    if job.left_s is not None:
        parts.append(f"{duration(job.left_s)} until its time limit")
    colours = {"RUNNING": "green", "PENDING": "yellow", "COMPLETED": "dim", "CANCELLED": "dim"}
    colour = "red" if job.reason == NEVER_STARTS else colours.get(job.state, "red" if job.is_over else "yellow")
    return name + ", ".join(parts), colour


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
    return one_line(f"{name} {'stopped' if job.was_stopped else job.state.lower()}{how}")


def failure(run: RunDir, jobs: Sequence[Job]) -> str | None:
    """What a person should look at: the last job of training or of sharding ended badly, or can never start."""
    for job in jobs:
        if job.kind == "service":
            continue
        if job.reason == NEVER_STARTS or job.blocked_by:
            after = job.after or "after another one"
            why = job.blocked_by or "that can no longer be"
            return f"job {job.job_id} never starts: it was submitted to start {after}, and {why}"
        if job.was_stopped and not job.was_asked:
            again = "submit the run again, and it goes on from its newest checkpoint"
            return f"job {job.job_id} ended before training was finished, and does not come back: {again}"
        if job.state not in (None, "COMPLETED", "CANCELLED") and job.is_over and not job.was_stopped:
            return _ending(run, job.job_id, job.state or "", job.reason)
    return None


def _ending(run: RunDir, job_id: str, state: str, reason: str) -> str:
    if reason == NO_OUTPUT:
        folder = JobDir.of(run).folder(job_id)
        return f"job {job_id} ended: {reason} in {folder}: is it there, is the disk full? Then submit again"
    written = [path for path in outputs(run, job_id) if path.stat().st_size]
    seen = f"; its output: {written[-1]}" if written else ""
    why = f", {_REASONS.get(reason, reason)}" if reason else ""
    return f"job {job_id} ended: {state.lower()}{why}{seen}"
