"""The run folder: the one place that knows where things lie.

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
    events.jsonl            what happened to training: starts, resumes, rejected checkpoints
    origin.json             the folder that training was started in: relative paths of the configuration start there
    summary.json curve.png  written at the end
    report/                 index.html and its pictures (llmtrain report)
    log.txt  lock
    service/                the checkpoint service's; it alone writes there
        scores.jsonl        one line per checkpoint and split, scored from disk: the truth that rankings are views of
        losses/             loss sums of stretches of the held-out split, for intervals (NAME.npy)
        uploads.jsonl       one line per confirmed upload, and per removal from the Hub
        events.jsonl        what went wrong on the way: retries, refusals, quarantined checkpoints
        status.json         what it is doing now, what waits, the last error
        hub.json            whether the Hub took the token and the repository
        published.json      what `main` on the Hub was last renewed with
        stop.json           asks training to end: no improvement for service.patience saves
        log.txt  lock
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from llmtrain import files, log
from llmtrain.errors import RunFolderError

_STEP = "step-"
_QUARANTINED = "quarantined-"
DOOMED = ".deleting-"
"""Prefix of a checkpoint that is being deleted."""
RESTARTED = "LLMTRAIN_RESTARTED"
"""Variable that a supervisor sets where it starts training again."""
_DYING_S = 90.0
"""For a former start of the run: what was killed gives its GPUs back first."""
_LOOKS = 20
_HELD = (errno.EAGAIN, errno.EACCES)  # else there are no locks: Lustre without flock, NFS without lockd
_SKEW_S = 60.0
_BLOCK = 1 << 16


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
            RunFolderError: another process on this machine is training here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        while (handle := hold(self.path / "lock")) is None:
            owner = (self.path / "lock").read_text().strip() or "another process"
            if RESTARTED not in os.environ or time.monotonic() - began > _DYING_S:
                raise RunFolderError(
                    f"{self.path}: {owner} is training in this run folder; stop it, or give this run another run.name"
                )
            _say_once(f"waiting    up to {_DYING_S:.0f} s for {owner}, which still holds {self.path}")
            time.sleep(0.5)
        return handle

    def is_training(self) -> bool:
        """Whether a process holds the run's lock."""
        return is_held(self.path / "lock")

    def lock_service(self) -> IO[str] | None:
        """Hold the run for this checkpoint service; None where another one holds it."""
        self.service.mkdir(parents=True, exist_ok=True)
        return hold(self.service / "lock")

    def is_served(self) -> bool:
        """Whether a checkpoint service is at work here."""
        return is_held(self.service / "lock")

    def move_aside(self) -> Path:
        """Rename the whole run folder, so that a new run can take its place; returns where it went."""
        target = self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        self.path.rename(target)
        return target


def hold(path: Path) -> IO[str] | None:
    """Lock a file for this process, and write into it who holds it; None where another process does. Where the file
    system has no locks that is said, and nothing keeps another process from it."""
    handle = path.open("a+")
    for attempt in range(_LOOKS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                if attempt + 1 < _LOOKS:  # it may have been `is_held` looking, for an instant
                    time.sleep(0.01)
                continue
            _say_once(f"{path.parent}: no locks here ({error.strerror}): be sure that no other process trains in it")
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        return handle
    handle.close()
    return None


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of that file (on this machine; elsewhere as far as the file system tells)."""
    if not path.exists():
        return False
    with path.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _HELD or _is_at_work(handle)
    return False


def _is_at_work(lock: IO[str]) -> bool:
    """Without locks: whether the process that wrote the file runs here, and did before (numbers are used again)."""
    import psutil

    number, _, host = lock.read().removeprefix("process ").partition(" on ")
    with contextlib.suppress(psutil.Error, ValueError):
        began = psutil.Process(int(number)).create_time()
        return host == os.uname().nodename and began <= os.fstat(lock.fileno()).st_mtime + _SKEW_S
    return False


@functools.cache
def _say_once(line: str) -> None:
    log.warning(line)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that a crash cut short (within a letter, too) is left out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = content[: content.rfind(b"\n") + 1].decode().split("\n")
    return [json.loads(line) for line in lines if line]


def append_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Add records at the end: all of them, or none where the disk has no room for all.

    Half a line would be glued to the next one, and nobody could read the file any more.
    """
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    size = mend_jsonl(path)
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError:  # of closing, too: NFS says only then that there is no room
        with contextlib.suppress(OSError):  # what stays is cut off before the next record is added
            os.truncate(path, size)
        raise


def mend_jsonl(path: Path) -> int:
    """Cut off a last line that a crash or a full disk left unfinished; returns the size in bytes that is left.

    In place, which a full disk allows. Of a file that ends well only the last byte is read.
    """
    if not path.exists():
        return 0
    with path.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        whole = _end_of_last_line(file, size)
        if whole < size:
            file.truncate(whole)
    return whole


def _end_of_last_line(file: BinaryIO, size: int) -> int:
    end, length = size, 1
    while end:
        start = max(0, end - length)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end, length = start, _BLOCK
    return 0


def rewind_jsonl(path: Path, last_step: int) -> None:
    """Drop the records after `last_step`, which a resumed run will write again."""
    if path.exists():
        kept = [record for record in read_jsonl(path) if record["step"] <= last_step]
        files.write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def heldout_losses(run: RunDir) -> dict[int, float]:
    """Held-out loss by step, from the ledger."""
    return {record["step"]: record["loss"] for record in read_jsonl(run.heldout)}
