"""The run folder: the one place that knows where things lie.

DIR/NAME/
    config.yaml             the resolved configuration
    deepspeed.json          what DeepSpeed is told (strategy.kind=zero2)
    base.json               hashes of the base's files (model.kind=qlora)
    checkpoints/step-00000100/   model/ state/ manifest.json
    metrics.jsonl           one line per optimizer step: the truth that TensorBoard is a view of
    heldout.jsonl           one line per evaluation
    samples.jsonl           generated text
    tensorboard/            event files
    summary.json curve.png  written at the end
    log.txt  lock
"""

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmtrain import files
from llmtrain.errors import RunFolderError

_STEP = "step-"


@dataclass(frozen=True)
class RunDir:
    """Paths of one run, and the small files in it."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def deepspeed(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def base(self) -> Path:
        return self.path / "base.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def heldout(self) -> Path:
        return self.path / "heldout.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{_STEP}{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        names = (p.name.removeprefix(_STEP) for p in self.checkpoints.iterdir() if p.name.startswith(_STEP))
        return sorted(int(name) for name in names if name.isdigit())

    def create(self) -> None:
        for folder in (self.path, self.checkpoints, self.tensorboard):
            folder.mkdir(parents=True, exist_ok=True)

    def lock(self) -> IO[str]:
        """Hold the run for this process; the lock ends with the process, however it ends.

        Raises:
            RunFolderError: another process on this machine is training here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = (self.path / "lock").open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise RunFolderError(
                f"{self.path}: {owner} is training in this run folder; stop it, or give this run another run.name"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        return handle

    def move_aside(self) -> Path:
        """Rename the whole run folder, so that a new run can take its place; returns where it went."""
        target = self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        self.path.rename(target)
        return target


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Add records at the end."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def rewind_jsonl(path: Path, last_step: int) -> None:
    """Drop the records after `last_step`, which a resumed run will write again."""
    if path.exists():
        kept = [record for record in read_jsonl(path) if record["step"] <= last_step]
        files.write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def heldout_losses(run: RunDir) -> dict[int, float]:
    """Held-out loss by step, from the ledger."""
    return {record["step"]: record["loss"] for record in read_jsonl(run.heldout)}
