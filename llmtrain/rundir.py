"""The run folder: where everything in it lies, and who holds it.

DIR/NAME/
    config.yaml             the resolved configuration
    deepspeed.json          what DeepSpeed is told (strategy.kind=zero2)
    base.json               hashes of the base's files (model.kind=qlora)
    checkpoints/step-00000100/   model/ state/ manifest.json
    metrics.jsonl           one line per optimizer step: the truth that TensorBoard is a view of
    heldout.jsonl           one line per evaluation
    samples.jsonl           generated text
    saves.jsonl             how long each checkpoint took to be written
    tensorboard/            event files
    events.jsonl            what happened to training: starts, resumes, stops, kills, failures, rejected checkpoints
    origin.json             where and on what training was started (relative paths of the configuration start there)
    summary.json curve.png  written at the end
    report/                 index.html and its pictures (llmtrain report)
    log.txt  lock
    service/                the checkpoint service's
        scores.jsonl        one line per checkpoint and split, scored from disk: the truth that rankings are views of
        losses/             loss sums of stretches of the held-out split, for intervals (NAME.npy)
        uploads.jsonl       one line per confirmed upload, and per removal from the Hub
        events.jsonl        what went wrong on the way: retries, refusals, quarantined checkpoints
        status.json         what it is doing now, what waits, the last error
        hub.json            whether the Hub took the token and the repository
        published.json      what `main` on the Hub was last renewed with
        stop.json           asks training to end: no improvement for service.patience saves (rank 0 removes an old one)
        reserve             some hundred kB of nothing, deleted where a full disk has no room for a score
        log.txt  lock
"""

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmtrain import locks, log
from llmtrain.errors import RunFolderError

_STEP = "step-"
_QUARANTINED = "quarantined-"
DOOMED = ".deleting-"
"""Prefix of a checkpoint that is being deleted."""
RESTARTED = "LLMTRAIN_RESTARTED"
"""Variable that a supervisor sets where it starts training again."""
_DYING_S = 90.0
"""For a former start of the run: what was killed gives its GPUs back first."""


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
    def saves(self) -> Path:
        return self.path / "saves.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def origin(self) -> Path:
        return self.path / "origin.json"

    @property
    def service(self) -> Path:
        return self.path / "service"

    @property
    def scores(self) -> Path:
        return self.service / "scores.jsonl"

    @property
    def uploads(self) -> Path:
        return self.service / "uploads.jsonl"

    @property
    def service_events(self) -> Path:
        return self.service / "events.jsonl"

    @property
    def service_status(self) -> Path:
        return self.service / "status.json"

    @property
    def service_log(self) -> Path:
        return self.service / "log.txt"

    @property
    def hub_state(self) -> Path:
        return self.service / "hub.json"

    @property
    def published(self) -> Path:
        return self.service / "published.json"

    @property
    def reserve(self) -> Path:
        return self.service / "reserve"

    @property
    def early_stop(self) -> Path:
        return self.service / "stop.json"

    def losses(self, step: int, checkpoint: str, split: str) -> Path:
        """Loss sums by stretch of a split, of the checkpoint with that identity."""
        return self.service / "losses" / f"{_STEP}{step:08d}-{checkpoint[:12]}-{split}.npy"

    @property
    def validation_board(self) -> Path:
        """TensorBoard's sub-run with the service's scores."""
        return self.tensorboard / "validation"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report" / "index.html"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def lock_file(self) -> Path:
        """Locked by the rank 0 that trains here (`lock`)."""
        return self.path / "lock"

    @property
    def service_lock_file(self) -> Path:
        """Locked by the checkpoint service that is at work here (`lock_service`)."""
        return self.service / "lock"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{_STEP}{step:08d}"

    def quarantined(self, step: int) -> Path:
        """Where a checkpoint that did not verify is moved: never resumed from, never uploaded."""
        return self.checkpoints / f"{_QUARANTINED}{self.checkpoint(step).name}"

    def doomed(self, step: int) -> Path:
        """The name that a checkpoint gets before its files are deleted.

        Another one each time: of an earlier checkpoint of that step something may be left.
        """
        return self.checkpoints / f"{DOOMED}{self.checkpoint(step).name}-{secrets.token_hex(4)}"

    def quarantined_steps(self) -> list[int]:
        return self._steps(f"{_QUARANTINED}{_STEP}")

    def checkpoint_steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        return self._steps(_STEP)

    def _steps(self, prefix: str) -> list[int]:
        if not self.checkpoints.is_dir():
            return []
        names = (p.name.removeprefix(prefix) for p in self.checkpoints.iterdir() if p.name.startswith(prefix))
        return sorted(int(name) for name in names if name.isdigit())

    def create(self) -> None:
        for folder in (self.path, self.checkpoints, self.tensorboard):
            folder.mkdir(parents=True, exist_ok=True)

    def lock(self) -> IO[str]:
        """Hold the run for this process; the lock ends with the process, however it ends.

        Raises:
            RunFolderError: another process is training here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        while (handle := locks.hold(self.lock_file, "no other process trains in it")) is None:
            owner = locks.holder(self.lock_file) or "another process"
            if RESTARTED not in os.environ or time.monotonic() - began > _DYING_S:
                raise RunFolderError(
                    f"{self.path}: {owner} is training in this run folder; stop it, or give this run another run.name"
                )
            log.warn_once(f"waiting    up to {_DYING_S:.0f} s for {owner}, which still holds {self.path}")
            time.sleep(0.5)
        return handle

    def is_training(self) -> bool:
        """Whether a process holds the run's lock."""
        return locks.is_held(self.lock_file)

    def lock_service(self) -> IO[str] | None:
        """Hold the run for this checkpoint service; None where another one holds it."""
        self.service.mkdir(parents=True, exist_ok=True)
        return locks.hold(self.service_lock_file, "no other checkpoint service is at work on this run")

    def is_served(self) -> bool:
        """Whether a checkpoint service is at work here."""
        return locks.is_held(self.service_lock_file)

    def move_aside(self) -> Path:
        """Rename the whole run folder, so that a new run can take its place; returns where it went."""
        target = self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        self.path.rename(target)
        return target
