"""SLURM's commands: what they say, or their own error. Each has a time limit: they retry for minutes in silence.

A job's fate is asked of squeue first, then of scontrol, which knows jobs for some minutes after their end, and of
sacct only where it answers: many clusters keep no accounts.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmtrain.errors import SlurmError

_TIMEOUT_S = 30.0
_UNITS_S = (1, 60, 3600)


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

    @property
    def is_over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STOPPED")


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def call(command: Sequence[str], timeout_s: float = _TIMEOUT_S) -> str:
    """Standard output of one of SLURM's commands.

    Raises:
        SlurmError: it failed (with its own words), does not answer, or is not installed.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: not found; is this a login node of a SLURM cluster?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {timeout_s:.0f} s; is slurmctld running?") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()) or f"exit code {done.returncode}"
        raise SlurmError(said)
    return done.stdout


def queue(job_ids: Iterable[str]) -> dict[str, Queued]:
    """What SLURM says of these jobs; one that nobody remembers is left out.

    Raises:
        SlurmError: SLURM is not here or does not answer.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    roots = sorted({job_id.split("_")[0] for job_id in wanted})
    form = "%i|%T|%r|%N|%L|%S"
    found: dict[str, Queued] = {}
    for line in _lines(["squeue", "--noheader", "--array", f"--jobs={','.join(roots)}", f"--format={form}"], roots):
        job_id, state, reason, nodes, left, starts = line.split("|", 5)
        found[job_id] = Queued(
            job_id, state, "" if reason == "None" else reason, nodes,
            seconds(left) if state == "RUNNING" else None,
            float(starts) if state == "PENDING" and starts.isdigit() else None,
        )  # fmt: skip
    for job_id in wanted - found.keys():
        if (told := _told_by_scontrol(job_id) or _told_by_sacct(job_id)) is not None:
            found[job_id] = told
    return {job_id: told for job_id, told in found.items() if job_id in wanted}


def _lines(command: list[str], roots: list[str]) -> list[str]:
    """squeue refuses a single job that it has forgotten; among several it leaves that one out."""
    try:
        return call(command).splitlines()
    except SlurmError as error:
        if len(roots) == 1 and "Invalid job id" in str(error):
            return []
        raise


def _told_by_scontrol(job_id: str) -> Queued | None:
    fields = describe(job_id)
    if not fields:
        return None
    return Queued(job_id, fields["JobState"], _ending(fields), fields.get("NodeList", "").replace("(null)", ""))


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


def _ending(fields: dict[str, str]) -> str:
    code, _, number = fields.get("ExitCode", "0:0").partition(":")
    if number != "0":
        return f"signal {number}"
    return f"exit code {code}" if code != "0" else ""


def _told_by_sacct(job_id: str) -> Queued | None:
    if shutil.which("sacct") is None:
        return None
    try:
        said = call(["sacct", "--noheader", "--parsable2", "-X", f"--jobs={job_id}", "--format=State,ExitCode,NodeList"])
    except SlurmError:
        return None  # no accounts are kept: that is no error of the job's
    lines = [line.split("|") for line in said.splitlines() if line.strip()]
    if not lines:
        return None
    state, code, nodes = lines[-1]
    return Queued(job_id, state.split()[0], _ending({"ExitCode": code}), nodes)


def seconds(limit: str) -> float | None:
    """SLURM's "[days-]hours:minutes:seconds" (or "minutes:seconds", or "minutes") in seconds; None: no limit.

    Raises:
        ValueError: it is none of these.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE", "NOT_SET", "INVALID", "N/A"):
        return None
    matched = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", limit)
    if not matched:
        raise ValueError(f"{limit!r} is not a time such as 90, 24:00:00 or 2-12:00:00")
    days, clock = matched.groups()
    numbers = [int(number) for number in clock.split(":")]
    if days is not None:  # D-HH[:MM[:SS]]
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) == 1:
        numbers.append(0)
    return int(days or 0) * 86_400 + sum(n * unit for n, unit in zip(reversed(numbers), _UNITS_S, strict=False))


def end_time(job_id: str) -> float | None:
    """When the time limit ends this job; seconds since 1970. None without a limit."""
    told = queue([job_id]).get(job_id)
    return time.time() + told.left_s if told is not None and told.left_s is not None else None
