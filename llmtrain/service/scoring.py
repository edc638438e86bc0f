"""The scoring lane: one child at a time, which scores the checkpoints that wait, or the training ranks' own figures."""

import math
import time
from collections import Counter

from llmtrain import cpu, ledger, log, origin
from llmtrain.config import RunConfig
from llmtrain.errors import DiskFull
from llmtrain.ledger import Event, Score
from llmtrain.rundir import RunDir
from llmtrain.service import crash
from llmtrain.service.children import Child, Pause
from llmtrain.service.niceness import niceness
from llmtrain.service.queue import Work

_MODULE = "llmtrain.service.validate"
_GIVE_UP = 5
_STALLED_S = 1800.0
"""A scoring process that has neither computed nor read anything for so long hangs (on a file system, mostly). One that
is slow does compute: also at the lowest priority it gets the tenth of a second that counts in far less."""
_GONE_S = 60.0
"""Training that has not finished may come back for so long: after a crash, ranks take some time to start."""


class Presence:
    """Whether training is here, or may be about to come back: between a crash and the restart its GPUs look free."""

    def __init__(self, run: RunDir):
        self._run = run
        self._seen = run.metrics.stat().st_mtime if run.metrics.exists() else 0.0

    def look(self) -> bool:
        if self._run.is_training():
            self._seen = time.time()
            return True
        return time.time() - self._seen < _GONE_S and not origin.read(self._run).finished


class Scoring:
    """Advanced at every turn of the service; never waits."""

    def __init__(self, run: RunDir, lock: int):
        self._run, self._lock = run, lock
        self._child: Child | None = None
        self._where = ""
        self._asked: list[int] = []
        self._failed: Counter[int] = Counter()
        self.pause = Pause(first_s=5.0)
        self.last_error: str | None = None
        self.lacks_room = False
        """The last child ended because the disk is full."""

    @property
    def device(self) -> str:
        """Where its child computes now; empty without one."""
        return self._where if self._child is not None else ""

    @property
    def doing(self) -> str | None:
        if self._child is None:
            return None
        return f"scoring step {self._asked[0]}" if self._asked else "scoring"

    @property
    def has_given_up(self) -> bool:
        """It failed so often that nobody should wait for it; it is tried again now and then all the same."""
        return self.pause.failures >= _GIVE_UP

    def advance(self, config: RunConfig, work: Work, where: str) -> None:
        if (child := self._child) is not None:
            self._collect(child)
            if self._child is child and self._must_move(where):
                log.info(f"scoring    on {self._where} ended: {where} is the place for it now")
                self.end()  # its steps go on waiting
        elif where == "training":
            for step in work.to_score:
                self._take_over(work, step)
        elif work.to_score and self.pause.left_s == 0:
            steps = sorted(
                work.to_score, key=lambda step: (self._failed[step], step)
            )  # one that fails keeps nobody waiting
            self._start(config, steps, where)

    def _must_move(self, where: str) -> bool:
        """Whether training takes the child's GPU again, or a GPU has become free for a child on the CPU.

        Args:
            where: where it would be started now.
        """
        if self._where.startswith("cuda") and where.startswith("cuda"):
            # One GPU is as good as another, unless training takes it: that has the first ones, up to `where`.
            return _gpu(self._where) < _gpu(where)
        return self._where != where

    def end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def _start(self, config: RunConfig, waiting: list[int], where: str) -> None:
        trained_on = origin.read(self._run).device
        # Beside a GPU that may become free one at a time: a child that has to move loses what it has not finished.
        steps = waiting[:1] if where == "cpu" and trained_on != "cpu" else waiting
        arguments = [str(self._run.path), "--device", where, "--asked-by", "service.score", "--steps", *map(str, steps)]
        environment, nice = {"OMP_WAIT_POLICY": "PASSIVE"}, 0
        if where == "cpu":
            is_training = self._run.is_training()
            shares = is_training and trained_on == "cpu"
            threads = config.service.threads or max(1, cpu.usable_cores() // (2 if shares else 1))
            arguments += ["--threads", str(threads)]
            # What waits lies on the disk until it is scored; a GPU waits for the threads that give it work.
            nice = niceness(config.service.nice, len(waiting)) if is_training else 0
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._asked, self._where = list(steps), where
        self._child = Child(_MODULE, arguments, self._run.service_log, self._lock, environment, nice)

    def _collect(self, child: Child) -> None:
        code = child.exit_code  # before reading: a child that has ended has said everything
        for line in child.lines():
            score = Score.model_validate(line)
            crash.point("before-score-record")
            self._record(score)
            self._asked = [step for step in self._asked if step != score.step]
            self.pause.succeeded()
            self.last_error, self.lacks_room = None, False
        if code is None:
            if (stalled := child.stalled_s()) > _STALLED_S:
                self.end()
                self._fail("stalled", f"made no progress for {stalled:.0f} s, ended")
            return
        child.close()
        self._child = None
        if code:
            self.lacks_room = code == DiskFull.exit_code
            self._fail("score-failed", f"failed (exit code {code}); {last_line(self._run)}")

    def _fail(self, kind: ledger.EventKind, how: str) -> None:
        pause = self.pause.failed()
        step = self._asked[0] if self._asked else None
        self._failed[step or 0] += 1
        self.last_error = f"scoring step {step} {how}; next try in {pause:.0f} s"
        log.warning(self.last_error)
        ledger.append(self._run.service_events, Event(kind=kind, message=self.last_error, step=step))

    def _record(self, score: Score) -> None:
        ledger.append(self._run.scores, score)
        log.info(f"scored     step {score.step:,}: held-out loss {score.loss:.4f} ({score.how}, {score.seconds:.1f} s)")

    def _take_over(self, work: Work, step: int) -> None:
        """What the training ranks computed at the save; nothing to compare stretch by stretch."""
        found, loss = work.whole[step], work.whole[step].heldout_loss
        if loss is None:  # a save that a stop forced
            return
        measured = ledger.heldout_at_saves(self._run).get(step, {})
        self._record(
            Score(
                step=step,
                checkpoint=found.identity,
                loss=loss,
                perplexity=ledger.perplexity(loss),
                bits_per_byte=measured.get("bits_per_byte", math.nan),  # the text's size stands in no checkpoint
                targets=0,
                epoch=found.epoch,
                origin="training",
                how="the training ranks",
            )
        )


def _gpu(device: str) -> int:
    return int(device.removeprefix("cuda").removeprefix(":") or "0")


def last_line(run: RunDir) -> str:
    """The last thing that a child has written to the service's log."""
    lines = (
        run.service_log.read_text(encoding="utf-8", errors="replace").splitlines() if run.service_log.exists() else []
    )
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
