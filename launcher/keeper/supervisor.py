"""Keeps a run going on one node: starts its ranks, passes signals on, finds hangs, restarts after a crash.

One supervisor a node. They agree through `Meeting`: when the ranks of one node have ended badly the others end theirs,
the first node decides, and all restart together. A stop that was asked for ends with 75, an error that a person has to
fix ends with its own code, and after a crash the run resumes from its newest intact checkpoint, unless too many crashes
in a row have brought no new checkpoint.
"""

import contextlib
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launcher.keeper import hangs, torchrun
from launcher.keeper.hang_watch import HangWatch
from launcher.keeper.meeting import Meeting, own_name
from launcher.keeper.processes import (
    folders_of_ranks,
    ignores,
    keep_from_cleaners,
    kill_tree,
    name_code,
    ranks_of,
    read_codes,
    verdict,
)
from launcher.keeper.ranks import Ranks
from launcher.keeper.reached import Reached, slowest_save
from launcher.keeper.torchrun import Start
from llmtrain import heartbeat, ledger, log
from llmtrain.errors import EXIT_CODES, EXIT_REQUEUE, RunFolderError, is_for_a_person
from llmtrain.rundir import RunDir

_POLL_S = 0.1
_LOOK_S = 1.0
_SAME_S = 0.3
"""Two SIGINTs within this time count as one: wrappers such as `timeout` pass it on twice."""
_LINGER_S = 1.0
"""Where one rank has met an error that a person has to mend, the others say so too. After any other end of one rank
they are killed at once: they can neither continue nor save, and torchrun would wait for them for 30 s.
"""
_OTHERS_S = 10.0
"""When ranks of another node have failed, this node's are killed after half of this; the first node waits twice this
for the other nodes' reports."""
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_AROUND_SAVE_S = 30.0
"""Allowed on top of a save: to agree on a step before it, and to exit after it."""
_WAY_BACK_S = 45.0
"""Reserved before the time limit, for the nodes to agree and to requeue the job: ranks that still run are killed."""
_SLURM_IS_EARLY_S = 60.0
"""SLURM may send the signal that announces the time limit so much earlier than it was asked to."""


@dataclass(frozen=True)
class Rules:
    """Limits: how often to restart, and how long to wait for what."""

    max_restarts: int = 3
    """After failures in a row without a new checkpoint."""
    hang_s: float = 600.0
    """A rank that makes no progress for so long hangs; 0: nobody looks."""
    grace_s: float = 600.0
    """For ranks that were asked to stop, until they are killed: they save first. More where saves take longer, less
    before the time limit."""
    ends_at: float | None = None
    """When the job is killed, in seconds since 1970."""
    lead_s: float = 120.0
    """The run saves and stops so long before that; at most half of what was left at the start."""
    may_requeue: bool = False
    """A job that can start on other nodes: there it goes on once a GPU is lost. Else it is started again here."""


@dataclass(frozen=True)
class Decision:
    """What the first node says after an attempt."""

    again: bool
    code: int


class Supervisor:
    """Of one node."""

    def __init__(self, start: Start, run: RunDir, rules: Rules, meeting: Meeting, logs: Path, stop_file: Path):
        """`logs`: for the ranks' output. `stop_file`: its appearance asks for the end, as `llmtrain stop` does."""
        self._start, self._run, self._rules, self._meeting = start, run, rules, meeting
        self._logs, self._stop_file = logs, stop_file
        self._process: subprocess.Popen[bytes] | None = None
        self._interrupts, self._interrupted_at = 0, 0.0
        self._asked_at: float | None = None
        self._asked: set[int] = set()
        """Process ids of ranks that have been sent the signal to stop."""
        self._failures = 0
        self._began_at = time.time()
        self._ordered_at: float | None = None
        self._reached = Reached(run)
        self._gave_up = False
        """Whether ranks that were asked to stop have been killed, because they took too long."""
        self.stopped_by: str | None = None
        """What asked the run to stop: a signal's name, "time limit" or "llmtrain stop"."""
        self.met_limit = False
        """That was because of the time limit, which SLURM's signal announces too."""
        self.lost_gpus_on: list[str] = []
        """Names of the nodes whose GPUs have failed, which is why the job is to be queued again; the first node's to
        know."""

    def supervise(self, since: float | None = None) -> int:
        """Until the run ends; returns its exit code. `since`: when the first start of this job was, if this is none."""
        for number in (*_SIGNALS, signal.SIGINT):
            # Under nohup the end of the terminal is to end nothing; its ranks inherit that.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        attempt, newest, self._ordered_at = 0, self._reached.look(), since
        while True:
            outcome = self._attempt(attempt, restarted=since is not None or attempt > 0)
            if self._interrupts > 1:
                return 130
            self._meeting.tell("ended", attempt, outcome)
            if self._start.node == 0:
                self._meeting.tell("decision", attempt, asdict(self._decide(attempt, newest)))
            decision = Decision(**self._meeting.wait_for_first("decision", attempt))
            if not decision.again:
                return decision.code
            newest = self._reached.look()
            attempt += 1

    # What comes next

    def _decide(self, attempt: int, newest: int) -> Decision:
        """On the first node, after all nodes have told how their ranks ended."""
        ended = self._meeting.wait_for_all("ended", attempt, 2 * _OTHERS_S)
        codes = [code for outcome in ended.values() for code in outcome["codes"]]
        agents = [outcome["agent"] for outcome in ended.values()]
        if len(ended) < self._start.num_nodes:
            agents.append(1)
        code = verdict(agents, codes, self._start.ranks * self._start.num_nodes)
        reached = self._reached.look()
        if code not in (0, EXIT_REQUEUE) and not is_for_a_person(code) and (gone := self._reached.what_is_gone()):
            say(gone)
            return Decision(again=False, code=RunFolderError.exit_code)
        if self.stopped_by is not None and code != 0 and not is_for_a_person(code):
            if code != EXIT_REQUEUE:  # before its ranks could listen, or one fell while they saved
                say(f"ended without saving: the same command goes on from step {reached:,}")
            return Decision(again=False, code=EXIT_REQUEUE)
        if code in (0, EXIT_REQUEUE) or is_for_a_person(code):
            return Decision(again=False, code=code)
        self._failures = 1 if reached > newest else self._failures + 1
        why = next((outcome["why"] for outcome in ended.values() if outcome["why"]), f"ended with {name_code(code)}")
        if self._failures > self._rules.max_restarts:
            why = f"{why}, {self._failures} times in a row without a new checkpoint: not started again"
            say(why)
            self._note("failed", f"exit code {code if code > 0 else 1}: {why}", reached)
            return Decision(again=False, code=code if code > 0 else 1)
        if self._rules.may_requeue and (lost := [each["lost_gpu"] for each in ended.values() if each["lost_gpu"]]):
            self.lost_gpus_on = lost
            why = f"{why}: a GPU of {', '.join(lost)} has failed"
            say(f"{why}; the job goes on from step {reached:,} on other nodes")
            self._note("restarted", why, reached)
            return Decision(again=False, code=EXIT_REQUEUE)
        say(f"{why}; starting again from step {reached:,}")
        self._note("restarted", why, reached)
        self._rest(min(30.0, 2.0 ** min(self._failures - 1, 5)) if self._failures > 1 else 0.0)
        stopped = self.stopped_by is not None
        return Decision(again=not stopped, code=EXIT_REQUEUE if stopped else code)

    def _note(self, kind: ledger.EventKind, message: str, step: int) -> None:
        """A line for reports; whatever becomes of it, the other nodes wait for the decision."""
        with contextlib.suppress(OSError):
            if self._run.config.exists():
                ledger.append(self._run.events, ledger.Event(kind=kind, message=message, step=step))

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.stopped_by is None:
            self._meeting.beat()
            self._look_for_reasons_to_stop()
            time.sleep(_POLL_S)

    # One attempt

    def _attempt(self, attempt: int, restarted: bool) -> dict[str, Any]:
        """Start this node's ranks and stay with them; returns how they ended."""
        again = restarted and self._reached.has_begun(self._ordered_at)
        place = self._meeting.place(attempt) if self._start.num_nodes > 1 else None
        if not self._is_alone:
            self._logs.mkdir(parents=True, exist_ok=True)
        with folders_of_ranks(self._logs.parent) as (codes, beats):
            for_ranks = {EXIT_CODES: str(codes), heartbeat.FOLDER: str(beats), log.RANK_LOGS: str(self._logs)}
            # A session of its own: Ctrl-C comes here alone, and is passed on once.
            process = self._process = subprocess.Popen(
                torchrun.command(self._start, place, again, codes.with_name("torchrun")),
                env=torchrun.environment(self._start, restarted, for_ranks),
                start_new_session=True,
                preexec_fn=torchrun.ignore_stops,  # noqa: PLW1509  there are no threads here
            )
            if self.stopped_by is not None:  # asked for while there was no process yet
                self._asked_at = self._asked_at or time.monotonic()
            ranks = Ranks(process.pid, codes, self._logs)
            hang = self._stay(process, attempt, ranks, beats)
            if process.returncode:
                hangs.kill_all(beats)  # torchrun itself was killed
            left = [each.code for each in read_codes(codes).values()]
            lost_gpu = own_name() if process.returncode and ranks.gpu_is_lost() else ""
        if self._is_alone:
            left = [process.returncode] if process.returncode >= 0 else []
        elif (
            process.returncode
            and (ranks.is_unheard or not any(map(is_for_a_person, left)))
            and self.stopped_by is None
            and hang is None
        ):
            for file, lines in ranks.last_words().items():
                with log.terminal_may_go():
                    print(f"\nthe last lines of {file}:", *lines, sep="\n  ", file=sys.stderr, flush=True)
        return {"agent": process.returncode, "codes": left, "why": hang or ranks.describe(), "lost_gpu": lost_gpu}

    def _stay(self, process: "subprocess.Popen[bytes]", attempt: int, ranks: Ranks, beats: Path) -> str | None:
        """Until the process has ended. Returns what hung, if that was why."""
        hang: str | None = None
        watch = HangWatch(self._meeting, attempt, beats, self._rules.hang_s)
        next_look, fallen_at, others_failed_at = 0.0, None, None
        while process.poll() is None:
            now = time.monotonic()
            self._kill_the_late(process)
            if fallen_at is None and ranks.has_fallen():
                fallen_at = now
            if fallen_at is not None and now - fallen_at >= (_LINGER_S if ranks.may_linger else 0.0):
                ranks.kill()
            if now >= next_look:
                next_look = now + _LOOK_S
                ranks.meet()
                keep_from_cleaners(ranks.codes, beats)
                self._meeting.beat()
                if self._start.node == 0:
                    self._reached.look()
                self._look_for_reasons_to_stop()
                if self._asked_at is not None:
                    self._ask_to_stop(signal.SIGTERM)  # ranks that were not there yet
                elif self._rules.hang_s and hang is None and (named := watch.look()):
                    hang = self._write_down(named, beats, self._logs / f"stacks-{attempt}-node-{self._start.node}.txt")
                if hang is not None:
                    kill_tree(process.pid)
                if others_failed_at is None and self._others_failed(attempt):
                    others_failed_at = now
            if others_failed_at is not None and now - others_failed_at > _OTHERS_S / 2:
                kill_tree(process.pid)
            time.sleep(_POLL_S)
        return hang

    def _others_failed(self, attempt: int) -> bool:
        if self._start.num_nodes == 1:
            return False
        if self._meeting.first_is_gone() and 0 not in self._meeting.told("decision", attempt):
            return True  # its supervisor has failed, and nobody decides any more
        return any(outcome["agent"] for outcome in self._meeting.told("ended", attempt).values())

    def _write_down(self, named: list[hangs.Seen], beats: Path, stacks: Path) -> str:
        """Stacks of all ranks, and who hangs."""
        hangs.write_stacks(beats, stacks)
        described = "; ".join(each.describe() for each in named)
        say(f"{described}: the stacks of all ranks are in {stacks}")
        return f"{described} (stacks: {stacks})"

    def _kill_the_late(self, process: "subprocess.Popen[bytes]") -> None:
        """Ranks that were asked to stop and have had their time."""
        if self._asked_at is None:
            return
        waited_s, left_s = time.monotonic() - self._asked_at, (self._rules.ends_at or math.inf) - time.time()
        # At the limit itself SLURM would end this process too, and not queue the job again.
        is_last_moment = left_s < _WAY_BACK_S and left_s < self._lead_s() / 2
        if not is_last_moment and (waited_s <= self._rules.grace_s or waited_s <= self._patience_s()):
            return
        if not self._gave_up:
            self._gave_up = True
            why = f", {left_s:.0f} s before the time limit" if is_last_moment else ""
            say(f"still there after {waited_s:.0f} s{why}: killed")
        kill_tree(process.pid)

    def _patience_s(self) -> float:
        """For a save that is known to take long; 0 before the first."""
        slowest_s = slowest_save(self._run)
        return max(self._lead_s(), _AROUND_SAVE_S + 2.0 * slowest_s if slowest_s else 0.0)

    # Reasons to stop

    def _look_for_reasons_to_stop(self) -> None:
        if self.stopped_by is not None:
            return
        ends_at, lead_s = self._rules.ends_at, self._lead_s()
        if self._stop_file.exists():
            self.stopped_by = "llmtrain stop"
        elif ends_at is not None and time.time() > ends_at - lead_s:
            self.stopped_by, self.met_limit = "time limit", True
        else:
            return
        self._ask_to_stop(signal.SIGUSR2)
        say(f"stopping, because of {self.stopped_by}: the run saves first")

    def _lead_s(self) -> float:
        """Before the time limit; longer where the saves of this run have taken longer."""
        if self._rules.ends_at is None:
            return 0.0
        lead_s = max(self._rules.lead_s, _AROUND_SAVE_S + 2.0 * slowest_save(self._run))
        return min(lead_s, (self._rules.ends_at - self._began_at) / 2)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted_at < _SAME_S:
                return
            self._interrupted_at = time.monotonic()
            self._interrupts += 1
        if self.stopped_by is None:
            self.stopped_by, self.met_limit = signal.Signals(number).name, self._limit_is_announced()
        process = self._process
        if process is None or process.poll() is not None:
            return
        if self._interrupts > 1:
            kill_tree(process.pid)
            say("leaving at once, without saving")
            return
        self._ask_to_stop(number)  # whatever becomes of the line: the terminal may have gone
        hint = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
        say(f"{signal.Signals(number).name}: the run saves and stops{hint}")

    def _limit_is_announced(self) -> bool:
        """Whether a signal that comes now may be the one that SLURM sends before the time limit."""
        early_s = max(self._rules.lead_s, self._lead_s()) + _SLURM_IS_EARLY_S
        return self._rules.ends_at is not None and time.time() > self._rules.ends_at - early_s

    @property
    def _is_alone(self) -> bool:
        """One rank: there is no torchrun."""
        return self._start.ranks * self._start.num_nodes == 1

    def _ask_to_stop(self, number: int) -> None:
        self._asked_at = self._asked_at or time.monotonic()
        process = self._process
        if process is None:
            return
        asked = signal.SIGTERM if number == signal.SIGHUP else number  # which would kill ranks that do not listen yet
        for rank in [process] if self._is_alone else ranks_of(process.pid):
            if rank.pid in self._asked or ignores(rank.pid, asked):  # those that do not listen yet are asked later
                continue
            self._asked.add(rank.pid)
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                rank.send_signal(asked)


def say(line: str) -> None:
    # RuntimeError: a signal handler that prints while a print was interrupted.
    with log.terminal_may_go(), contextlib.suppress(RuntimeError):
        print(f"{time.strftime('%H:%M:%S')} llmtrain: {line}", file=sys.stderr, flush=True)
