"""Which checkpoint to use: ranking by held-out loss, with an interval that says how sure it is (`intervals.py`).

Where the 95% interval of the difference to the best contains 0, the two cannot be told apart, and the one that was
saved first is proposed.
"""

import contextlib
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydantic

from llmtrain import intervals, ledger, manifest
from llmtrain.errors import CheckpointError
from llmtrain.intervals import Interval, Losses
from llmtrain.ledger import Score
from llmtrain.rundir import RunDir


@dataclass(frozen=True)
class Entry:
    """One scored checkpoint."""

    score: Score
    train_loss: float | None = None
    """Of some training rows, scored in the same way at that step (evaluate.train_rows)."""
    task: dict[str, float] = field(default_factory=dict[str, float])
    difference: Interval | None = None
    """95% interval of this loss minus the best one's, of all such intervals together; None without losses by stretch,
    between two precisions, and for the best."""
    is_best: bool = False
    is_tie: bool = False
    """Cannot be told from the best."""
    on_disk: bool = True
    uploaded: bool = False

    @property
    def step(self) -> int:
        return self.score.step


@dataclass(frozen=True)
class Ranking:
    """All scored checkpoints, by step."""

    entries: list[Entry]

    @property
    def best(self) -> Entry:
        """With the lowest held-out loss."""
        return next(entry for entry in self.entries if entry.is_best)

    @property
    def proposed(self) -> Entry:
        """The first among those that cannot be told from the best: of those on disk, else of those on the Hub; where
        all of them are gone, the best there is."""
        equal = [e for e in self.entries if e.is_best or e.is_tie]
        there = sorted((e for e in self.entries if e.on_disk or e.uploaded), key=lambda e: _order(e.score))
        at_hand, on_hub = [e for e in equal if e.on_disk], [e for e in equal if e.uploaded]
        return (at_hand or on_hub or there or [self.best])[0]

    def reason(self) -> str:
        """Why the proposed one, for people."""
        best, chosen = self.best, self.proposed
        there = {e.step for e in self.entries if e.on_disk or e.uploaded}
        gone = "" if best.step in there else f"step {best.step}, the best, is gone; "
        ties = [e.step for e in self.entries if e.is_tie and e.step in there]
        if chosen.is_tie:
            first = f"; {chosen.step} was first" if len(ties) > 1 or not gone else ""
            return f"{gone}{name_steps(ties)} cannot be told from the best (step {best.step}){first}"
        if not chosen.is_best:
            return f"{gone}of those left it has the lowest held-out loss"
        if ties:
            return f"the lowest held-out loss, and before {name_steps(ties)}, which cannot be told from it"
        if lost := [e.step for e in self.entries if e.is_tie]:
            return f"the lowest held-out loss; {name_steps(lost)} cannot be told from it, but nothing is left of them"
        others = [e for e in self.entries if not e.is_best]
        if others and all(e.difference is not None for e in others):
            return "the lowest held-out loss; every other one's is higher by more than chance explains"
        return "the lowest held-out loss"


def name_steps(steps: Iterable[int]) -> str:
    """step 3; steps 3 and 5; steps 3, 5 and 8."""
    numbers = [str(step) for step in steps]
    if len(numbers) < 2:
        return f"step {''.join(numbers)}"
    return f"steps {', '.join(numbers[:-1])} and {numbers[-1]}"


def ranking(run: RunDir) -> Ranking | None:
    """From the ledgers and the checkpoints' manifests; None while nothing is scored.

    The score of a checkpoint in whose place another one was saved since does not count.
    """
    measured, there = ledger.heldout_at_saves(run), identities(run)
    uploaded = {u.step: u.checkpoint for u in ledger.uploads(run).values() if not u.removed}
    known = ledger.scores(run).items()
    scores = {step: score for step, score in known if there.get(step, score.checkpoint) == score.checkpoint}
    if not scores:
        return None
    best = min(scores.values(), key=_order)
    others = [score for score in scores.values() if score is not best]
    against = dict(zip((s.step for s in others), differences(run, best, others), strict=True))
    entries: list[Entry] = []
    for step, score in sorted(scores.items()):
        at_save = measured.get(step, {})
        interval = against.get(step)
        entries.append(
            Entry(
                score=score,
                train_loss=at_save.get("train_loss"),
                task={name: value for name, value in at_save.items() if name.startswith("task_")},
                difference=interval,
                is_best=score is best,
                is_tie=score is not best and interval is not None and interval[0] <= 0,
                on_disk=there.get(step) == score.checkpoint,
                uploaded=uploaded.get(step) == score.checkpoint,
            )
        )
    return Ranking(entries)


def _order(score: Score) -> tuple[float, int]:
    """Lowest loss first, then the earliest; a loss that is not a number comes last."""
    return (math.inf if math.isnan(score.loss) else score.loss, score.step)


def identities(run: RunDir) -> dict[int, str]:
    """`manifest.identity` of the published checkpoints, by step; those whose manifest cannot be read are left out."""
    found: dict[int, str] = {}
    for step in run.checkpoint_steps():
        with contextlib.suppress(CheckpointError, OSError):
            stamp = (run.checkpoint(step) / manifest.NAME).stat()
            found[step] = _identity(run.checkpoint(step).absolute(), stamp.st_ino, stamp.st_mtime_ns)
    return found


@functools.lru_cache(maxsize=4096)
def _identity(folder: Path, _inode: int, _modified_ns: int) -> str:
    """Kept for as long as the manifest stays the same file: the service asks several times a second."""
    return manifest.identity(manifest.read(folder))


def read_losses(run: RunDir, score: Score) -> Losses | None:
    path = run.losses(score.step, score.checkpoint, score.split)
    return np.load(path, allow_pickle=False) if path.exists() else None


def precision(score: Score) -> str:
    """In which the model computed: "fp32", "bf16"; of a record that does not say it, whatever ends its `how`."""
    return score.how.rpartition(" ")[2]


def why_apart(other: str, whose: str, reference: str) -> str:
    """Why there is no interval between two precisions, for people."""
    unknown = "a precision that is not known"
    return f"computed in {other or unknown}, {whose} in {reference or unknown}: rounding alone shifts a loss"


def differences(run: RunDir, best: Score, others: list[Score]) -> list[Interval | None]:
    """Simultaneous 95% intervals of each one's loss minus the best one's; None where they cannot be compared.

    Between two precisions they cannot: rounding shifts the loss of every stretch by about the same, which a paired
    bootstrap takes for a sure difference between the checkpoints.
    """
    same = (read_losses(run, score) if precision(score) == precision(best) else None for score in others)
    return intervals.compare(read_losses(run, best), same, len(others))


@dataclass(frozen=True)
class Overfitting:
    """What became of the held-out loss after its lowest point."""

    best: Entry
    last: Entry
    began: bool
    """The last checkpoint is worse than the best one by more than chance explains."""
    is_known: bool = True
    """At least two checkpoints are scored."""

    @property
    def rise(self) -> float:
        return self.last.score.loss - self.best.score.loss

    @property
    def epochs_past(self) -> float:
        return self.last.score.epoch - self.best.score.epoch

    def describe(self) -> str:
        """One or two sentences for people."""
        best, last = self.best, self.last
        if not self.is_known:
            return "not known: it takes two checkpoints with a held-out loss"
        if best is last:
            return "none seen: the last checkpoint is the best one"
        how_far = f"{self.epochs_past:.2f} epochs past it the held-out loss is higher by {self.rise:.4f}"
        interval = "" if last.difference is None else f" (95%: {last.difference[0]:+.4f} to {last.difference[1]:+.4f})"
        gaps = [(e, e.score.loss - e.train_loss) for e in (best, last) if e.train_loss is not None]
        gap = f"; the gap to the training loss went from {gaps[0][1]:.3f} to {gaps[1][1]:.3f}" if len(gaps) == 2 else ""
        if not self.began:
            by_chance = last.difference is not None and last.difference[0] <= 0
            none = "none that chance does not explain" if by_chance else "none to speak of"
            return f"{none}: {how_far}{interval}"
        return f"began after step {best.step} (epoch {best.score.epoch:.2f}): {how_far}{interval}{gap}"


RISE, _SURE_RISE = 1.01, 1.002
"""A held-out loss this much above its lowest counts as overfitting: without an interval, and beyond chance."""


def overfitting(ranked: Ranking) -> Overfitting:
    best, last = ranked.best, ranked.entries[-1]
    rise = last.score.loss / best.score.loss if best.score.loss > 0 else 1.0
    began = rise > RISE if last.difference is None else last.difference[0] > 0 and rise > _SURE_RISE
    return Overfitting(best, last, began and last is not best, is_known=len(ranked.entries) > 1)


class EarlyStop(pydantic.BaseModel):
    """What service/stop.json says to training."""

    message: str
    saves: int
    """That have not improved."""


def early_stop(run: RunDir) -> EarlyStop | None:
    """Whether the service asks training to end; where its file is damaged it does not."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return EarlyStop.model_validate_json(run.early_stop.read_bytes())
    return None


def saves_without_improvement(scored: dict[int, Score]) -> list[int]:
    """The steps of the checkpoints since the lowest held-out loss."""
    if not scored:
        return []
    best = min(scored.values(), key=_order)
    return [step for step in scored if step > best.step]
