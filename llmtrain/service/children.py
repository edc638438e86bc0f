"""Processes that the service starts: one scores, one talks to the Hub. Both die with the service."""

import contextlib
import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from llmtrain.service.niceness import step_back

_PARENT = "LLMTRAIN_SERVICE_PID"
_NICE = "LLMTRAIN_SERVICE_NICE"
_LOOK_S = 0.2
_CPU_S = 0.1
_LONGEST_S = 600.0
_LONGEST_ASKED_S = 3600.0
"""A server may ask for any pause: a wrong one must not keep all uploads waiting for days."""
_DOUBLINGS = 20
"""More of them make no pause longer, and at last no number holds the power."""
_PR_SET_PDEATHSIG = 1


class Child:
    """A Python module as a process, whose standard output is JSON lines."""

    def __init__(self, module: str, arguments: list[str], log: Path, lock: int, environment: dict[str, str], nice: int):
        """`lock`: descriptor of the service's lock, which stays held until this process has ended too.
        `nice`: its niceness, from its first instruction on, also towards other sessions (`step_back`)."""
        self.started = self._moved = time.monotonic()
        self._read = (0.0, 0.0)
        self._rest = b""
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment, _PARENT: str(os.getpid()), _NICE: str(nice)},
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C is for the service, which ends it; and see step_back
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def lines(self) -> list[dict[str, Any]]:
        """What it has said since the last call."""
        assert self._process.stdout is not None
        while piece := self._process.stdout.read(1 << 16):
            self._rest += piece
        *whole, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in whole if line.startswith(b"{")]

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def stalled_s(self) -> float:
        """Since it last read, wrote or computed anything."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            cpu = process.cpu_times()
            counters: Any = process.io_counters() if hasattr(process, "io_counters") else None
            done = float(counters.read_chars + counters.write_chars) if counters else 0.0
            if done != self._read[0] or cpu.user + cpu.system > self._read[1] + _CPU_S:
                self._read = (done, cpu.user + cpu.system)
                self._moved = time.monotonic()
        return time.monotonic() - self._moved

    def end(self) -> None:
        """Kill it: what it does can be killed at any moment."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self.close()

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


def run_and_die_with_parent(arguments: list[str]) -> None:
    """In a child: run a module, and end when the service that started it has died, however it died.

    What it imports takes seconds, in which the run's lock is held: this is arranged for before that.
    """
    parent = int(os.environ[_PARENT])
    if os.name == "posix":
        step_back(int(os.environ[_NICE]))  # before its imports, which are most of the work of a small upload

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    if sys.platform == "linux":  # at once; the thread may have to wait for an import
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, name="parent", daemon=True).start()
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


class Pause:
    """Growing pauses after failures."""

    def __init__(self, first_s: float):
        self._first_s = first_s
        self.failures = 0
        self._until = 0.0

    def failed(self, at_least_s: float = 0.0) -> float:
        """Note a failure; returns the seconds until the next attempt."""
        pause = min(_LONGEST_S, self._first_s * 2 ** min(self.failures, _DOUBLINGS))
        pause = max(pause, min(_LONGEST_ASKED_S, at_least_s))
        self.failures += 1
        self._until = time.monotonic() + pause
        return pause

    def succeeded(self) -> None:
        self.failures, self._until = 0, 0.0

    @property
    def left_s(self) -> float:
        return max(0.0, self._until - time.monotonic())


if __name__ == "__main__":
    run_and_die_with_parent(sys.argv[1:])
