"""Jobs that were submitted, written down beside the runs: they are there before a run folder is.

DIR/.jobs/NAME/             for the run DIR/NAME
    jobs.jsonl              one line per job, in the order of submission
    submitted-TIME/         its configuration as it was then, its script, each node's output (JOB_NODE_log.out);
                            the first node's also holds what the script itself and SLURM say
    JOB                     a link to that
    start-JOB-R/            of its R-th start: where its nodes meet, what each rank said
    progress.json           how far it was at the last start
    stop                    asks the job to save, to end, and not to come back
    local/                  of `llmtrain run` on this machine: its lock, and what each rank said
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from llmtrain import jsonl, locks
from llmtrain.rundir import RunDir

JOBS = ".jobs"

Kind = Literal["train", "shard", "service"]


class JobRecord(BaseModel):
    """One job, as it was submitted."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    job_id: str
    """As SLURM counts: "123", or "123_4" for the fourth of an array."""
    kind: Kind
    nodes: int = 1
    ranks_per_node: int = 1
    cluster: str = ""
    """Name of the cluster profile."""
    after: str = ""
    """The dependency, as sbatch was given it."""
    options: list[str] = []
    """Of `llmtrain submit`, but for what it is to train: for the command that submits the run again."""
    time: float = Field(default_factory=time.time)


@dataclass(frozen=True)
class JobDir:
    """Where the jobs of one name are written down."""

    path: Path

    @staticmethod
    def of(run: RunDir) -> "JobDir":
        return JobDir(run.path.absolute().parent / JOBS / run.path.name)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def ledger(self) -> Path:
        return self.path / "jobs.jsonl"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def local(self) -> Path:
        return self.path / "local"

    @property
    def local_lock(self) -> Path:
        """Held by `llmtrain run`, from before its ranks are there until none is started again."""
        return self.local / "lock"

    def is_kept_going(self) -> bool:
        """Whether `llmtrain run` keeps the run going; whether a rank trains, the run's own lock tells."""
        return locks.is_held(self.local_lock)

    def records(self) -> list[JobRecord]:
        """In the order of submission; empty where nothing was submitted."""
        return [JobRecord.model_validate(line) for line in jsonl.read(self.ledger)]

    def last(self, kind: Kind) -> JobRecord | None:
        return next((record for record in reversed(self.records()) if record.kind == kind), None)

    def add(self, record: JobRecord, folder: Path | None = None) -> None:
        """Write down a job. `folder` is where its script and its output lie, if that has another name."""
        self.path.mkdir(parents=True, exist_ok=True)
        jsonl.append(self.ledger, [record.model_dump()])  # first: a job that is queued must be known
        if folder is not None:
            link = self.path / record.job_id
            link.unlink(missing_ok=True)  # of an earlier job: numbers begin anew on a cluster that was set up again
            link.symlink_to(os.path.relpath(folder, self.path))

    def folder(self, job_id: str) -> Path:
        """With the script and the output of one job. The jobs of an array share one."""
        return self.path / job_id

    def start(self, job_id: str, restart: int) -> Path:
        """Of one start of a job: SLURM counts the restarts."""
        return self.path / f"start-{job_id}-{restart}"

    def starts(self, job_id: str = "*") -> list[Path]:
        """Of one job, the last one last; by default of all jobs."""
        found = self.path.glob(f"start-{job_id}-*")
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def job_dirs(folder: Path) -> list[JobDir]:
    """All that were written down in a folder of runs (DIR), and in the folders of runs right below it (sweeps).

    Looks no deeper: runs hold thousands of files.
    """
    return [JobDir(ledger.parent) for ledger in _find(folder, "jobs.jsonl")]


def kept_going(folder: Path) -> list[JobDir]:
    """Those that `llmtrain run` keeps going now, in the same places; they may have no run folder yet."""
    return [JobDir(lock.parent.parent) for lock in _find(folder, "local/lock") if locks.is_held(lock)]


def _find(folder: Path, file: str) -> list[Path]:
    return sorted([*folder.glob(f"{JOBS}/*/{file}"), *folder.glob(f"*/{JOBS}/*/{file}")])
