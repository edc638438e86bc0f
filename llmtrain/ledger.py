"""What was scored and uploaded, and what happened: the checkpoint service's records, and training's events.

JSON lines that are appended; of several records of one step the last one counts. They are the truth: rankings,
TensorBoard's `validation` sub-run, reports and the queue itself are derived from them and from what lies in the run
folder. `Status` and `HubState` are no such lines: each is a single record, replaced as a whole.
"""

import contextlib
import math
import shlex
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import pydantic

from llmtrain import files, jsonl, manifest
from llmtrain.errors import CheckpointError
from llmtrain.rundir import RunDir

Split = Literal["heldout", "test"]
EventKind = Literal[
    "started",
    "resumed",
    "branched",
    "stopped",
    "unsaved",
    "failed",
    "rejected",
    "quarantined",
    "unreadable",
    "score-failed",
    "upload-failed",
    "hub-refused",
    "hub-accepted",
    "upload-gone",
    "stalled",
    "early-stop",
    "restarted",
    "service-started",
]

STARTS: tuple[EventKind, ...] = ("started", "resumed")
"""What a start of training notes, one or the other."""


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)


class Score(_Record):
    """How well one checkpoint predicts one split."""

    step: int
    checkpoint: str
    """`manifest.identity`: a step that was saved again with other content is another checkpoint."""
    split: Split = "heldout"
    loss: float
    """Nats per supervised token."""
    perplexity: float
    bits_per_byte: float
    """NaN where it is not known: the training ranks noted none at this step."""
    targets: int
    """Supervised tokens of the split."""
    epoch: float
    """Passes over the training split when it was saved."""
    origin: Literal["disk", "training"]
    """disk: loaded from its files by the service. training: as the training ranks computed it at the save."""
    how: str = ""
    """Device and precision, e.g. "cpu fp32"."""
    seconds: float = 0.0
    time: float = pydantic.Field(default_factory=time.time)


class Upload(_Record):
    """One checkpoint on the Hub, read back there; or its tag taken away again; or that it is no longer there."""

    step: int
    checkpoint: str
    repo: str
    commit: str
    tag: str
    size_bytes: int = 0
    seconds: float = 0.0
    attempts: int = 1
    removed: bool = False
    """The tag was removed by retention; the commit stays in the branch's history."""
    gone: bool = False
    """Somebody has deleted it on the Hub, or the whole repository: it does not count as uploaded any more."""
    with_state: bool | None = None
    """Whether the optimizer state went along, where it has one; None: not known."""
    time: float = pydantic.Field(default_factory=time.time)


class Event(_Record):
    """Something worth knowing in the morning."""

    kind: EventKind
    message: str
    step: int | None = None
    time: float = pydantic.Field(default_factory=time.time)


class Status(_Record):
    """What the service is doing; replaced as a whole, at least every few seconds."""

    pid: int
    host: str
    time: float = pydantic.Field(default_factory=time.time)
    """When the run folder was last scanned; later saves are not reflected."""
    idle: bool = False
    """Nothing waits and nothing is being done."""
    doing: list[str] = []
    """E.g. "scoring step 300", "uploading step 200 (attempt 3)"."""
    to_score: list[int] = []
    to_upload: list[int] = []
    next_try_s: float | None = None
    """Until the next attempt after a failed one."""
    last_error: str | None = None
    quarantined: list[int] = []
    problem: str | None = None
    """What a person has to mend: a refused token, a missing repository."""


class HubState(_Record):
    """What the first contact with the Hub came to."""

    state: Literal["ok", "refused", "unreachable"]
    message: str
    repo: str
    private: bool | None = None
    """As read back from the Hub."""
    time: float = pydantic.Field(default_factory=time.time)


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; that of a loss above 700 would not fit into a float."""
    return math.exp(min(loss, 700.0))


def scores(run: RunDir, split: Split = "heldout") -> dict[int, Score]:
    """The last score of each step."""
    found = (Score.model_validate(record) for record in jsonl.read(run.scores))
    return {score.step: score for score in found if score.split == split}


def uploads(run: RunDir) -> dict[int, Upload]:
    """The last confirmed upload of each step, removed ones included, those that are gone left out."""
    found = (Upload.model_validate(record) for record in jsonl.read(run.uploads))
    last = {upload.step: upload for upload in found}
    return {step: upload for step, upload in last.items() if not upload.gone}


def events(run: RunDir) -> list[Event]:
    """Training's and the service's together, oldest first."""
    records = [*jsonl.read(run.events), *jsonl.read(run.service_events)]
    return sorted((Event.model_validate(record) for record in records), key=lambda event: event.time)


def last_event(run: RunDir, kinds: Collection[EventKind]) -> Event | None:
    """The newest of training's events that is of one of these kinds; None before the first."""
    found = next((record for record in reversed(jsonl.read(run.events)) if record["kind"] in kinds), None)
    return None if found is None else Event.model_validate(found)


def append(path: Path, record: Score | Upload | Event) -> None:
    """Add a record at the end, synced to disk."""
    _make_room(path)
    jsonl.append(path, [record.model_dump(mode="json")])
    files.sync(path)


def status(run: RunDir) -> Status | None:
    """What the service said last; None where none ever worked here, or its file is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return Status.model_validate_json(run.service_status.read_bytes())
    return None


def hub_state(run: RunDir) -> HubState | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return HubState.model_validate_json(run.hub_state.read_bytes())
    return None


def write(path: Path, record: Status | HubState) -> None:
    """Replace the file by this record."""
    _make_room(path)
    files.write_atomic(path, record.model_dump_json(indent=1) + "\n")


def _make_room(path: Path) -> None:
    """The folder `service` may be missing yet. Never the run's own: it was moved away, or its disk is not there, and
    could not be brought back to where another one lies."""
    folder = path.parent
    if folder == RunDir(folder.parent).service:
        folder.mkdir(exist_ok=True)


def heldout_at_saves(run: RunDir) -> dict[int, dict[str, Any]]:
    """What the training ranks measured, by step: loss, train_loss, task_... (the last record of a step)."""
    return {record["step"]: record for record in jsonl.read(run.heldout)}


def drain_command(path: Path) -> str:
    """Does what waits, and ends; also where service.start is never."""
    return f"python -m llmtrain.service --run {shlex.quote(str(path))} --drain"


def saved_steps(run: RunDir) -> set[int]:
    """Where checkpoints were saved, whether they are still there or not."""
    return {*(record["step"] for record in jsonl.read(run.saves)), *scores(run), *run.checkpoint_steps()}


def heldout_losses(run: RunDir) -> dict[int, float]:
    """Held-out loss by step, as the training ranks measured it; without a record, as the checkpoint's manifest says."""
    losses: dict[int, float] = {step: record["loss"] for step, record in heldout_at_saves(run).items()}
    for step in run.checkpoint_steps():
        if step not in losses:
            with contextlib.suppress(CheckpointError, OSError):  # damaged, or just gone
                if (loss := manifest.read(run.checkpoint(step)).heldout_loss) is not None:
                    losses[step] = loss
    return losses
