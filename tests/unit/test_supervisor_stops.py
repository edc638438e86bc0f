"""With which code a supervisor ends where a stop was asked for and its ranks end otherwise than saved."""

import signal
import sys
from pathlib import Path

import pytest

from launcher.keeper import torchrun
from launcher.keeper.meeting import Meeting
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
