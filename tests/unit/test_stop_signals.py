"""A terminal that is closed: the run in it saves and stops, and under nohup goes on."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain.rundir import RunDir
from llmtrain.stop import StopFlag
from tests.support.runs import TIMEOUT_S, Workplace, environment

LONG = ["train.steps=100000", "checkpoint.every_steps=20", "evaluate.every_steps=null"]
HANGS_UP = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from llmtrain import log
log.set_up()
{begins}
print("ready", file=sys.stderr, flush=True)
while os.isatty(2):
    time.sleep(0.05)
{then}
sys.exit(75)
"""
SHOWS = """
from llmtrain.progress import Progress, Reading
progress = Progress(10, 0)
assert progress._live is not None
"""
GOES_ON = """
for step in range(3):
    progress.show(Reading(step, 10, 1.0, None, 5.0, 60.0))
    time.sleep(0.2)
progress.close()
log.info("a line")
sys.stderr.flush()
"""


class Terminal:
    """A process in the foreground of a terminal of its own."""

    def __init__(self, command: list[str], folder: Path, *settings: str):
        self._ours, theirs = pty.openpty()
        self.said = b""

        def take_over() -> None:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*command, *settings],
            cwd=folder,
            env={**environment(), "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_over,  # noqa: PLW1509  there are no threads here
        )
        os.close(theirs)
        os.set_blocking(self._ours, False)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Reads meanwhile: who writes to a terminal waits for that."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            with contextlib.suppress(BlockingIOError):
                self.said += os.read(self._ours, 65_536)
            assert self.process.poll() is None, self.said.decode(errors="replace")
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def close(self) -> int:
        """As closing its window does; returns the exit code of the process."""
        os.close(self._ours)
        return self.process.wait(60)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.process.kill()


def python(begins: str, then: str) -> list[str]:
    return [sys.executable, "-c", HANGS_UP.format(begins=begins, then=then)]


@pytest.mark.parametrize(
    ("begins", "then"),
    [
        ("", "log.info('a line'); log.info('another')"),
        ("from launcher.keeper.terminal import say", "say('a line'); print('to stdout', flush=True)"),
        (SHOWS, GOES_ON),
    ],
    ids=["log", "supervisor", "progress"],
)
def test_what_writes_to_a_terminal_that_has_gone_goes_on(
    terminals: list[Terminal], tmp_path: Path, begins: str, then: str
):
    """And leaves with its own exit code: what could not be written would fail again at exit."""
    terminals.append(terminal := Terminal(python(begins, then), tmp_path))
    terminal.wait_until(lambda: b"ready" in terminal.said)
    assert terminal.close() == 75


@pytest.mark.parametrize(("module", "told"), [("launcher", "SIGTERM"), ("llmtrain", "SIGHUP")])
def test_a_closed_terminal_lets_the_run_save_and_stop(
    terminals: list[Terminal], workplace: Workplace, module: str, told: str
):
    run = RunDir(workplace.run_folder(f"hung-up-{module}"))
    command = [sys.executable, "-m", module, *(["run", "--ranks", "1"] if module == "launcher" else [])]
    terminals.append(
        terminal := Terminal([*command, str(workplace.config)], workplace.folder, f"run.name={run.path.name}", *LONG)
    )
    terminal.wait_until(run.checkpoint_steps)
    assert terminal.close() == 75
    said = run.log.read_text()
    assert (match := re.search(rf"stopped by {told} at step ([\d,]+), saved", said)), said
    assert int(match[1].replace(",", "")) == max(run.checkpoint_steps())
    assert not run.is_training()


LIVES_ON = """
import signal, sys, time
time.sleep(1.5)
sys.exit(0 if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else 1)
"""
SUPERVISES = """
import signal, sys
from pathlib import Path
from launcher.keeper import torchrun
from launcher.keeper.meeting import Meeting
from launcher.keeper.rules import Rules
from launcher.keeper.supervisor import Supervisor
from llmtrain.rundir import RunDir
torchrun.command = lambda *_: [sys.executable, "-c", {script!r}]
folder = Path({folder!r})
own = Supervisor(
    torchrun.Start([], 1), RunDir(folder), Rules(max_restarts=0), Meeting(folder), folder, folder / "stop"
)
print("ready", flush=True)
code = own.supervise()
print(own.stopper.reason, flush=True)
sys.exit(code)
"""


def test_nohup_is_respected(tmp_path: Path):
    """By the supervisor and by what it starts."""
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", SUPERVISES.format(script=LIVES_ON, folder=str(tmp_path))],
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGHUP)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "None\n"), errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT])
def test_a_signal_sets_a_flag_and_nothing_else(number: signal.Signals):
    flag = StopFlag()
    assert not flag.requested
    flag._on_signal(number, None)
    assert (flag.requested, flag.signal_name) == (True, number.name)


def test_only_a_second_ctrl_c_leaves_at_once():
    flag = StopFlag()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # the wave that ends a job
        flag._on_signal(number, None)
    flag._on_signal(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        flag._on_signal(signal.SIGINT, None)
