"""How a supervisor ends where its run was asked to stop: with which code, and after how many Ctrl-C."""

import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.keeper import stopping, torchrun
from launcher.keeper.meeting import Meeting
from launcher.keeper.rules import Rules
from launcher.keeper.stopping import Stopper
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.torchrun import Start
from llmtrain.errors import DiskFull
from llmtrain.rundir import RunDir

ANSWERS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize(("answer", "code"), [(DiskFull.exit_code, DiskFull.exit_code), (1, 75), (0, 0)])
def test_what_a_person_has_to_mend_is_told_after_a_stop_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int, code: int
):
    """75 has SLURM queue the job again, where the last save did not fit onto the disk."""
    monkeypatch.setattr(torchrun, "command", lambda *_: [sys.executable, "-c", ANSWERS.format(code=answer)])
    run = RunDir(tmp_path / "run")
    run.create()
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        own = Supervisor(Start([], 1), run, Rules(), Meeting(None), tmp_path / "logs", tmp_path / "stop")
        assert (own.supervise(), own.stopper.reason) == (code, "SIGTERM")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("later_s", "leaves"), [(0.1, False), (5.0, True)])
def test_one_ctrl_c_that_arrives_twice_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later_s: float, leaves: bool
):
    """A terminal tells all that run in it, and some of them pass it on; a second one leaves without saving."""
    now, killed = [1000.0], list[int]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stopping, "kill_tree", killed.append)
    own = Stopper(Start([], 1), RunDir(tmp_path), Rules(), tmp_path / "stop")
    process: Any = SimpleNamespace(pid=7, poll=lambda: None)
    own.follow(process)
    monkeypatch.setattr(own, "_ask", lambda _: None)
    own._on_signal(signal.SIGINT, None)
    now[0] += later_s
    own._on_signal(signal.SIGINT, None)
    assert (own.reason, killed) == ("SIGINT", [7] if leaves else [])
