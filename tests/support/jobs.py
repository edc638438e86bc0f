"""Jobs of runs, written down as `llmtrain submit` does, and a SLURM that says what a test wants."""

from pathlib import Path

import pytest

from launcher.jobs import JobDir, JobRecord, Kind
from launcher.watching import queue_view
from launcher.watching.status import RunStatus, read_status
from llmtrain.rundir import RunDir


def submitted(run: RunDir, job_id: str, kind: Kind = "train", after: str = "") -> JobDir:
    jobs = JobDir.of(run)
    jobs.add(JobRecord(job_id=job_id, kind=kind, cluster="big", after=after))
    jobs.folder(job_id).mkdir(parents=True, exist_ok=True)
    return jobs


def status_of(run: RunDir) -> RunStatus:
    """As `llmtrain status` has it."""
    return read_status(run, queue_view.read_queue([run]))


class Slurm:
    """Commands of SLURM's names on the PATH; they note that they were called, and print what they are told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        self.says("scontrol", "Slurmctld(primary) at x is UP")
        for name in ("squeue", "sacct", "scancel"):
            self.says(name, "")

    def says(self, command: str, text: str, code: int = 0) -> None:
        queue_view._ask.cache_clear()
        path = self._folder / command
        path.write_text(
            f"#!/bin/sh\necho {command} $@ >> {self._folder}/calls\ncat <<'END'\n{text}\nEND\nexit {code}\n"
        )
        path.chmod(0o755)

    def queued(self, *lines: str) -> None:
        """Of squeue: "job|state|reason|nodes|left|starts"."""
        self.says("squeue", "\n".join(lines))

    @property
    def calls(self) -> list[str]:
        file = self._folder / "calls"
        return file.read_text().splitlines() if file.exists() else []
