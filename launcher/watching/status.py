"""`llmtrain status`: what each run is doing, what waits, and what a person has to mend.

`read_status` gathers, from the run folder and from what SLURM said of its jobs.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.jobs import JobDir
from launcher.watching import again, queue_view
from launcher.watching.endings import is_complete, last_failure, lost_steps, missing_save
from launcher.watching.queue_view import Job, Queue
from llmtrain import choose, early_stop, jsonl, ledger, locks, manifest, ranking
from llmtrain.batches import ANY_ROWS, plan_batches
from llmtrain.config import RunConfig
from llmtrain.config.load import Origins, load_written
from llmtrain.errors import UserError
from llmtrain.ranking import Ranking
from llmtrain.rundir import RunDir
from llmtrain.wording import name_steps

_RECENT_S = 60.0
"""A process on another machine, whose lock may be invisible here, counts as running so long after its last write."""
_QUIET_S = 900.0
"""After which such a process is taken for dead: an evaluation writes nothing for a while."""

State = Literal["starting", "running", "finished", "ended early", "stopped", "not started", "unreadable"]
"""Starting: `llmtrain run` keeps it going and no rank trains yet, or none trains again yet. Unreadable: a record file
is damaged, or the disk does not answer."""


@dataclass(frozen=True, kw_only=True)
class TrainingStatus:
    """What is not known is None."""

    state: State
    who: str | None = None
    """Process and machine that hold the run, or held it last."""
    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    heldout: tuple[int, float] | None = None
    """Step and loss of the last evaluation."""
    tokens_per_s: float | None = None
    """Supervised tokens, on average since it was last started, with evaluations and saves. None unless running."""
    left_s: float | None = None
    """Until the end, at that pace."""
    written: float | None = None
    """When the last step was written down."""
    early_stop: str | None = None
    """Why the service asks it to end."""


@dataclass(frozen=True)
class Checkpoints:
    last: int | None
    on_disk: list[int]
    best: tuple[int, float] | None
    """Step and held-out loss, as scored from disk."""
    proposed: tuple[int, float] | None
    """As `llmtrain checkpoints` does: where none is scored, by training's own losses."""
    quarantined: list[int]
    not_scored: list[int]
    """On disk, without a score of their own."""


@dataclass(frozen=True)
class ServiceStatus:
    wanted: bool
    """service.start is not never."""
    at_work: bool
    status: ledger.Status | None
    """What it said last; None where it has said nothing yet."""


@dataclass(frozen=True)
class Hub:
    repo: str
    state: ledger.HubState | None
    confirmed: list[int]
    waiting: list[int]
    """On disk and not confirmed."""


@dataclass(frozen=True)
class RunStatus:
    """One run at one moment."""

    path: Path
    time: float
    training: TrainingStatus
    checkpoints: Checkpoints
    service: ServiceStatus
    hub: Hub | None
    """None where nothing is uploaded."""
    jobs: list[Job]
    """Submitted for it: the last one of each kind, training first."""
    slurm: str | None
    """What SLURM said in place of an answer."""
    problems: list[str]
    """For a person to mend."""
    again: str | None = None
    """What goes on with a run that has stopped, to be pasted; None where it goes on by itself, or has ended."""

    @property
    def waits(self) -> list[str]:
        """What the checkpoint service has still to do, for people."""
        waits = [f"{name_steps(self.checkpoints.not_scored)} not scored"] if self.checkpoints.not_scored else []
        if self.hub is not None and self.hub.waiting:
            waits.append(f"{name_steps(self.hub.waiting)} not uploaded")
        return waits


def read_status_or_why(run: RunDir, queue: Queue) -> RunStatus:
    """As `read_status`; of a run whose files cannot be read, the reason: it hides no other run."""
    try:
        return read_status(run, queue)
    except (UserError, OSError, ValueError, KeyError) as error:
        why = str(error) if isinstance(error, UserError) else f"cannot be read ({type(error).__name__}: {error})"
        return RunStatus(
            path=run.path,
            time=time.time(),
            training=TrainingStatus(state="unreadable"),
            checkpoints=Checkpoints(last=None, on_disk=[], best=None, proposed=None, quarantined=[], not_scored=[]),
            service=ServiceStatus(wanted=False, at_work=False, status=None),
            hub=None,
            jobs=queue.of(run),
            slurm=queue.problem,
            problems=[why],
        )


def read_status(run: RunDir, queue: Queue) -> RunStatus:
    """Reads small files and the ends of the large ones; hashes nothing, starts no process."""
    jobs, damaged = queue.of(run), queue.damaged.get(run.path.absolute())
    problems = [] if damaged is None else [damaged]
    config: RunConfig | None = None
    is_to_come = not run.config.exists() and (jobs or JobDir.of(run).is_kept_going())
    try:
        config = None if is_to_come else load_written(run.config)
    except UserError as error:
        problems.append(str(error))
    checkpoints = read_checkpoints(run)
    # What a job did in its last minute does not count as a sign of life once SLURM says that it is over, or waits.
    elsewhere = not any(job.kind == "train" and (job.is_over or job.state == "PENDING") for job in jobs)
    service = _read_service(run, config, elsewhere or any(not job.is_over for job in jobs))
    if service.status is not None and service.status.problem is not None:
        problems.append(service.status.problem)
    if checkpoints.quarantined:
        found = name_steps(checkpoints.quarantined)
        problems.append(f"in quarantine, because a file did not match its hash: {found}")
    training = read_training(run, config, elsewhere)
    has_stopped = training.state == "stopped" and not _may_come_back(training, jobs, elsewhere)
    failure = queue_view.failure(run, jobs) if training.state in ("stopped", "not started") else None
    if failure is not None:
        problems.append(failure)
    if training.state not in ("running", "starting") and (said := last_failure(run)) is not None:
        problems.append(said)
    elif training.state == "stopped" and failure is None and training.step >= (training.total_steps or math.inf):
        problems.append(missing_save(run))
    elif has_stopped and (lost := lost_steps(run)) is not None:
        problems.append(lost)
    return RunStatus(
        path=run.path,
        time=time.time(),
        training=training,
        checkpoints=checkpoints,
        service=service,
        hub=_read_hub(run, config, checkpoints.on_disk),
        jobs=jobs,
        slurm=queue.problem if jobs else None,
        problems=problems,
        again=again.command(run, config) if has_stopped and damaged is None else None,
    )


def read_training(run: RunDir, config: RunConfig | None, elsewhere: bool) -> TrainingStatus:
    """`elsewhere`: whether it may be running on another machine."""
    last, evaluation = jsonl.last_record(run.metrics), jsonl.last_record(run.heldout)
    step = 0 if last is None else int(last["step"])
    total = None if config is None else total_steps(config, last)
    written = run.metrics.stat().st_mtime if last is not None else None
    who, jobs = locks.holder(run.lock_file), JobDir.of(run)
    asked = early_stop.read(run)
    state: State = "stopped"
    seen = elsewhere and _is_at_work_elsewhere(who, written) and not _is_summed_up(run, written)
    if run.is_training() or seen:
        state = "running"
    elif jobs.is_kept_going():
        state, who = "starting", locks.holder(jobs.local_lock)
    elif last is None:
        state = "not started"
    elif total is not None and step >= total and is_complete(run, total):
        state = "finished"
    elif asked is not None:
        state = "ended early"
    pace = _steps_per_s(run, step, written) if state == "running" else None
    return TrainingStatus(
        state=state,
        who=who,
        step=step,
        total_steps=total,
        epoch=None if last is None else last["epoch"],
        loss=None if last is None else last["loss"],
        heldout=None if evaluation is None else (evaluation["step"], evaluation["loss"]),
        tokens_per_s=pace * last["targets"] / step if pace is not None and last is not None and step else None,
        left_s=(total - step) / pace if pace and total is not None else None,
        written=written,
        early_stop=None if asked is None else asked.message,
    )


def total_steps(config: RunConfig, last: dict[str, Any] | None) -> int | None:
    """The run's planned steps; None if they depend on the data and no step has been written down yet."""
    rows = ANY_ROWS
    if last is not None and last["epoch"] > 0:
        rows = round(last["samples"] / last["epoch"])
    elif config.train.epochs is not None:
        return None
    try:
        return plan_batches(config, Origins(), 1, rows).total_steps
    except UserError:
        return None


def _steps_per_s(run: RunDir, step: int, written: float | None) -> float | None:
    """On average since training was last started or resumed; None where that is not known."""
    start = ledger.last_event(run, ledger.STARTS)
    if start is None or written is None:
        return None
    steps, seconds = step - (start.step or 0), written - start.time
    return steps / seconds if steps > 0 and seconds > 0 else None


def _is_at_work_elsewhere(who: str | None, sign: float | None, recent_s: float = _RECENT_S) -> bool:
    """Not every shared file system shows another machine's locks: there a recent sign counts."""
    if who is None or sign is None or ((known := locks.parse(who)) is not None and known[1] == os.uname().nodename):
        return False
    return time.time() - sign < recent_s


def _may_come_back(training: TrainingStatus, jobs: list[Job], elsewhere: bool) -> bool:
    """Whether a run that seems to have stopped may go on without anybody: its job is in the queue, or its process works
    on another machine on something that takes longer than a step."""
    in_queue = any(job.kind == "train" and not job.is_over for job in jobs)
    return in_queue or (elsewhere and _is_at_work_elsewhere(training.who, training.written, _QUIET_S))


def _is_summed_up(run: RunDir, written: float | None) -> bool:
    """Whether the run has ended since: the summary is written last."""
    return written is not None and run.summary.exists() and run.summary.stat().st_mtime >= written


def read_checkpoints(run: RunDir) -> Checkpoints:
    ranked, chosen = _ranking(run)
    on_disk = run.checkpoint_steps()
    entries = [] if ranked is None else ranked.entries
    scored = {entry.step for entry in entries if entry.on_disk}
    best = None if ranked is None else (ranked.best.step, ranked.best.score.loss)
    return Checkpoints(
        last=on_disk[-1] if on_disk else None,
        on_disk=on_disk,
        best=best,
        proposed=None if chosen is None else (chosen.step, chosen.loss),
        quarantined=run.quarantined_steps(),
        not_scored=[step for step in on_disk if step not in scored],
    )


_rankings: dict[RunDir, tuple[tuple[object, ...], Ranking | None, choose.Choice | None]] = {}
"""The last one of each run, with what it depends on."""


def _ranking(run: RunDir) -> tuple[Ranking | None, choose.Choice | None]:
    """And the proposed one. Kept while nothing that it depends on has changed: --watch asks every two seconds."""
    stamp = _stamp(run)
    if run not in _rankings or _rankings[run][0] != stamp:
        ranked = ranking.rank(run)
        _rankings[run] = stamp, ranked, choose.propose(ranked, choose.losses_at_save(run))
    return _rankings[run][1:]


def _stamp(run: RunDir) -> tuple[object, ...]:
    ledgers = [path.stat() for path in (run.scores, run.uploads, run.heldout) if path.exists()]
    return (*((info.st_mtime_ns, info.st_size) for info in ledgers), *sorted(manifest.identities(run).items()))


def _read_service(run: RunDir, config: RunConfig | None, may_be_elsewhere: bool) -> ServiceStatus:
    status = ledger.status(run)
    said_by = None if status is None else locks.name(status.pid, status.host)
    elsewhere = may_be_elsewhere and status is not None and _is_at_work_elsewhere(said_by, status.time)
    served = run.is_served()
    if served and locks.holder(run.service_lock_file) != said_by:
        status = None  # of the one before
    wanted = config is None or config.service.start != "never"
    return ServiceStatus(wanted=wanted, at_work=served or elsewhere, status=status)


def _read_hub(run: RunDir, config: RunConfig | None, on_disk: list[int]) -> Hub | None:
    """Of the repository that the configuration names, or else the one that was contacted (--repo)."""
    state = ledger.hub_state(run)
    repo = config.hub.repo if config is not None and config.hub.repo is not None else state.repo if state else None
    if not repo:
        return None
    here = manifest.identities(run)
    uploads = [upload for upload in ledger.uploads(run).values() if upload.repo == repo]
    confirmed = {upload.step for upload in uploads if not upload.removed}
    done = {upload.step for upload in uploads if here.get(upload.step, upload.checkpoint) == upload.checkpoint}
    return Hub(
        repo=repo,
        state=state if state is not None and state.repo in (repo, "") else None,
        confirmed=sorted(confirmed),
        waiting=[step for step in on_disk if step not in done],
    )
