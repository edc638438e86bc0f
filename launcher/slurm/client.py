"""SLURM's commands: what they say, or their own error. Each has a time limit: they retry for minutes in silence.

A job's fate is asked of squeue, which knows jobs for some minutes after their end, then of sacct where that answers:
many clusters keep no accounts.
"""

import collections
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from launcher.walltime import seconds
from llmtrain.errors import SlurmError

_TIMEOUT_S = 30.0
_PING_S = 5.0
_OVER = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
)  # fmt: skip
NEVER_STARTS = "DependencyNeverSatisfied"
"""Reason of a job that was submitted to start after another one, which can no longer end as it was to."""
NO_OUTPUT = "SLURM could not open its output (signal 53)"
"""How a job ended that could not even begin."""
_MOST_ALIVE = ("RUNNING", "COMPLETING", "CONFIGURING", "PENDING")
"""An array has the first of these states that any of its tasks has."""
_HABITS = ("SQUEUE_", "SACCT_", "SCONTROL_", "SINFO_")
"""Variables in which people keep options of their own: they would change what is read here."""


@dataclass(frozen=True)
class Queued:
    """What SLURM says of a job."""

    job_id: str
    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, PREEMPTED, REQUEUED..."""
    reason: str = ""
    """Why it waits, or how it ended."""
    nodes: str = ""
    left_s: float | None = None
    """Until the time limit, if it is running."""
    starts: float | None = None
    """When SLURM expects to start it; seconds since 1970."""
    from_accounts: bool = False
    """Told by sacct, which holds no reason why a job was cancelled."""

    @property
    def is_over(self) -> bool:
        return self.state in _OVER


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def call(command: Sequence[str], timeout_s: float = _TIMEOUT_S, any_code: bool = False) -> str:
    """Standard output of one of SLURM's commands.

    Args:
        any_code: an exit code other than 0 is no error.

    Raises:
        SlurmError: it failed (with its own words), does not answer, or is not installed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_HABITS)}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**environment, "SLURM_TIME_FORMAT": "%s"},
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: not found; is this a login node of a SLURM cluster?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {timeout_s:.0f} s; is slurmctld running?") from None
    if done.returncode and not any_code:
        said = (done.stderr.strip() or done.stdout.strip()) or f"exit code {done.returncode}"
        raise SlurmError(said)
    return done.stdout


def queue(job_ids: Iterable[str]) -> dict[str, Queued]:
    """What SLURM says of these jobs; one that nobody remembers is left out.

    An array asked for as a whole ("123") has the state of its liveliest task, and as reason how many are in which.

    Raises:
        SlurmError: SLURM is not here or does not answer.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    _ping()
    known = _ask_squeue(wanted)
    found = {job_id: job for job_id in wanted if (job := _of(job_id, known)) is not None}
    if forgotten := [job_id for job_id in wanted if job_id not in found]:
        known = _ask_sacct(forgotten)
        found |= {job_id: job for job_id in forgotten if (job := _of(job_id, known)) is not None}
    return found


def _ping() -> None:
    """Ask first whether SLURM answers: if not, the other commands would retry for half a minute."""
    if "is UP" not in (said := call(["scontrol", "ping"], _PING_S, any_code=True)):
        raise SlurmError(f"slurmctld does not answer: {' '.join(said.split('*')[0].split()) or 'scontrol ping failed'}")


def _of(job_id: str, known: dict[str, Queued]) -> Queued | None:
    """Of a job, or of all tasks of an array together."""
    tasks = [job for each, job in known.items() if each.startswith(f"{job_id}_")]
    if job_id in known or not tasks:
        return known.get(job_id)
    counts = collections.Counter(job.state for job in tasks)
    failed = sorted(counts.keys() - {*_MOST_ALIVE, "COMPLETED"})
    ordered = [state for state in (*_MOST_ALIVE, *failed, "COMPLETED") if state in counts]
    state = ordered[0]
    alike = [job for job in tasks if job.state == state]
    return Queued(
        job_id,
        state,
        reason=", ".join(f"{counts[each]} {each.lower()}" for each in ordered),
        nodes=",".join(dict.fromkeys(job.nodes for job in alike if job.nodes)),
        left_s=max((job.left_s for job in alike if job.left_s is not None), default=None),
        starts=min((job.starts for job in alike if job.starts is not None), default=None),
        from_accounts=all(job.from_accounts for job in alike),
    )


def _ask_squeue(wanted: Iterable[str]) -> dict[str, Queued]:
    """With all tasks of their arrays."""
    roots = sorted({job_id.split("_")[0] for job_id in wanted})
    words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(roots)}"]
    try:
        lines = call([*words, "--format=%i|%T|%r|%N|%L|%S"]).splitlines()
    except SlurmError as error:
        if len(roots) == 1 and "Invalid job id" in str(error):
            return {}  # among several it leaves out one that it has forgotten
        raise
    found: dict[str, Queued] = {}
    for line in lines:
        if line.count("|") < 5:
            continue  # a notice of the site's
        job_id, state, reason, nodes, left, starts = line.split("|", 5)
        found[job_id] = Queued(
            job_id,
            state,
            reason="" if reason == "None" else reason,
            nodes=nodes,
            left_s=seconds(left) if state == "RUNNING" else None,
            starts=float(starts) if state == "PENDING" and starts.isdigit() else None,
        )
    for job_id, job in found.items():
        if job.is_over and job.reason != NEVER_STARTS:  # squeue's other reasons are what it waited for
            code = describe(job_id).get("ExitCode", "") if job.state == "FAILED" else ""
            found[job_id] = replace(job, reason=_exit(code))
    return found


def _exit(code: str) -> str:
    """Of SLURM's "code:signal"."""
    number, _, killed = code.partition(":")
    if killed == "53":
        return NO_OUTPUT
    if killed not in ("", "0"):
        return f"signal {killed}"
    return f"exit code {number}" if number not in ("", "0") else ""


def describe(job_id: str) -> dict[str, str]:
    """All that scontrol says of a job, by its names; empty when it has forgotten the job."""
    try:
        said = call(["scontrol", "--oneliner", "show", "job", job_id])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    lines = [line for line in said.splitlines() if line.startswith("JobId=")]
    fields = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    if "_" in job_id:
        task = job_id.split("_")[1]
        fields = [each for each in fields if each.get("ArrayTaskId") == task]
    return fields[0] if fields else {}


def _ask_sacct(wanted: Iterable[str]) -> dict[str, Queued]:
    if shutil.which("sacct") is None:
        return {}
    words = ["sacct", "--noheader", "--parsable2", "-X", f"--jobs={','.join(wanted)}"]
    try:
        said = call([*words, "--format=JobID,State,ExitCode,NodeList"])
    except SlurmError:
        return {}  # no accounts are kept: that is no error of the job's
    found: dict[str, Queued] = {}
    for line in said.splitlines():
        if line.count("|") < 3:
            continue
        job_id, state, code, nodes = line.split("|", 3)
        where = "" if nodes == "None assigned" else nodes
        found[job_id] = Queued(job_id, state.split()[0], _exit(code), where, from_accounts=True)
    return found


def end_time(job_id: str) -> float | None:
    """When the time limit ends this job; seconds since 1970. None without a limit."""
    job = queue([job_id]).get(job_id)
    return time.time() + job.left_s if job is not None and job.left_s is not None else None
