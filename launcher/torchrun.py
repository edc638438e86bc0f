"""`llmtrain run`: a run on this machine, alone or under torchrun, started again when it crashes.

torchrun restarts its workers after any failure, also after a mistake in the configuration or a full disk, and tells
its caller nothing but 1. So it is used without restarts: every rank leaves its exit code in a file, and what to do is
decided here. A stop that was asked for ends with 75, an error that a person has to mend ends with its own code, and
after a crash the run is started again, unless it did not come any further since the last time.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from llmtrain.config import load_config
from llmtrain.config.load import split_settings
from llmtrain.errors import EXIT_CODES, EXIT_REQUEUE, ConfigError, UserError
from llmtrain.rundir import RunDir

_POLL_S = 0.1
_SAME_S = 0.3
"""Wrappers such as `timeout` pass one Ctrl-C on twice."""
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SETTINGS = {
    # Without it a killed rank left 5 of 14 restarts hanging in rendezvous (pytorch#135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@dataclass
class Start:
    """What to start, and how often."""

    words: list[str]
    """CONFIG and section.key=value, for `python -m llmtrain`."""
    ranks: int
    device: str | None
    max_restarts: int = 3
    """In a row without a new checkpoint."""
    grace_s: int = 600
    """For ranks that were asked to stop, until they are killed: they save first."""
    environment: dict[str, str] = field(default_factory=dict[str, str])


def command(start: Start) -> list[str]:
    """The process that trains: torchrun's agent, or for a single rank the rank itself."""
    words = [*start.words, *([f"train.device={start.device}"] if start.device else [])]
    if start.ranks == 1:
        return [sys.executable, "-m", "llmtrain", *words]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(start.ranks),
        "--max_restarts", "0", "-m", "llmtrain", "--", *words,
    ]  # fmt: skip


def check(gpus: int | None, ranks: int | None) -> tuple[int, str | None]:
    """(ranks, device) from the command line; raises ConfigError where they do not fit this machine."""
    there = num_gpus()
    if gpus is None and ranks is None:
        gpus = there
    if not gpus:
        return ranks or 1, "cpu" if gpus == 0 and there else None
    if ranks is not None:
        raise ConfigError(["--ranks is for the CPU: with --gpus there is one rank per GPU; leave it out"])
    if gpus > there:
        raise ConfigError([f"--gpus {gpus}: this machine shows {there}; use at most {there}, or --gpus 0 for the CPU"])
    return gpus, "cuda"


def num_gpus() -> int:
    """NVIDIA GPUs that this process may use; without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0


class Supervisor:
    """Starts the run, passes signals on, starts it again."""

    def __init__(self, start: Start):
        self._start = start
        config, _ = load_config(*split_settings(start.words))  # mistakes are found before anything is started
        self._run = RunDir(Path(config.run.dir) / config.run.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._interrupts, self._interrupted_at = 0, 0.0
        self._stopping = False
        self._asked_at: float | None = None

    def supervise(self) -> int:
        """Until the run ends. Returns its exit code."""
        for number in (*_FORWARDED, signal.SIGINT):
            signal.signal(number, self._on_signal)
        failures, newest = 0, self._newest_step()
        while True:
            code = self._run_once()
            if self._interrupts > 1:
                return 130
            if code in (0, EXIT_REQUEUE) or self._stopping or is_for_a_person(code):
                return code
            reached = self._newest_step()
            failures = 1 if reached > newest else failures + 1
            newest = reached
            if failures > self._start.max_restarts:
                say(f"ended with {told(code)} {failures} times in a row without a new checkpoint: not started again")
                return code
            say(f"ended with {told(code)}; starting again from step {reached}")
            time.sleep(min(30.0, 2.0 ** (failures - 1)))

    def _run_once(self) -> int:
        """Exit code of the run: of torchrun's ranks the one that tells most."""
        with tempfile.TemporaryDirectory(prefix="llmtrain-") as codes:
            environment = {**os.environ, **_SETTINGS, **self._start.environment, EXIT_CODES: codes}
            # A session of its own: Ctrl-C comes here alone, and is passed on once.
            self._process = subprocess.Popen(command(self._start), env=environment, start_new_session=True)
            while self._process.poll() is None:
                if self._asked_at is not None and time.monotonic() - self._asked_at > self._start.grace_s:
                    say(f"still there after {self._start.grace_s} s: killed")
                    kill_tree(self._process.pid)
                time.sleep(_POLL_S)
            if self._start.ranks == 1:
                return self._process.returncode
            return verdict(self._process.returncode, read_codes(Path(codes)), self._start.ranks)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        self._asked_at = self._asked_at or time.monotonic()
        process = self._process
        if process is None or process.poll() is not None:
            raise SystemExit(EXIT_REQUEUE)
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted_at < _SAME_S:
                return
            self._interrupted_at = time.monotonic()
            self._interrupts += 1
            if self._interrupts > 1:
                say("leaving at once, without saving")
                kill_tree(process.pid)
                return
            say("stopping: the run saves first; Ctrl-C again leaves at once")
        for rank in ranks_of(process.pid) if self._start.ranks > 1 else [process]:
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)  # ranks do not know SIGHUP

    def _newest_step(self) -> int:
        return max(self._run.checkpoint_steps(), default=0)


def read_codes(folder: Path) -> list[int]:
    """What the ranks left; one that was killed left nothing."""
    return [int(file.read_text()) for file in folder.iterdir()]


def verdict(agents: int, codes: list[int], ranks: int) -> int:
    """What the run came to, from torchrun's exit code and its ranks'."""
    if agents == 0:
        return max(codes, default=0)  # ranks that were asked to stop leave 75, and end well for torchrun
    for code in codes:
        if is_for_a_person(code):
            return code
    if len(codes) == ranks and all(code in (0, EXIT_REQUEUE) for code in codes):
        return max(codes)
    return agents


def is_for_a_person(code: int) -> bool:
    """Whether starting again would meet the same error."""
    return code in {kind.exit_code for kind in UserError.__subclasses__()}


def told(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"{signal.Signals(-code).name}"


def ranks_of(agent: int) -> list[psutil.Process]:
    """torchrun's workers. They are signalled themselves: torchrun would report a failure."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(agent).children()
    return []


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all that it started but the checkpoint service."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for victim in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "llmtrain.service" not in victim.cmdline():  # it finishes what is queued
                    victim.kill()


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} llmtrain run: {line}", file=sys.stderr, flush=True)
