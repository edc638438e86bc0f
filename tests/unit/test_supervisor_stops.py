"""How a supervisor ends: with which code where ranks that were asked to stop have not saved, and whom it kills."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from launcher.keeper import supervisor, torchrun
from launcher.keeper.meeting import Meeting
from launcher.keeper.processes import is_alive, kill_tree
from launcher.keeper.supervisor import Rules, Supervisor
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
        assert (own.supervise(), own.stopped_by) == (code, "SIGTERM")
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
    monkeypatch.setattr(supervisor, "kill_tree", killed.append)
    own = Supervisor(Start([], 1), RunDir(tmp_path), Rules(), Meeting(None), tmp_path, tmp_path / "stop")
    process: Any = SimpleNamespace(pid=7, poll=lambda: None)
    own._process = process
    monkeypatch.setattr(own, "_ask_to_stop", lambda _: None)
    own._on_signal(signal.SIGINT, None)
    now[0] += later_s
    own._on_signal(signal.SIGINT, None)
    assert (own.stopped_by, killed) == ("SIGINT", [7] if leaves else [])


STARTS_TWO = """
import subprocess, sys, time
for name in ("llmtrain", "llmtrain.service"):
    words = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", name]
    child = subprocess.Popen(words, stdout=subprocess.PIPE)
    child.stdout.readline()  # /proc tells its name by now
    print(child.pid, flush=True)
time.sleep(60)
"""


def test_of_all_that_a_start_has_started_the_service_alone_is_not_killed():
    process = subprocess.Popen([sys.executable, "-c", STARTS_TWO], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    rank, service = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
    try:
        kill_tree(process.pid)
        assert process.wait(20) == -signal.SIGKILL
        deadline = time.monotonic() + 20
        while is_alive(rank):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert is_alive(service)
    finally:
        for each in (process, rank, service):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
