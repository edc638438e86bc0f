"""What there is to do: derived from the disk and the ledgers at every look, so that no queue can be lost."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llmtrain import ledger, log, manifest, retention
from llmtrain.config import RunConfig
from llmtrain.errors import CheckpointError
from llmtrain.ledger import Event, Score, Upload
from llmtrain.rundir import RunDir
from llmtrain.service.children import Pause
from llmtrain.service.niceness import niceness, step_back

_LOOK_AGAIN_S = 120.0
_LOOKS = 3
"""Failed reads after which an otherwise idle service stops waiting for an unreadable checkpoint."""


@dataclass(frozen=True)
class WholeCheckpoint:
    """A checkpoint on disk whose every byte was compared with its manifest."""

    step: int
    identity: str
    heldout_loss: float | None
    """As the training ranks computed it at the save."""
    epoch: float


@dataclass
class Work:
    """One look at the run."""

    whole: dict[int, WholeCheckpoint] = field(default_factory=dict[int, WholeCheckpoint])
    scores: dict[int, Score] = field(default_factory=dict[int, Score])
    uploads: dict[int, Upload] = field(default_factory=dict[int, Upload])
    to_score: list[int] = field(default_factory=list[int])
    to_upload: list[int] = field(default_factory=list[int])

    def is_scored(self, step: int) -> bool:
        return step in self.scores and self.scores[step].checkpoint == self.whole[step].identity

    def is_uploaded(self, step: int, repo: str) -> bool:
        upload = self.uploads.get(step)
        return upload is not None and (upload.checkpoint, upload.repo) == (self.whole[step].identity, repo)

    def lacks_state(self) -> bool:
        """Whether the newest is on the Hub without its optimizer's state: hub.optimizer_state was turned on since."""
        newest = max(self.whole, default=-1)
        upload = self.uploads.get(newest)
        return newest not in self.to_upload and upload is not None and upload.with_state is False and not upload.removed


class Inspector:
    """Looks at a run's checkpoints; every one is verified once, a bad one is put into quarantine.

    One that cannot be read is neither whole nor bad: it stays where it is, and is looked at again minutes later.
    """

    def __init__(self, run: RunDir):
        self._run = run
        self._known: dict[tuple[int, int, int], WholeCheckpoint] = {}
        self._pauses: dict[int, Pause] = {}
        """Of the steps that cannot be read."""
        self._said = ""

    @property
    def waits(self) -> bool:
        """Whether a checkpoint that cannot be read is worth waiting for; it is looked at again later all the same."""
        return any(pause.failures < _LOOKS for pause in self._pauses.values())

    @property
    def last_error(self) -> str | None:
        return self._said if self._pauses else None

    def look(self, config: RunConfig, scoring: bool) -> Work:
        """Everything that is on disk and whole, and what each still needs, oldest first."""
        work = Work(scores=ledger.scores(self._run), uploads=ledger.uploads(self._run))
        steps = self._run.checkpoint_steps()
        self._pauses = {step: pause for step, pause in self._pauses.items() if step in steps}
        unknown = len(set(steps) - {step for step, *_ in self._known})
        for step in steps:
            found = self._inspect(step, niceness(config.service.nice, unknown) if self._run.is_training() else 0)
            if found is None:
                continue
            work.whole[step] = found
            if not work.is_scored(step) and (scoring or found.heldout_loss is not None):
                work.to_score.append(step)
            if config.hub.repo is not None and not work.is_uploaded(step, config.hub.repo):
                work.to_upload.append(step)
        if config.hub.repo is not None and config.hub.optimizer_state and work.lacks_state():
            work.to_upload.append(max(work.whole))
        return work

    def _inspect(self, step: int, nice: int) -> WholeCheckpoint | None:
        folder = self._run.checkpoint(step)
        if step in self._pauses and self._pauses[step].left_s > 0:
            return None
        try:
            stamp = (folder / manifest.NAME).stat()
            key = (step, stamp.st_ino, stamp.st_mtime_ns)
            if key not in self._known:
                self._known[key] = self._verify(step, nice)
        except (FileNotFoundError, NotADirectoryError):
            if folder.exists():  # without a manifest; a folder that has just been renamed is somebody else's business
                self.reject(step, f"{folder / manifest.NAME}: missing")
            return None
        except CheckpointError as error:
            self.reject(step, str(error))
            return None
        except OSError as error:
            self._put_off(step, error)
            return None
        self._pauses.pop(step, None)
        return self._known[key]

    def _put_off(self, step: int, error: OSError) -> None:
        """An error while reading says nothing about the bytes, and must not keep the other checkpoints waiting."""
        is_new = step not in self._pauses
        pause_s = self._pauses.setdefault(step, Pause(_LOOK_AGAIN_S)).failed()
        self._said = f"step {step} cannot be read: {error}; it stays where it is; next try in {pause_s:.0f} s"
        log.warning(self._said)
        if is_new:
            ledger.append(self._run.service_events, Event(kind="unreadable", message=self._said, step=step))

    def _verify(self, step: int, nice: int) -> WholeCheckpoint:
        # A thread of its own has a niceness of its own, which children of the service would inherit.
        with ThreadPoolExecutor(1, initializer=step_back, initargs=(nice,)) as patient:
            described = patient.submit(manifest.verify, self._run.checkpoint(step)).result()
        return WholeCheckpoint(
            step=step,
            identity=manifest.identity(described),
            heldout_loss=described.heldout_loss,
            epoch=described.epoch,
        )

    def reject(self, step: int, reason: str) -> None:
        """Quarantine: never scored, uploaded or resumed from."""
        try:
            retention.quarantine(self._run, step)
        except FileNotFoundError:  # a starting training has rejected it at the same moment
            return
        message = f"{reason}; moved to {self._run.quarantined(step)}"
        ledger.append(self._run.service_events, Event(kind="quarantined", message=message, step=step))
