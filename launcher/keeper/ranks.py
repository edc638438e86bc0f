"""The ranks that torchrun has started on this node: which of them fell first, and what it said last."""

import contextlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from launcher.keeper.exit_codes import Left, read_codes
from launcher.keeper.processes import is_alive, ranks_of
from llmtrain.errors import is_for_a_person

_LINGER_S = 1.0
"""Where the first has met an error that a person has to mend, the others say so too."""
_LAST_LINES = 15
_FATAL = "Fatal Python error"
"""How faulthandler begins, before it shows the stacks at a segmentation fault."""
_TELLS = re.compile(f"Error|^error: |{_FATAL}")
_LOST = re.compile(
    "unspecified launch failure|uncorrectable (ECC|NVLink) error|hardware stack error|GPU is lost|fallen off the bus|"
    r"CUDA-capable device\(s\) is/are busy or unavailable|no CUDA-capable device is detected|NVRM: Xid"
)
"""What CUDA and the driver say of a GPU that has failed. Not: errors that a bug in a kernel brings about as well and
that leave the GPU as it was (an illegal memory access, a device-side assert)."""
_END = 1 << 16
"""Bytes of a rank's output that are searched for that."""


@dataclass
class Ranks:
    """Of one attempt."""

    agent: int
    """torchrun's process."""
    codes: Path
    """The folder in which they leave their exit codes."""
    logs: Path
    """The folder with their output; the first rank of all writes to the terminal."""
    _first: int | None = None
    """Which fell first."""
    _fallen_at: float = 0.0
    """When that was seen."""
    _for_a_person: bool = False
    """It met an error that a person has to mend."""
    _why: str = ""
    _processes: dict[int, psutil.Process] = field(default_factory=dict[int, psutil.Process])
    _sizes: dict[Path, int] = field(default_factory=dict[Path, int])
    """Of the logs before this attempt; what follows is this attempt's output."""

    def __post_init__(self) -> None:
        for log in self._all_logs():
            with contextlib.suppress(OSError):  # the disk does not answer: what was said before is searched too
                self._sizes[log] = log.stat().st_size

    def meet(self) -> None:
        """Note the ranks that torchrun has started since the last call."""
        known = {process.pid for process in self._processes.values()}
        for process in ranks_of(self.agent):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
                if process.pid not in known:
                    self._processes[int(process.environ()["RANK"])] = process

    def has_fallen(self) -> bool:
        """Whether one has ended, and not well: then the others cannot go on."""
        gone = [rank for rank, process in self._processes.items() if not is_alive(process)]
        if self._first is None and gone:
            left = read_codes(self.codes)
            # One that was killed leaves no code; those that have lost their connection to it do.
            fallen = {rank: left.get(self._processes[rank].pid, Left(code=-1)) for rank in gone}
            bad = [rank for rank in gone if not fallen[rank].is_good]
            self._first = min(bad, key=lambda rank: fallen[rank].time, default=None)
            if self._first is not None:
                self._fallen_at = time.monotonic()
                self._why = fallen[self._first].why
                self._for_a_person = is_for_a_person(fallen[self._first].code)
        return self._first is not None

    def kill_after_a_fall(self) -> None:
        """Once one has fallen, the others: they can neither continue nor save, and torchrun would wait for them for
        30 s."""
        if self.has_fallen() and time.monotonic() - self._fallen_at >= (_LINGER_S if self._for_a_person else 0.0):
            self.kill()

    def kill(self) -> None:
        """All that are left; torchrun then reports, and ends."""
        for process in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def describe(self) -> str | None:
        """What became of the one that fell first, as far as it is known."""
        if self._first is None:
            return None
        if self._why:
            return f"rank {self._first} failed: {self._why}"
        words = self._last_words(self.logs / f"rank-{self._first}.log")
        return f"rank {self._first} " + (
            f"crashed: {words[0]}" if words and _FATAL in words[0] else "was killed, or crashed"
        )

    @property
    def is_unheard(self) -> bool:
        """What a person has to mend stands in a rank's log alone: rank 0 would have said it on the terminal first."""
        return self._for_a_person and bool(self._first)

    def gpu_is_lost(self) -> bool:
        """Whether a rank of this node has met an error of its GPU's hardware: it may be gone until somebody resets it.

        To be asked once all have ended.
        """
        said = [left.why for left in read_codes(self.codes).values()]
        said += [self._output(log)[-_END:].decode(errors="replace") for log in self._all_logs()]
        return any(_LOST.search(each) for each in said)

    def last_words(self) -> dict[Path, list[str]]:
        """By file: of the one that fell first, or of all where that is not known; where they end in an error."""
        logs = self._all_logs() if self._first is None else [self.logs / f"rank-{self._first}.log"]
        words = {log: self._last_words(log) for log in logs}
        return {log: lines for log, lines in words.items() if any(_TELLS.search(line) for line in lines)}

    def _last_words(self, log: Path) -> list[str]:
        """In this attempt; where it crashed, the stack of the thread that did."""
        lines = self._output(log).decode(errors="replace").splitlines()
        fatal = [number for number, line in enumerate(lines) if line.startswith(_FATAL)]
        if not fatal:
            return lines[-_LAST_LINES:]
        stacks = lines[fatal[-1] + 1 :]
        own = next((number for number, line in enumerate(stacks) if line.startswith("Current thread")), 0)
        return [lines[fatal[-1]], *stacks[own : own + _LAST_LINES - 1]]

    def _output(self, log: Path) -> bytes:
        """Of this attempt; empty while the disk does not answer."""
        with contextlib.suppress(OSError):
            return log.read_bytes()[self._sizes.get(log, 0) :]
        return b""

    def _all_logs(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return sorted(self.logs.glob("rank-*.log"))
        return []
