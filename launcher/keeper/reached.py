"""How far a run has come and how long its saves take, as its folder says; and whether that folder is still there.

For the supervisor, which may be about to start ranks again: they would begin anew in an empty mount point.
"""

import contextlib

from llmtrain import jsonl, ledger
from llmtrain.errors import RunFolderError
from llmtrain.rundir import RunDir

_LAST_SAVES = 5


class Reached:
    """Of one run, since a supervisor began to keep it going."""

    def __init__(self, run: RunDir):
        self._run = run
        self._saw_run = False
        self._step, self._last_saved = 0, 0
        self._old_start: ledger.Event | None = None
        """The event with which the run was last begun or resumed before."""
        with contextlib.suppress(OSError, RunFolderError):
            self._old_start = ledger.last_event(run, ledger.STARTS)
        self.look()

    def look(self) -> int:
        """Step of the newest checkpoint, 0 without one; while the disk does not answer, as it was."""
        with contextlib.suppress(OSError):
            self._step = max(self._run.checkpoint_steps(), default=0)
            self._last_saved = self._step or self._last_saved
            self._saw_run = self._saw_run or self._run.config.exists()
        return self._step

    def what_is_gone(self) -> str | None:
        """That the run was here and is not any more; None where it is, or never was."""
        try:
            if not self._saw_run or self._run.config.exists():
                return None
        except OSError:  # not readable now, which says nothing
            return None
        what = f"the checkpoints that were here (step {self._last_saved:,})" if self._last_saved else "the run's files"
        return f"{self._run.path}: {what} are gone: is the disk mounted? Then run the same command again"

    def has_begun(self, since: float | None) -> bool:
        """Whether training has begun meanwhile; `since`: or since that time, in an earlier start of a job.

        Until it has, run.resume=never has not moved the old run aside, and a restart that resumes would continue that
        one. Meanwhile is no matter of time: a clock may be set back.
        """
        try:
            last = ledger.last_event(self._run, ledger.STARTS)
        except (OSError, RunFolderError):  # it is there, and must not be moved aside
            return True
        return last is not None and (last != self._old_start or (since is not None and last.time >= since))


def slowest_save(run: RunDir) -> float:
    """Seconds that the slowest of the last saves took; 0 before the first."""
    try:
        return max((float(record["wrote_s"]) for record in jsonl.last_records(run.saves, _LAST_SAVES)), default=0.0)
    except (OSError, RunFolderError):  # not readable now
        return 0.0
