"""`llmtrain stop`: training saves, ends, and does not come back; then says where it stands.

A job and `llmtrain run` are asked through a file that they look at, a job that still waits is cancelled; what was
started in another way gets a signal. `llmtrain run` holds a lock of its own, so that it is found while no rank trains.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.display import duration
from launcher.jobs import JobDir
from launcher.keeper.processes import command_of, is_alive, is_launcher, keeper_of, kill_tree
from launcher.slurm import client
from launcher.slurm.client import Queued
from launcher.watching import training_jobs
from launcher.watching.logs import open_submitted
from launcher.watching.status import TrainingStatus, read_training
from llmtrain import locks
from llmtrain.errors import RunFolderError, SlurmError, UserError
from llmtrain.rundir import RunDir

_POLL_S = 0.5
_ASK_SLURM_S = 3.0
_REMIND_S = 30.0


@dataclass
class Stopping:
    """A run that was asked to end."""

    run: RunDir
    job_ids: Sequence[str] = ()
    root: psutil.Process | None = None
    """On this machine, the process that trains it or keeps it going."""
    is_kept_going: bool = False
    """By `llmtrain run`, which holds a lock as long as it does so."""
    _state: str = ""
    """Of its jobs, as told last."""
    _next_question: float = 0.0

    def is_over(self) -> bool:
        if self.job_ids:
            return self._jobs_are_over()
        if self.is_kept_going:
            return not JobDir.of(self.run).is_kept_going()
        return self.root is None or not is_alive(self.root)

    def _jobs_are_over(self) -> bool:
        if time.monotonic() < self._next_question:
            return False
        self._next_question = time.monotonic() + _ASK_SLURM_S
        try:
            alive = [job for job in client.queue(self.job_ids).values() if not job.is_over]
            cancel_waiting(_waiting(alive))  # it was requeued meanwhile
        except SlurmError as error:
            self._tell(f"SLURM does not answer ({error}); trying again")
            return False
        if alive:
            self._tell(", ".join(f"job {job.job_id} is {job.state.lower()}" for job in alive))
        return not alive

    def _tell(self, state: str) -> None:
        if state != self._state:
            self._state = state
            say(self.run, state)


def stop_runs(paths: Sequence[Path], now: bool) -> None:
    """Ask all, then wait until all have ended.

    Args:
        now: kill, without a save.

    Raises:
        UserError: one of them cannot be stopped from here; the others are, first.
    """
    found: list[tuple[RunDir, list[Queued]]] = []
    asked: list[Stopping] = []
    errors: list[UserError] = []
    for path in paths:
        try:
            run = open_submitted(path)
            with yours_alone(path):
                found.append((run, alive_jobs(run)))
        except UserError as error:
            errors.append(error)
    found.sort(key=lambda each: not _waiting(each[1]))  # first: the nodes that another's end sets free would start them
    for run, alive in found:
        try:
            with yours_alone(run.path):
                stopping = ask(run, alive, now)
            if stopping is not None:
                asked.append(stopping)
        except UserError as error:
            errors.append(error)
    wait(asked)
    for error in errors[1:]:
        print(f"error: {error}", flush=True)
    if errors:
        raise errors[0]


@contextlib.contextmanager
def yours_alone(path: Path) -> Iterator[None]:
    """What another user's run refuses becomes an error in words."""
    try:
        yield
    except (PermissionError, psutil.AccessDenied) as error:
        raise RunFolderError(f"{path}: it is not yours to stop ({error}): ask who started it") from error


def ask(run: RunDir, alive: list[Queued], now: bool) -> Stopping | None:
    """None where nothing runs.

    Args:
        alive: its jobs, of `alive_jobs`.

    Raises:
        RunFolderError: it runs on another machine, and not as a job.
        SlurmError: SLURM does not answer.
    """
    jobs = JobDir.of(run)
    if alive:
        return _ask_jobs(run, jobs, alive, now)
    if jobs.is_kept_going():
        return _ask_keeper(run, jobs, now)
    # Its last minute's writing is no sign of life where SLURM says that the job is over.
    ended = training_jobs.ended(jobs)
    training = read_training(run, None, elsewhere=ended is None)
    if training.state == "running":
        return _ask_process(run, jobs, training, now)
    how = "" if ended is None else f" (job {ended.job_id} is over: {ended.state.lower()})"
    say(run, f"does not run{how}; {where_it_stands(run)}")
    return None


def alive_jobs(run: RunDir) -> list[Queued]:
    """Jobs that train this run, or wait to.

    Raises:
        SlurmError: what SLURM thinks of them is not known. Its nodes are asked to end all the same.
    """
    jobs = JobDir.of(run)
    ids = training_jobs.numbers(jobs)
    if not ids or (not jobs.ledger.exists() and not client.is_here()):
        return []
    try:
        return training_jobs.alive(jobs, ids)
    except SlurmError as error:
        jobs.stop.touch()
        raise SlurmError(
            f"{jobs.name}: {error}. Its nodes are asked to save and end, if it runs ({jobs.stop}); whether job "
            f"{ids[-1]} waits in the queue is not known: try again, or scancel {ids[-1]}"
        ) from error


def _ask_jobs(run: RunDir, jobs: JobDir, alive: list[Queued], now: bool) -> Stopping:
    names = ", ".join(job.job_id for job in alive)
    if now:
        client.call(["scancel", *(job.job_id for job in alive)])
        say(run, f"cancelled job {names}")
    else:
        waiting = _waiting(alive)
        try:
            cancel_waiting(waiting)  # before another of them ends, and sets free what they wait for
        finally:
            jobs.stop.touch()
        for job in alive:
            how = "waited and is cancelled" if job in waiting else "is asked to save and to end"
            say(run, f"job {job.job_id} {how}")
    return Stopping(run, [job.job_id for job in alive])


def _waiting(jobs: Sequence[Queued]) -> list[Queued]:
    return [job for job in jobs if job.state == "PENDING"]


def cancel_waiting(jobs: Sequence[Queued]) -> None:
    """One that has started in this moment is left to save."""
    if jobs:
        client.call(["scancel", "--state=PENDING", *(job.job_id for job in jobs)])


def _ask_keeper(run: RunDir, jobs: JobDir, now: bool) -> Stopping:
    """`llmtrain run` looks at the file also where no rank listens yet, or none is there between two attempts."""
    who = locks.holder(jobs.local_lock) or ""
    if now:
        _kill_keeper(run, who)
    else:
        jobs.stop.touch()
        doing = "" if run.is_training() else " It is starting, and ends as soon as it can."
        say(run, f"{who or 'llmtrain run'} is asked to save and to end.{doing}")
    return Stopping(run, is_kept_going=True)


def _kill_keeper(run: RunDir, who: str) -> None:
    pid, host = _who(run, who)
    if host != os.uname().nodename:
        raise RunFolderError(
            f"{run.path}: process {pid} on {host} keeps it going; kill it there: "
            f"ssh {host} llmtrain stop {run.path.absolute()} --now"
        )
    try:
        if not is_launcher(command_of(psutil.Process(pid))):  # the number is of the one before, or of another container
            raise psutil.NoSuchProcess(pid)
    except psutil.NoSuchProcess:
        if not JobDir.of(run).is_kept_going():
            return  # it has ended in this moment
        raise RunFolderError(
            f"{run.path}: process {pid} keeps it going, and is not seen here (in another container?); stop it there"
        ) from None
    kill_tree(pid)
    say(run, f"killed process {pid} and all that it started for training")


def _who(run: RunDir, said: str) -> tuple[int, str]:
    """Process and machine, from what stands in a lock. Raises RunFolderError where that cannot be known."""
    if (found := locks.parse(said)) is None:
        raise RunFolderError(f"{run.path}: something holds its lock, and has not said who it is; try again")
    return found


def _ask_process(run: RunDir, jobs: JobDir, training: TrainingStatus, now: bool) -> Stopping:
    pid, host = _who(run, training.who or "")
    if host != os.uname().nodename:
        asked = ""
        if jobs.starts() and not client.is_here() and not now:  # its job looks at that file; at a signal it requeues
            jobs.stop.touch()
            asked = f" A job of 'llmtrain node' is asked to save and to end ({jobs.stop})."
        raise RunFolderError(
            f"{run.path}: process {pid} on {host} trains it, not as a job that is known here.{asked} Of another job: "
            f"scancel it; else stop it there: ssh {host} kill -{'KILL' if now else 'TERM'} {pid}"
        )
    try:
        rank = psutil.Process(pid)
        root = keeper_of(rank)
        if now:
            kill_tree(root.pid)
            say(run, f"killed process {pid}" + (f" and what kept it going ({root.pid})" if root != rank else ""))
            return Stopping(run, root=root)
        if is_launcher(command_of(root)):  # it asks all ranks; one that was asked twice may die of that at its very end
            jobs.path.mkdir(parents=True, exist_ok=True)
            jobs.stop.touch()
        else:
            rank.send_signal(signal.SIGTERM)
        say(run, f"process {pid} is asked to save and to end")
    except psutil.NoSuchProcess:
        if run.is_training():
            raise RunFolderError(
                f"{run.path}: process {pid} trains it, and is not seen here (in another container?); stop it there"
            ) from None
        return Stopping(run)  # it has ended in this moment
    return Stopping(run, root=root)


def wait(asked: list[Stopping]) -> None:
    """Until all have ended; Ctrl-C ends the waiting alone."""
    began = reminded = time.monotonic()
    waiting = list(asked)
    if waiting:
        print("waiting until that has happened (Ctrl-C: it happens without us)", flush=True)
    try:
        while waiting:
            for stopping in [each for each in waiting if each.is_over()]:
                waiting.remove(stopping)
                JobDir.of(stopping.run).stop.unlink(missing_ok=True)  # not for the next job
                say(stopping.run, f"has ended; {where_it_stands(stopping.run)}")
            if waiting and time.monotonic() - reminded > _REMIND_S:
                reminded = time.monotonic()
                for stopping in waiting:
                    say(
                        stopping.run, f"still there after {duration(reminded - began)}; {where_it_stands(stopping.run)}"
                    )
            time.sleep(_POLL_S if waiting else 0)
    except KeyboardInterrupt:
        names = ", ".join(str(stopping.run.path) for stopping in waiting)
        print(f"not waiting any longer; asked to end: {names}", flush=True)
        raise


def where_it_stands(run: RunDir) -> str:
    steps = run.checkpoint_steps()
    return f"last checkpoint: step {steps[-1]:,} ({run.checkpoint(steps[-1])})" if steps else "no checkpoint yet"


def say(run: RunDir, text: str) -> None:
    print(f"{run.path}: {text}", flush=True)
