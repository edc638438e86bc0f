"""Which jobs train a run: those that were submitted for it, and scripts that were given to sbatch itself."""

import contextlib
from collections.abc import Sequence

from launcher.jobs import JobDir
from launcher.slurm import client
from launcher.slurm.client import Queued
from llmtrain.errors import SlurmError

_SKEW_S = 60.0
"""Between the clocks of a node, of SLURM's controller, and of the file server."""


def numbers(jobs: JobDir) -> list[str]:
    """Of all that were written down, and of the last one that has started without that; the newest last."""
    found = [record.job_id for record in jobs.records() if record.kind == "train"]
    return [*found, *_unwritten(jobs)]


def _unwritten(jobs: JobDir) -> list[str]:
    written = {record.job_id for record in jobs.records()}
    started = [(path.stat().st_mtime, _number(path.name)) for path in jobs.starts()]
    return [number for _, number in sorted(started)[-1:] if number not in written]


def _number(start: str) -> str:
    """From start-JOB-R."""
    return start.removeprefix("start-").rpartition("-")[0]


def alive(jobs: JobDir, job_ids: Sequence[str]) -> list[Queued]:
    """Those that run, or wait.

    Raises:
        SlurmError: SLURM does not say.
    """
    unwritten = _unwritten(jobs)
    found = [job for job in client.queue(job_ids).values() if not job.is_over]
    return [job for job in found if job.job_id not in unwritten or _is_the_one(jobs, job)]


def _is_the_one(jobs: JobDir, job: Queued) -> bool:
    """Not another of the same number, on a cluster that was set up again: it has been here since it started."""
    said = client.describe(job.job_id)
    if job.state == "PENDING":
        return said.get("Restarts", "0") != "0"
    started = said.get("StartTime", "")
    newest = max(path.stat().st_mtime for path in jobs.starts(job.job_id))
    return started.isdigit() and newest > float(started) - _SKEW_S


def ended(jobs: JobDir) -> Queued | None:
    """The last one, where SLURM knows that it is over."""
    last = numbers(jobs)[-1:]
    with contextlib.suppress(SlurmError):
        return next((job for job in client.queue(last).values() if job.is_over), None)
    return None
