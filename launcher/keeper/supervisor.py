"""Keeps a run going on one node: starts its ranks, finds hangs, restarts after a crash.

One supervisor a node. They agree through `Meeting`: when the ranks of one node have ended badly the others end theirs,
the first node decides, and all restart together. A stop that was asked for ends with 75, an error that a person has to
fix ends with its own code, and after a crash the run resumes from its newest intact checkpoint, unless too many crashes
in a row have brought no new checkpoint. Who asks for a stop, and how the ranks are asked: stopping.py.
"""

import contextlib
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.keeper import hangs, torchrun
from launcher.keeper.exit_codes import folders_of_ranks, keep_from_cleaners, name_code, read_codes, verdict
from launcher.keeper.hang_watch import HangWatch
from launcher.keeper.meeting import Meeting, own_name
from launcher.keeper.processes import kill_tree
from launcher.keeper.ranks import Ranks
from launcher.keeper.reached import Reached
from launcher.keeper.rules import Rules
from launcher.keeper.stopping import Stopper
from launcher.keeper.terminal import say, show_last_lines
from launcher.keeper.torchrun import Start
from llmtrain import heartbeat, ledger, log
from llmtrain.errors import EXIT_CODES, EXIT_INTERRUPTED, EXIT_REQUEUE, RunFolderError, is_for_a_person
from llmtrain.rundir import RunDir

_POLL_S = 0.1
_LOOK_S = 1.0
_OTHERS_S = 10.0
"""When ranks of another node have failed, this node's are killed after half of this; the first node waits twice this
for the other nodes' reports."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended on one node."""

    agent: int
    """Exit code of torchrun, or of the rank that is alone."""
    codes: list[int]
    """That the ranks have left: one that was killed leaves none."""
    why: str | None
    """Which rank hung or fell first, and how."""
    lost_gpu: str
    """This node's name where one of its GPUs has failed; else empty."""


@dataclass(frozen=True)
class Decision:
    """What the first node says after an attempt."""

    again: bool
    code: int
    """Where it ends: the run's exit code."""


class Supervisor:
    """Of one node."""

    def __init__(self, start: Start, run: RunDir, rules: Rules, meeting: Meeting, logs: Path, stop_file: Path):
        """`logs`: for the ranks' output. `stop_file`: its appearance asks for the end, as `llmtrain stop` does."""
        self._start, self._run, self._rules, self._meeting, self._logs = start, run, rules, meeting, logs
        self._failures = 0
        self._reached = Reached(run)
        self.stopper = Stopper(start, run, rules, stop_file)
        self.lost_gpus_on: list[str] = []
        """Names of the nodes whose GPUs have failed, which is why the job is to be queued again; the first node's to
        know."""

    def supervise(self, since: float | None = None) -> int:
        """Until the run ends; returns its exit code. `since`: when the first start of this job was, if this is none."""
        self.stopper.listen()
        attempt, newest = 0, self._reached.look()
        while True:
            outcome = self._attempt(attempt, since)
            if self.stopper.leaves_at_once:
                return EXIT_INTERRUPTED
            self._meeting.tell("ended", attempt, asdict(outcome))
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
        told = self._meeting.wait_for_all("ended", attempt, 2 * _OTHERS_S)
        ended = [Outcome(**outcome) for outcome in told.values()]
        agents = [outcome.agent for outcome in ended]
        if len(ended) < self._start.num_nodes:
            agents.append(1)
        codes = [code for outcome in ended for code in outcome.codes]
        code = verdict(agents, codes, self._start.ranks * self._start.num_nodes)
        if code in (0, EXIT_REQUEUE) or is_for_a_person(code):
            return Decision(again=False, code=code)
        reached = self._reached.look()
        if gone := self._reached.what_is_gone():
            say(gone)
            return Decision(again=False, code=RunFolderError.exit_code)
        if self.stopper.reason is not None:  # before its ranks could listen, or one fell while they saved
            say(f"ended without saving: the same command goes on from step {reached:,}")
            return Decision(again=False, code=EXIT_REQUEUE)
        self._failures = 1 if reached > newest else self._failures + 1
        why = next((outcome.why for outcome in ended if outcome.why), f"ended with {name_code(code)}")
        if self._failures > self._rules.max_restarts:
            why = f"{why}, {self._failures} times in a row without a new checkpoint: not started again"
            say(why)
            final = code if code > 0 else 1
            self._note("failed", f"exit code {final}: {why}", reached)
            return Decision(again=False, code=final)
        if self._rules.may_requeue and (lost := [outcome.lost_gpu for outcome in ended if outcome.lost_gpu]):
            self.lost_gpus_on = lost
            why = f"{why}: a GPU of {', '.join(lost)} has failed"
            say(f"{why}; the job goes on from step {reached:,} on other nodes")
            self._note("restarted", why, reached)
            return Decision(again=False, code=EXIT_REQUEUE)
        say(f"{why}; starting again from step {reached:,}")
        self._note("restarted", why, reached)
        self._rest(min(30.0, 2.0 ** min(self._failures - 1, 5)) if self._failures > 1 else 0.0)
        return Decision(again=self.stopper.reason is None, code=EXIT_REQUEUE)

    def _note(self, kind: ledger.EventKind, message: str, step: int) -> None:
        """A line for reports; whatever becomes of it, the other nodes wait for the decision."""
        with contextlib.suppress(OSError):
            if self._run.config.exists():
                ledger.append(self._run.events, ledger.Event(kind=kind, message=message, step=step))

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.stopper.reason is None:
            self._meeting.beat()
            self.stopper.look()
            time.sleep(_POLL_S)

    # One attempt

    def _attempt(self, attempt: int, since: float | None) -> Outcome:
        """Start this node's ranks, and stay with them until they have ended."""
        restarted = since is not None or attempt > 0
        again = restarted and self._reached.has_begun(since)
        place = self._meeting.place(attempt) if self._start.num_nodes > 1 else None
        if not self._start.is_alone:
            # A disk that fails later than at the first attempt ends the ranks, which say so.
            with contextlib.suppress(OSError) if attempt else contextlib.nullcontext():
                self._logs.mkdir(parents=True, exist_ok=True)
        with folders_of_ranks(self._logs.parent) as (codes, beats):
            for_ranks = {EXIT_CODES: str(codes), heartbeat.FOLDER: str(beats), log.RANK_LOGS: str(self._logs)}
            # A session of its own: Ctrl-C comes here alone, and is passed on once.
            process = subprocess.Popen(
                torchrun.command(self._start, place, again, codes.with_name("torchrun")),
                env=torchrun.environment(self._start, restarted, for_ranks),
                start_new_session=True,
                preexec_fn=torchrun.ignore_stops,  # noqa: PLW1509  there are no threads here
            )
            self.stopper.follow(process)
            ranks = Ranks(process.pid, codes, self._logs)
            hang = self._stay(process, attempt, ranks, beats)
            if process.returncode:
                hangs.kill_all(beats)  # torchrun itself was killed
            left = [each.code for each in read_codes(codes).values()]
            lost_gpu = own_name() if process.returncode and ranks.gpu_is_lost() else ""
        was_said = any(map(is_for_a_person, left)) and not ranks.is_unheard  # by rank 0, on the terminal
        if self._start.is_alone:
            left = [process.returncode] if process.returncode >= 0 else []
        elif process.returncode and hang is None and self.stopper.reason is None and not was_said:
            for file, lines in ranks.last_words().items():
                show_last_lines(file, lines)
        return Outcome(process.returncode, left, hang or ranks.describe(), lost_gpu)

    def _stay(self, process: "subprocess.Popen[bytes]", attempt: int, ranks: Ranks, beats: Path) -> str | None:
        """Until the process has ended. Returns what hung, if that was why."""
        hang: str | None = None
        watch = HangWatch(self._meeting, attempt, beats, self._rules.hang_s)
        next_look, others_failed_at = 0.0, None
        while process.poll() is None:
            now = time.monotonic()
            self.stopper.kill_the_late()
            ranks.kill_after_a_fall()
            if others_failed_at is not None and now - others_failed_at > _OTHERS_S / 2:
                kill_tree(process.pid)
            if now >= next_look:
                next_look = now + _LOOK_S
                ranks.meet()
                keep_from_cleaners(ranks.codes, beats)
                self._meeting.beat()
                if self._start.node == 0:
                    self._reached.look()
                self.stopper.look()
                if self.stopper.reason is None and hang is None and self._rules.hang_s and (named := watch.look()):
                    hang = self._write_down(named, beats, self._logs / f"stacks-{attempt}-node-{self._start.node}.txt")
                if hang is not None:
                    kill_tree(process.pid)
                if others_failed_at is None and self._others_failed(attempt):
                    others_failed_at = now
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
        described = "; ".join(each.describe() for each in named)
        try:
            hangs.write_stacks(beats, stacks)
        except OSError as error:  # its disk is full, or what they hang on
            say(f"{described}: the stacks of all ranks cannot be written: {error}")
            return described
        say(f"{described}: the stacks of all ranks are in {stacks}")
        return f"{described} (stacks: {stacks})"
