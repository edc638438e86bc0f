"""The service's loop: look, start and collect children, rank, delete what may go, say how things are."""

import contextlib
import os
import time
from dataclasses import dataclass
from typing import IO, Literal

from llmtrain import early_stop, files, jsonl, ledger, log, retention, scoring_place
from llmtrain.config import RunConfig, load_config
from llmtrain.errors import EXIT_REQUEUE, HubError, is_full_or_forbidden
from llmtrain.ledger import Event, Status
from llmtrain.rundir import RunDir
from llmtrain.service import crash
from llmtrain.service.board import Board
from llmtrain.service.queue import Inspector, Work
from llmtrain.service.reserve import NO_ROOM, Reserve
from llmtrain.service.scoring import Presence, Scoring
from llmtrain.service.uploading import Uploading

_TURN_S = 0.25
_SAY_S = 2.0
_AFTER_ERROR_S = 5.0
_DRAIN_TRIES = 12
"""So often in a row a service that somebody waits for meets a full or read-only disk, before it ends with its code."""
_TIDY_S = 600.0
"""Between attempts to remove what earlier deletions had to leave (NFS keeps files that are being read)."""
_LINGER_S = 3.0
"""An idle service stays for so long after training has ended: training may be about to restart."""


@dataclass
class ServiceOptions:
    """What the command line asks for."""

    drain: bool = False
    """End when nothing waits, whether training goes on or not."""
    only: Literal["prune"] | None = None
    overrides: tuple[str, ...] = ()
    """Settings over the run's config.yaml."""


class Service:
    """One for a run, behind the run's service lock."""

    def __init__(self, run: RunDir, lock: IO[str], options: ServiceOptions):
        self._run, self._lock, self._options = run, lock, options
        self._config_stamp = 0
        self._config = self._read_config()
        self._inspector, self._board = Inspector(run), Board(run)
        self._presence, self._scoring = Presence(run), Scoring(run, lock.fileno())
        self._uploading = Uploading(run, lock.fileno(), self._config.hub.pause_s)
        self._said, self._idle_since, self._tidied = 0.0, time.monotonic(), time.monotonic()
        self._last: Status | None = None
        self._reserve = Reserve(run)
        self._trouble: str | None = None
        """What ended the last turn before its time."""
        self._troubles = 0
        """So many turns in a row."""
        self.stop_requested = False

    def serve(self) -> int:
        """Work until there is nothing left to do. Returns the exit code."""
        for records in (self._run.scores, self._run.uploads, self._run.service_events):
            jsonl.mend(records)
        retention.remove_leftovers(self._run)
        files.remove_asides(self._run.service)
        self._reserve.fill(self._config.checkpoint.keep_best)
        try:
            while not self.stop_requested and self._is_ours():
                try:
                    if not self.turn():
                        self._reserve.release()  # there is nothing left to write
                        return 0
                    self._trouble, self._troubles = None, 0
                except OSError as error:  # a full disk, a file system that is away: it may come back
                    self._wait_after(error)
                time.sleep(_TURN_S)
            return EXIT_REQUEUE
        finally:
            self._scoring.end()
            self._uploading.end()
            self._board.close()

    def _wait_after(self, error: OSError) -> None:
        """Of what ended a turn, after making room where that was missing.

        Raises:
            OSError: that error, where somebody waits for the end, and a person has to mend it.
        """
        self._troubles += 1
        waited_for = self._options.drain or self._options.only is not None
        if waited_for and self._troubles >= _DRAIN_TRIES and is_full_or_forbidden(error):
            raise error
        self._trouble = f"{type(error).__name__}: {error}; trying again in {_AFTER_ERROR_S:.0f} s"
        log.warning(f"service    {self._run.service}: {self._trouble}")
        if error.errno in NO_ROOM:
            self._reserve.give_way()
        with contextlib.suppress(OSError):
            # The time stays that of the last look: what was saved since has not been seen.
            if (last := self._last or ledger.status(self._run)) is not None:
                ledger.write(self._run.service_status, last.model_copy(update={"last_error": self._trouble}))
        time.sleep(_AFTER_ERROR_S)

    @property
    def given_up(self) -> list[int]:
        """Steps without a score, where scoring has failed so often that nobody waits for it any more."""
        return self._last.to_score if self._last is not None and self._scoring.has_given_up else []

    def turn(self) -> bool:
        """One round; False when the service may end."""
        looked = time.time()
        config = self._config = self._read_config()
        if self._options.only == "prune":
            return self._prune_once(config)
        where = scoring_place.find(self._run, config, self._presence.look(), self._scoring.device)
        config = config.model_copy(update={"service": config.service.model_copy(update={"score": where})})
        work = self._inspector.look(config, scoring=where != "training")
        self._scoring.advance(config, work, where)
        if self._scoring.lacks_room:
            self._reserve.give_way()
        for step, reason in self._uploading.advance(config, work, hurry=self._options.drain):
            self._inspector.reject(step, reason)
        self._prune(config, work)
        self._ask_to_stop(config, work)
        scoring = bool(self._scoring.doing or work.to_score) and not self._scoring.has_given_up
        uploading = bool(self._uploading.doing) or self._uploading.waits(config, work)
        status = self._say(work, looked, idle=not scoring and not uploading and not self._inspector.waits)
        self._board.show(work.scores, status)
        alone = self._options.drain or not self._run.is_training()
        if alone and not scoring and uploading and self._uploading.problem is not None:
            raise HubError(self._uploading.problem)  # a person has to mend it, and then start a service with it
        if not status.idle:
            self._idle_since = time.monotonic()
            return True
        if self._options.drain:
            return False
        return self._run.is_training() or time.monotonic() - self._idle_since < _LINGER_S

    def _prune_once(self, config: RunConfig) -> bool:
        """After a look at whether the Hub still holds what was uploaded. True while that is going on.

        As `service.score` is set, not as things are now: what has no score yet waits for one, as the preview says.
        """
        if config.hub.repo is not None and self._uploading.is_looking:
            self._uploading.advance(config, Work(), hurry=False)
            if not self._uploading.is_looking and not self._uploading.trusts_uploads(config):
                log.warning("nothing is deleted that only an upload would be left of: the Hub could not be asked")
            return True
        self._prune(config, self._inspector.look(config, scoring=True))
        return False

    def _prune(self, config: RunConfig, work: Work) -> None:
        if config.service.start == "never" and not self._options.only:
            return
        if time.monotonic() - self._tidied > _TIDY_S:
            self._tidied = time.monotonic()
            retention.remove_leftovers(self._run)
            self._reserve.fill(config.checkpoint.keep_best)
        trusts = self._uploading.trusts_uploads(config)
        doomed, _ = retention.deletable(self._run, config, max(work.whole, default=None), trusts)
        doomed &= set(work.whole)
        if doomed:
            retention.remove(self._run, doomed, on_rename=lambda: crash.point("between-rename-and-delete"))
            log.info(f"deleted    {', '.join(f'step {step:,}' for step in sorted(doomed))}: not kept by the rule")
            self._reserve.fill(config.checkpoint.keep_best)

    def _ask_to_stop(self, config: RunConfig, work: Work) -> None:
        patience = config.service.patience
        if patience is None or early_stop.asked_to_end(self._run, patience) or not self._run.is_training():
            return
        # After `restore`, or without checkpoints that did not verify, the ledger has scores of a later life's steps:
        # they count again when this life has come there, and saved.
        newest = max(work.whole, default=-1)
        scores = {
            step: score
            for step, score in work.scores.items()
            if step <= newest and (step not in work.whole or work.is_scored(step))
        }
        later = early_stop.saves_without_improvement(scores)
        if len(later) < patience:
            return
        # A save that a stop forced may lie a few steps after the last one: it may be the best, and else says nothing.
        # Training measures the held-out loss before every save but those.
        measured = {step for step, found in work.whole.items() if found.heldout_loss is not None}
        measured |= ledger.heldout_at_saves(self._run).keys()
        since = sum(step in measured for step in later)
        if since < patience:
            return
        message = f"the held-out loss has not improved for {since} saves (service.patience={patience})"
        asked = early_stop.EarlyStop(message=message, saves=since)
        files.write_atomic(self._run.early_stop, asked.model_dump_json() + "\n")
        ledger.append(self._run.service_events, Event(kind="early-stop", message=message, step=max(scores)))
        log.info(f"enough     {message}: asked training to stop")

    def _say(self, work: Work, looked: float, idle: bool) -> Status:
        """Replace status.json when something has changed, and now and then as a sign of life."""
        lanes = (self._uploading, self._scoring, self._inspector)
        said_last = (self._trouble, *(lane.last_error for lane in lanes))
        status = Status(
            pid=os.getpid(),
            host=os.uname().nodename,
            time=looked,
            doing=[what for what in (self._scoring.doing, self._uploading.doing) if what],
            idle=idle,
            to_score=work.to_score,
            to_upload=work.to_upload,
            next_try_s=max(self._scoring.pause.left_s, self._uploading.pause.left_s) or None,
            last_error=next((said for said in said_last if said), None),
            quarantined=self._run.quarantined_steps(),
            problem=self._uploading.problem,
        )
        fixed = {"time", "next_try_s"}
        changed = self._last is None or status.model_dump(exclude=fixed) != self._last.model_dump(exclude=fixed)
        if changed or time.monotonic() - self._said > _SAY_S:
            ledger.write(self._run.service_status, status)
            self._last, self._said = status, time.monotonic()
        return status

    def _read_config(self) -> RunConfig:
        """The run's configuration; a resumed run may have changed it."""
        stamp = self._run.config.stat().st_mtime_ns
        if stamp == self._config_stamp:
            return self._config
        self._config_stamp = stamp
        return load_config(self._run.config, self._options.overrides)[0]

    def _is_ours(self) -> bool:
        """False when the run folder was moved aside and another run has taken its place."""
        try:
            return os.fstat(self._lock.fileno()).st_ino == self._run.service_lock_file.stat().st_ino
        except FileNotFoundError:
            return False
        except OSError:  # a file system that is away: `serve` waits for it
            return True
