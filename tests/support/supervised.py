"""`llmtrain run` in a process of its own: what it says and when, its ranks, and faults in them."""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from tests.support.runs import TIMEOUT_S, Workplace, environment

_POLL_S = 0.01


@dataclass(frozen=True)
class Fault:
    """Something that happens to one rank, once (tests/support/faulty/sitecustomize.py)."""

    what: str
    """Where and what: "data stops", "forward crashes" ..."""
    rank: int
    struck: Path
    """Appears when it happens, and tells the time."""
    call: int = 20
    """Of the function at that place."""

    @property
    def time(self) -> float:
        return float(self.struck.read_text())


def with_faults(faults: Sequence[Fault]) -> dict[str, str]:
    """The environment in which they happen, one after the other."""
    own = environment()
    own["PYTHONPATH"] = f"{Path(__file__).parent / 'faulty'}:{own['PYTHONPATH']}"
    return {**own, "LLMTRAIN_TEST_FAULTS": json.dumps([asdict(fault) for fault in faults], default=str)}


class Supervised:
    """One `llmtrain run`. Leaving the context ends whatever is left of it."""

    def __init__(self, workplace: Workplace, name: str, *words: str, faults: Sequence[Fault] = ()):
        self.run = workplace.run_folder(name)
        self._lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "run", str(workplace.config), f"run.name={name}", *words],
            cwd=workplace.folder,
            env=with_faults(faults),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for victim in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append((time.time(), line))

    @property
    def said(self) -> str:
        return "".join(line for _, line in self._lines)

    def wait_for_line(self, pattern: str, times: int = 1) -> tuple[float, re.Match[str]]:
        """When it said something like that for so many times, and what."""

        def matches() -> list[tuple[float, re.Match[str]]]:
            return [(at, match) for at, line in list(self._lines) if (match := re.search(pattern, line))]

        self._until(lambda: len(matches()) >= times)
        return matches()[times - 1]

    def wait_for_step(self, step: int) -> None:
        """Until that step is in the ledger of metrics."""
        self._until(lambda: self.last_step() >= step)

    def wait_for_checkpoint(self, beyond: int) -> None:
        self._until(lambda: self.newest_checkpoint() > beyond)

    def recovered(self, times: int = 1) -> float:
        """When the first step was written after that many starts anew."""
        told_at, match = self.wait_for_line(r"starting again from step ([\d,]+)", times)
        start, ledger = int(match[1].replace(",", "")), self.run / "metrics.jsonl"
        # The ledger is rewound first: what then lies beyond that step is new.
        self._until(lambda: ledger.stat().st_mtime > told_at and self.last_step() > start)
        return ledger.stat().st_mtime

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            over = self.process.poll() is not None and not self._listener.is_alive()
            assert (not over and time.monotonic() < deadline) or condition(), self.said
            time.sleep(_POLL_S)

    def last_step(self) -> int:
        ledger = self.run / "metrics.jsonl"
        found = re.findall(r'"step": (\d+)', ledger.read_text()) if ledger.exists() else []
        return int(found[-1]) if found else 0

    def newest_checkpoint(self) -> int:
        return max((int(p.name[5:]) for p in (self.run / "checkpoints").glob("step-*")), default=0)

    def wait_for_rank(self, number: int) -> None:
        """Until there is one that runs our code."""

        def is_there() -> bool:
            with contextlib.suppress(IndexError, StopIteration, psutil.Error, KeyError):
                return "llmtrain" in self.rank(number).cmdline()
            return False

        self._until(is_there)

    def rank(self, number: int) -> psutil.Process:
        """The process that trains as that rank."""
        agent = psutil.Process(self.process.pid).children()[0]
        return next(each for each in agent.children() if each.environ()["RANK"] == str(number))

    def end(self) -> int:
        """Wait for its end; returns the exit code."""
        code = self.process.wait(TIMEOUT_S)
        self._listener.join(TIMEOUT_S)
        return code
