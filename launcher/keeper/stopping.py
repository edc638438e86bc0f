"""Stopping the ranks of one node: what asks for it and when, who of them was asked already, and how long to wait.

A signal, `llmtrain stop` (through a file), or a time limit that comes near. Each rank is asked once, by a signal, and
saves before it leaves; what is still there when its time is over is killed.
"""

import contextlib
import math
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType

import psutil

from launcher.keeper.processes import ignores, kill_tree, ranks_of
from launcher.keeper.reached import slowest_save
from launcher.keeper.rules import Rules
from launcher.keeper.terminal import say
from launcher.keeper.torchrun import Start
from llmtrain.rundir import RunDir

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SAME_S = 0.3
"""Two SIGINTs within this time count as one: wrappers such as `timeout` pass it on twice."""
_AROUND_SAVE_S = 30.0
"""Allowed on top of a save: to agree on a step before it, and to exit after it."""
_WAY_BACK_S = 45.0
"""Reserved before the time limit, for the nodes to agree and to requeue the job: ranks that still run are killed."""
_SLURM_IS_EARLY_S = 60.0
"""SLURM may send the signal that announces the time limit so much earlier than it was asked to."""


def asks_to_stop(stop_file: Path) -> bool:
    """Whether `llmtrain stop` has left that file; False while the disk does not answer."""
    with contextlib.suppress(OSError):
        return stop_file.exists()
    return False


class Stopper:
    """Of one node."""

    def __init__(self, start: Start, run: RunDir, rules: Rules, stop_file: Path):
        """`stop_file`: its appearance asks for the end, as `llmtrain stop` does."""
        self._start, self._run, self._rules, self._stop_file = start, run, rules, stop_file
        self._began_at = time.time()
        self._process: subprocess.Popen[bytes] | None = None
        """That has the ranks; between two attempts one that has ended."""
        self._interrupts, self._interrupted_at = 0, 0.0
        self._asked_at: float | None = None
        """When the first rank was asked; they have a limited time from then on."""
        self._asked: set[int] = set()
        """Process ids of ranks that have been sent the signal to stop."""
        self._gave_up = False
        """Whether ranks that were asked to stop have been killed, because they took too long."""
        self.reason: str | None = None
        """What asked the run to stop: a signal's name, "time limit" or "llmtrain stop"; None: nothing has."""
        self.met_limit = False
        """That was because of the time limit, which SLURM's signal announces too."""

    @property
    def leaves_at_once(self) -> bool:
        """Ctrl-C came twice: without a save."""
        return self._interrupts > 1

    def listen(self) -> None:
        """From now on signals ask the run to stop."""
        for number in (*_SIGNALS, signal.SIGINT):
            # Under nohup the end of the terminal is to end nothing; its ranks inherit that.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def follow(self, process: "subprocess.Popen[bytes]") -> None:
        """From now on the ranks of this process are the ones to ask."""
        self._process = process
        if self.reason is not None:  # it came while there was no process yet
            self._asked_at = self._asked_at or time.monotonic()

    def look(self) -> None:
        """About once a second: for a reason to stop, and for ranks that were not there, or did not listen, when the
        others were asked."""
        if self.reason is None:
            self._look_for_a_reason()
        if self._asked_at is not None:
            self._ask(signal.SIGTERM)

    def kill_the_late(self) -> None:
        """Ranks that were asked to stop and have had their time."""
        if self._asked_at is None or self._process is None:
            return
        waited_s, left_s = time.monotonic() - self._asked_at, (self._rules.ends_at or math.inf) - time.time()
        # At the limit itself SLURM would end this process too, and not queue the job again.
        is_last_moment = left_s < _WAY_BACK_S and left_s < self.lead_s() / 2
        if not is_last_moment and (waited_s <= self._rules.grace_s or waited_s <= self._patience_s()):
            return
        if not self._gave_up:
            self._gave_up = True
            why = f", {left_s:.0f} s before the time limit" if is_last_moment else ""
            say(f"still there after {waited_s:.0f} s{why}: killed")
        kill_tree(self._process.pid)

    def lead_s(self) -> float:
        """Seconds before the time limit at which the run is to stop; more where its saves have taken longer."""
        if self._rules.ends_at is None:
            return 0.0
        lead_s = max(self._rules.lead_s, _AROUND_SAVE_S + 2.0 * slowest_save(self._run))
        return min(lead_s, (self._rules.ends_at - self._began_at) / 2)

    def _patience_s(self) -> float:
        """For a save that is known to take long; 0 before the first."""
        slowest_s = slowest_save(self._run)
        return max(self.lead_s(), _AROUND_SAVE_S + 2.0 * slowest_s if slowest_s else 0.0)

    def _look_for_a_reason(self) -> None:
        ends_at, lead_s = self._rules.ends_at, self.lead_s()
        if asks_to_stop(self._stop_file):
            self.reason = "llmtrain stop"
        elif ends_at is not None and time.time() > ends_at - lead_s:
            self.reason, self.met_limit = "time limit", True
        else:
            return
        self._ask(signal.SIGUSR2)
        say(f"stopping, because of {self.reason}: the run saves first")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted_at < _SAME_S:
                return
            self._interrupted_at = time.monotonic()
            self._interrupts += 1
        if self.reason is None:
            self.reason, self.met_limit = signal.Signals(number).name, self._limit_is_announced()
        process = self._process
        if process is None or process.poll() is not None:
            return
        if self.leaves_at_once:
            kill_tree(process.pid)
            say("leaving at once, without saving")
            return
        self._ask(number)  # whatever becomes of the line: the terminal may have gone
        hint = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
        say(f"{signal.Signals(number).name}: the run saves and stops{hint}")

    def _limit_is_announced(self) -> bool:
        """Whether a signal that comes now may be the one that SLURM sends before the time limit."""
        early_s = max(self._rules.lead_s, self.lead_s()) + _SLURM_IS_EARLY_S
        return self._rules.ends_at is not None and time.time() > self._rules.ends_at - early_s

    def _ask(self, number: int) -> None:
        self._asked_at = self._asked_at or time.monotonic()
        if self._process is None:
            return
        asked = signal.SIGTERM if number == signal.SIGHUP else number  # which would kill ranks that do not listen yet
        for rank in [self._process] if self._start.is_alone else ranks_of(self._process.pid):
            if rank.pid in self._asked or ignores(rank.pid, asked):  # those that do not listen yet are asked later
                continue
            self._asked.add(rank.pid)
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                rank.send_signal(asked)
