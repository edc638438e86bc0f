"""`llmtrain run`: a run on this machine, kept going."""

from typing import IO

from launcher.jobs import JobDir
from launcher.keeper.meeting import Meeting
from launcher.keeper.rules import Rules
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.torchrun import Start
from llmtrain import locks
from llmtrain.config import load_to_start
from llmtrain.config.load import split_settings
from llmtrain.errors import RunFolderError, disk_errors
from llmtrain.rundir import RunDir


def train_here(start: Start, rules: Rules) -> int:
    """Until the run ends; returns its exit code.

    Raises:
        ConfigError: found before anything is started.
        RunFolderError: another `llmtrain run` keeps this run going.
    """
    config, _ = load_to_start(*split_settings(start.words))
    run = RunDir(config.run.folder)
    jobs = JobDir.of(run)
    with _take_lock(run, jobs):
        supervisor = Supervisor(start, run, rules, Meeting(None), jobs.local / "ranks", jobs.stop)
        return supervisor.supervise()


def _take_lock(run: RunDir, jobs: JobDir) -> IO[str]:
    """A lock that `llmtrain stop` and `status` look at. Rank 0 takes the run's own, but hours later where it builds
    shards first, and not in the pauses between its attempts.
    """
    with disk_errors("run folder", jobs.local):
        jobs.local.mkdir(parents=True, exist_ok=True)
        if not jobs.is_kept_going():  # else it is another one's
            jobs.stop.unlink(missing_ok=True)  # of an earlier job; from the lock on, a stop is meant for us
        if (lock := locks.hold(jobs.local_lock, "no other 'llmtrain run' keeps this run going")) is not None:
            return lock
    raise RunFolderError(
        f"{run.path}: {locks.holder(jobs.local_lock) or 'another llmtrain run'} keeps this run going already; "
        f"stop it ('llmtrain stop {run.path}'), or give this run another run.name"
    )
