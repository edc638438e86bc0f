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

_STACKS_S = 3.0
_POLL_S = 0.05
_WORDS = {
    "data": "taking data",
    "counts": "waiting for the other ranks' counts",
    "compute": "computing, or waiting in a collective",
    "log": "gathering what is logged",
    "evaluate": "evaluating",
    "sample": "writing text",
}


@dataclass(frozen=True)
class Still:
    """A rank that stands still."""

    rank: int
    frozen: bool
    """The process does not run at all: stopped, or stuck in foreign code that holds Python's lock."""
    phase: str
    step: int
    seconds: float

    def describe(self) -> str:
        doing = _WORDS.get(self.phase, self.phase)
        how = "does not run at all" if self.frozen else "stands still"
        return f"rank {self.rank} {how} since {self.seconds:.0f} s, at step {self.step:,}, {doing}"


def look(folder: Path, limit_s: float) -> list[Still]:
    """Ranks on this node that have stood still for longer than `limit_s`."""
    now = time.monotonic()
    return [_still(beat, now, limit_s) for beat in _alive(folder) if _stands(beat, now, limit_s)]


def culprits(still: Sequence[Still]) -> list[Still]:
    """Those that the others wait for: who does not run; else who is furthest behind."""
    frozen = [each for each in still if each.frozen]
    if frozen:
        return frozen
    behind = min((_progress(each) for each in still), default=None)
    return [each for each in still if _progress(each) == behind]


def write_stacks(folder: Path, to: Path) -> None:
    """Have every rank on this node write the Python stacks of its threads; gather them in `to`.

    A process that was stopped (SIGSTOP) has to go on for that, so it is told to.
    """
    beats = _alive(folder)
    for beat in beats:
        for number in (STACKS_SIGNAL, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, number)
    deadline, sizes = time.monotonic() + _STACKS_S, [-1]
    while time.monotonic() < deadline:
        now = [_size(heartbeat.stacks_file(folder, beat.rank)) for beat in beats]
        if all(now) and now == sizes:
            break
        sizes = now
        time.sleep(_POLL_S)
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("w") as output:
        for beat in beats:
            file = heartbeat.stacks_file(folder, beat.rank)
            stacks = file.read_text(errors="replace") if file.exists() else ""
            output.write(f"rank {beat.rank}, process {beat.pid}, step {beat.step}, {beat.phase}\n")
            output.write((stacks or "(it wrote no stacks: stuck in the kernel)\n") + "\n")


def _stands(beat: Beat, now: float, limit_s: float) -> bool:
    return now - beat.alive > limit_s or (beat.watched and now - beat.since > limit_s)


def _still(beat: Beat, now: float, limit_s: float) -> Still:
    frozen = now - beat.alive > limit_s
    return Still(beat.rank, frozen, beat.phase, beat.step, now - (beat.alive if frozen else beat.since))


def _progress(still: Still) -> tuple[int, int]:
    return still.step, PHASES.index(still.phase) if still.phase in PHASES else len(PHASES)


def _alive(folder: Path) -> list[Beat]:
    """Of processes that are still there: one that has ended is for torchrun to notice."""
    found: list[Beat] = []
    for beat in heartbeat.read(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(beat.pid).status() != psutil.STATUS_ZOMBIE:
                found.append(beat)
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
