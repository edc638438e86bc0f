"""Finds ranks that stand still, says which one the others wait for, and has the stacks of all written down."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmtrain import heartbeat
from llmtrain.heartbeat import PHASES, STACKS_SIGNAL, Beat

_STACKS_S = 5.0
_QUIET_S = 0.5
"""Stack files that have not grown for so long are complete."""
_SILENT_S = 60.0
_POLL_S = 0.05
_WORDS = {
    "data": "taking data",
    "counts": "waiting for the other ranks' counts",
    "forward": "computing",
    "backward": "computing gradients, or waiting for those of the other ranks",
    "log": "gathering what is logged",
    "evaluate": "evaluating",
    "scores": "waiting for the other ranks' scores",
    "sample": "writing text",
}


@dataclass(frozen=True)
class Seen:
    """What a rank is doing."""

    rank: int
    phase: str
    step: int
    seconds: float
    """Since that phase began, or last made progress; of a frozen rank: since its last sign of life."""
    stands: bool
    """It has made no progress for longer than it may."""
    frozen: bool
    """The process does not run at all: stopped, or stuck in foreign code that holds Python's lock."""

    def describe(self) -> str:
        doing = _WORDS.get(self.phase, self.phase)
        how = "does not run at all" if self.frozen else "stands still"
        return f"rank {self.rank} {how} since {self.seconds:.0f} s, at step {self.step:,}, {doing}"


def look(folder: Path, limit_s: float) -> list[Seen]:
    """All ranks on this node, as they are now."""
    now = time.monotonic()
    return [_seen(beat, process, now, limit_s) for beat, process in _alive(folder)]


def culprits(ranks: Sequence[Seen]) -> list[Seen]:
    """Those that the others wait for: the ranks that do not run; else those that are furthest behind.

    Nobody if one of the latter still makes progress, or may take its time (a save): then the others only wait.
    """
    frozen = [each for each in ranks if each.frozen]
    if frozen:
        return frozen
    behind = min(map(_progress, ranks), default=None)
    last = [each for each in ranks if _progress(each) == behind]
    return last if all(each.stands for each in last) else []


def write_stacks(folder: Path, to: Path) -> None:
    """Have every rank on this node write the Python stacks of its threads; gather them in `to`.

    A process that was stopped (SIGSTOP) has to run for that, so it gets SIGCONT.
    """
    beats = [beat for beat, _ in _alive(folder)]
    for beat in beats:
        for number in (STACKS_SIGNAL, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, number)
    files = [heartbeat.stacks_file(folder, beat.rank) for beat in beats]
    deadline, changed_at, sizes = time.monotonic() + _STACKS_S, time.monotonic(), list[int]()
    while (now := time.monotonic()) < deadline and (not all(sizes) or now - changed_at < _QUIET_S):
        if (written := [_size(file) for file in files]) != sizes:
            sizes, changed_at = written, now
        time.sleep(_POLL_S)
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("w") as output:
        for beat, file in zip(beats, files, strict=True):
            stacks = file.read_text(errors="replace") if file.exists() else ""
            output.write(f"rank {beat.rank}, process {beat.pid}, step {beat.step}, {beat.phase}\n")
            output.write((stacks or "(it wrote no stacks: stuck in the kernel)\n") + "\n")


def kill_all(folder: Path) -> None:
    """SIGKILL for the ranks that have left a sign of life here."""
    for _, process in _alive(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _seen(beat: Beat, process: psutil.Process, now: float, limit_s: float) -> Seen:
    silent_s, same_s = now - beat.alive, now - beat.since
    # Before training and in a save foreign code may hold Python's lock for a while: libraries are loaded.
    may_be_silent_s = limit_s if beat.watched else max(limit_s, _SILENT_S)
    frozen = silent_s > may_be_silent_s or (silent_s > limit_s and process.status() == psutil.STATUS_STOPPED)
    stands = frozen or (beat.watched and same_s > limit_s)
    return Seen(beat.rank, beat.phase, beat.step, silent_s if frozen else same_s, stands, frozen)


def _progress(seen: Seen) -> tuple[int, int, int]:
    """Sorts ranks by how far they are: before training, at a step and a phase of it, after training."""
    if seen.phase in PHASES:
        return 1, seen.step, PHASES.index(seen.phase)
    return (2, 0, 0) if seen.phase == "ending" else (0, 0, 0)


def _alive(folder: Path) -> list[tuple[Beat, psutil.Process]]:
    """Of processes that are still there: one that has ended is for torchrun to notice."""
    found: list[tuple[Beat, psutil.Process]] = []
    for beat in heartbeat.read(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(beat.pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append((beat, process))
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
