"""Signs of life: each rank leaves a small file, from which a supervisor on its node tells a hang from slow work.

A thread writes the file every second: that the process runs at all, and since when it has been doing what it does.
Saying so costs the loop three assignments and no system call. Nothing is written where nobody looks
(no `llmtrain run`, no job).
"""

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "LLMTRAIN_HEARTBEATS"
"""Variable that names the folder, on the node's own disk."""
STACKS_SIGNAL = signal.SIGQUIT
"""Makes a rank write the Python stacks of its threads, from C: also when Python itself is stuck."""
_BEAT_S = 1.0
_WIDTH = 512
PHASES = ("data", "counts", "forward", "backward", "log", "evaluate", "scores", "sample", "save")
"""What a step consists of, in this order; in `counts`, `backward` and `scores` a rank waits for the others."""


@dataclass(frozen=True)
class Beat:
    """What a rank said last. Times are of the machine's monotonic clock, which its processes share."""

    rank: int
    pid: int
    phase: str
    """One of PHASES, or a word for what comes before and after training."""
    step: int
    since: float
    """When this phase began, or last made progress."""
    watched: bool
    """Whether standing still in this phase means a hang; else only a process that does not run at all does."""
    alive: float
    """When this was written."""


@dataclass
class _Heart:
    phase: str = "starting"
    step: int = 0
    since: float = 0.0
    watched: bool = False


_heart = _Heart()
_ended = threading.Event()


def at(phase: str, step: int | None = None, watched: bool = True) -> None:
    """Note the phase that begins now. During long work call it again whenever there is progress."""
    _heart.phase, _heart.since, _heart.watched = phase, time.monotonic(), watched
    if step is not None:
        _heart.step = step


def on_to(phase: str) -> None:
    """Note that the phase at hand has reached this part of it; does nothing in a phase that is not watched."""
    if _heart.watched:
        at(phase)


def start(rank: int) -> None:
    """Start the thread, if a supervisor watches; also make STACKS_SIGNAL write stacks there. Once in a process."""
    if (name := os.environ.get(FOLDER)) is None:
        return
    folder = Path(name)
    faulthandler.enable()  # a segmentation fault says where
    with contextlib.suppress(OSError):  # no room at all: then nobody can look
        faulthandler.register(STACKS_SIGNAL, file=stacks_file(folder, rank).open("w"), all_threads=True)
        descriptor = os.open(_file(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        at("starting", watched=False)
        threading.Thread(target=_beat, args=(descriptor, rank), name="heartbeat", daemon=True).start()


def stop(rank: int) -> None:
    """This rank is done: remove its file, so that the supervisor stops watching it."""
    _ended.set()
    if (name := os.environ.get(FOLDER)) is not None:
        _file(Path(name), rank).unlink(missing_ok=True)


def read(folder: Path) -> list[Beat]:
    """What the ranks of this node said last, by rank."""
    beats: list[Beat] = []
    for path in folder.glob("beat-*"):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # it has just gone, or is being written
            beats.append(Beat(**json.loads(path.read_text())))
    return sorted(beats, key=lambda beat: beat.rank)


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}.txt"


def _file(folder: Path, rank: int) -> Path:
    return folder / f"beat-{rank}"


def _beat(descriptor: int, rank: int) -> None:
    while True:
        now = Beat(rank, os.getpid(), _heart.phase, _heart.step, _heart.since, _heart.watched, time.monotonic())
        try:
            os.pwrite(descriptor, json.dumps(asdict(now)).ljust(_WIDTH).encode(), 0)
        except OSError:  # a full disk: what stood there would read as a rank that does not run any more
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
        if _ended.wait(_BEAT_S):
            return
