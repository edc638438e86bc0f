"""What a run's records say, read once: every section of a page and every column of a comparison starts from here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from launcher.choosing import listing
from launcher.choosing.listing import Listing
from launcher.report.speed import Speed, read_speed
from launcher.runs import open_run
from launcher.watching.queue_view import Queue
from launcher.watching.status import RunStatus, read_status
from llmtrain import jsonl, ledger
from llmtrain.config.load import load_written
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.ledger import Event, Score, Upload
from llmtrain.ranking import Entry, Ranking
from llmtrain.rundir import RunDir

Axis = Literal["steps", "epochs", "tokens"]
AXES: tuple[Axis, ...] = ("steps", "epochs", "tokens")
_STEP = ("step", "epoch", "targets", "loss", "lr", "grad_norm")
"""What is read of a step's record."""
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Values at optimizer steps."""

    steps: Numbers
    values: Numbers

    @classmethod
    def of(cls, points: dict[int, float]) -> "Series":
        """Sorted by step; what is not a finite number is left out."""
        kept = sorted((step, value) for step, value in points.items() if np.isfinite(value))
        return cls(np.array([s for s, _ in kept], np.float64), np.array([v for _, v in kept], np.float64))

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Clock:
    """Steps, epochs and supervised tokens of a run, side by side."""

    steps: Numbers
    epochs: Numbers
    tokens: Numbers

    def at(self, axis: Axis, steps: Numbers) -> Numbers:
        """Where these steps lie on an axis."""
        column: dict[Axis, Numbers] = {"steps": self.steps, "epochs": self.epochs, "tokens": self.tokens}
        return steps if axis == "steps" else np.interp(steps, self.steps, column[axis])

    def at_step(self, axis: Axis, step: int) -> float:
        return float(self.at(axis, np.array([step], np.float64))[0])


@dataclass(frozen=True)
class Facts:
    """One run."""

    run: RunDir
    now: RunStatus
    """As `llmtrain status` has it."""
    listed: Listing
    """As `llmtrain checkpoints` has them: the proposed one, and why."""
    config: RunConfig | None
    """None where this version cannot read it."""
    config_text: str
    metrics: dict[str, Series]
    """By optimizer step: loss, lr, grad_norm."""
    not_finite: int | None
    """The step whose loss or gradient norm was no finite number, which ends a run."""
    clock: Clock
    evaluations: dict[int, dict[str, Any]]
    """What training measured, by step, the start (0) included."""
    ranking: Ranking | None
    is_scored: bool
    """The ranking is the checkpoint service's; else it is made of what training measured."""
    test_scores: dict[int, Score]
    uploads: dict[int, Upload]
    events: list[Event]
    samples: list[dict[str, Any]]
    speed: Speed

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def last_step(self) -> int:
        return int(self.clock.steps[-1])

    def heldout(self, key: str = "loss") -> Series:
        """A figure of training's own evaluations."""
        return Series.of({step: record[key] for step, record in self.evaluations.items() if key in record})

    def disk_scores(self) -> Series:
        """The service's, from the files."""
        entries = self.ranking.entries if self.ranking is not None else []
        return Series.of({e.step: e.score.loss for e in entries if e.score.origin == "disk"})


def read_facts(run: RunDir, queue: Queue) -> Facts:
    """Everything about a run, from its ledgers, and what SLURM said of its jobs.

    Raises:
        RunFolderError: there is no run in that folder.
    """
    open_run(run.path)
    steps, not_finite = _read_steps(run.metrics)
    evaluations = ledger.heldout_at_saves(run)
    listed = listing.gather(run)
    return Facts(
        run=run,
        now=read_status(run, queue),
        listed=listed,
        config=_config(run),
        config_text=run.config.read_text(encoding="utf-8", errors="replace") if run.config.exists() else "",
        metrics={key: _series(steps, key) for key in ("loss", "lr", "grad_norm")},
        not_finite=not_finite,
        clock=Clock(*(np.concatenate([[0.0], steps[key]]) for key in ("step", "epoch", "targets"))),
        evaluations=evaluations,
        ranking=listed.ranked or ranking_of_training(run, evaluations),
        is_scored=listed.ranked is not None,
        test_scores=ledger.scores(run, "test"),
        uploads=ledger.uploads(run),
        events=ledger.events(run),
        samples=jsonl.read(run.samples),
        speed=read_speed(run),
    )


def _config(run: RunDir) -> RunConfig | None:
    try:
        return load_written(run.config)
    except ConfigError:  # of another version
        return None


def _read_steps(metrics: Path) -> tuple[dict[str, Numbers], int | None]:
    """A column of numbers for each key, by step, NaN where a record has none; and the first step that is not finite."""
    table = jsonl.columns(metrics, _STEP)
    columns: dict[str, Numbers] = {key: table.column(key).to_numpy() for key in _STEP}
    bad = np.zeros(len(table), bool)
    for key in ("loss", "grad_norm"):
        bad |= ~np.isfinite(columns[key]) & table.column(key).is_valid().to_numpy()
    # Of several records of a step the last one counts.
    _, from_the_end = np.unique(columns["step"][::-1], return_index=True)
    last = len(table) - 1 - from_the_end
    columns, bad = {key: column[last] for key, column in columns.items()}, bad[last]
    return columns, int(columns["step"][bad.argmax()]) if bad.any() else None


def _series(steps: dict[str, Numbers], key: str) -> Series:
    known = np.isfinite(steps[key])
    return Series(steps["step"][known], steps[key][known])


def ranking_of_training(run: RunDir, evaluations: dict[int, dict[str, Any]]) -> Ranking | None:
    """For a run that nothing has scored from disk: training's own losses of what was saved, without intervals. None
    before the first."""
    saved = ledger.saved_steps(run)
    measured = {step: r for step, r in evaluations.items() if step in saved and np.isfinite(r["loss"])}
    if not measured:
        return None
    best, there = min(measured, key=lambda step: (measured[step]["loss"], step)), set(run.checkpoint_steps())
    return Ranking(
        [
            Entry(
                score=Score(
                    step=step,
                    checkpoint="",
                    loss=r["loss"],
                    perplexity=r.get("perplexity", float("nan")),
                    bits_per_byte=r.get("bits_per_byte", float("nan")),
                    targets=0,
                    epoch=r["epoch"],
                    origin="training",
                    time=0.0,
                ),
                train_loss=r.get("train_loss"),
                task={name: value for name, value in r.items() if name.startswith("task_")},
                is_best=step == best,
                on_disk=step in there,
            )
            for step, r in sorted(measured.items())
        ]
    )
