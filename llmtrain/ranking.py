"""A run's scored checkpoints, ranked by held-out loss, with intervals that say how sure that is (`intervals.py`).

Where the 95% interval of the difference to the best contains 0, the two cannot be told apart, and the one that was
saved first is proposed: of those on this disk, else of those on the Hub.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmtrain import intervals, ledger, manifest
from llmtrain.intervals import Interval, Losses
from llmtrain.ledger import Score
from llmtrain.rundir import RunDir
from llmtrain.wording import listed, name_steps


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

    @property
    def is_as_good(self) -> bool:
        """It is the best, or cannot be told from it."""
        return self.is_best or self.is_tie

    @property
    def is_left(self) -> bool:
        """On this disk or on the Hub."""
        return self.on_disk or self.uploaded


@dataclass(frozen=True)
class Ranking:
    """All scored checkpoints, by step."""

    entries: list[Entry]
    unscored: Mapping[int, float] = field(default_factory=dict[int, float])
    """Checkpoints on disk without a score: their held-out losses at the save, NaN where not known."""

    @functools.cached_property
    def best(self) -> Entry:
        """With the lowest held-out loss."""
        return next(entry for entry in self.entries if entry.is_best)

    @functools.cached_property
    def proposed(self) -> Entry:
        """The first among those that cannot be told from the best: of those on disk, else of those on the Hub; where
        all of them are gone, the best that is left; where none is, the best there was."""
        as_good = [e for e in self.entries if e.is_as_good]
        at_hand, on_hub = [e for e in as_good if e.on_disk], [e for e in as_good if e.uploaded]
        left = sorted((e for e in self.entries if e.is_left), key=lambda e: order(e.score))
        return (at_hand or on_hub or left or [self.best])[0]

    @property
    def so_far(self) -> str:
        """That checkpoints which still wait for a score may change a verdict, for people; empty where none does."""
        later = sum(step > self.entries[-1].step for step in self.unscored)
        if not later:
            return ""
        wait = "1 later one waits" if later == 1 else f"{later} later ones wait"
        return f"this is of the {len(self.entries)} scored so far: {wait}"

    @property
    def lower_at_save(self) -> str:
        """The one without a score that may turn out to be the best, for people; empty where none was lower."""
        loss, step = min(((loss, step) for step, loss in self.unscored.items()), default=(math.nan, 0), key=by_loss)
        return f"step {step}'s loss was lower at its save: {loss:.4f}" if loss < self.best.score.loss else ""

    @property
    def caveats(self) -> list[str]:
        """What may still change which one is proposed, for people."""
        return [said for said in (self.so_far, self.lower_at_save) if said]

    @property
    def scope(self) -> str:
        """What the best is the lowest of."""
        return "scored" if self.lower_at_save else "saved"

    def reason(self) -> str:
        """Why the proposed one, for people; and what that leaves out."""
        return "; ".join([self._why(), *self.caveats])

    def _why(self) -> str:
        best, chosen = self.best, self.proposed
        gone = "" if best.is_left else f"step {best.step}, the best, is gone; "
        ties = [e.step for e in self.entries if e.is_tie and e.is_left]
        before = [e.step for e in self.entries if e.is_as_good and e.uploaded and e.step < chosen.step]
        first = f"; {chosen.step} was first" if len(ties) > 1 or not gone else ""
        if before:
            elsewhere = f"{listed(before)} {'is' if len(before) == 1 else 'are'} on the Hub alone"
            first = f"; {chosen.step} is the first of those on this disk ({elsewhere})"
        if chosen.is_tie:
            return f"{gone}{name_steps(ties)} cannot be told from the best (step {best.step}){first}"
        if not chosen.is_best:
            return f"{gone}of those left it has the lowest held-out loss"
        if ties and before:
            return f"the lowest held-out loss; {name_steps(ties)} cannot be told from it{first}"
        if ties:
            return f"the lowest held-out loss, and before {name_steps(ties)}, which cannot be told from it"
        if lost := [e.step for e in self.entries if e.is_tie]:
            return f"the lowest held-out loss; {name_steps(lost)} cannot be told from it, but nothing is left of them"
        others = [e for e in self.entries if not e.is_best]
        if others and all(e.difference is not None for e in others):
            return "the lowest held-out loss; every other one's is higher by more than chance explains"
        return "the lowest held-out loss"


def rank(run: RunDir) -> Ranking | None:
    """From the ledgers and the checkpoints' manifests; None while nothing is scored.

    The score of a checkpoint in whose place another one was saved since does not count.
    """
    measured, there = ledger.heldout_at_saves(run), manifest.identities(run)
    uploaded = {u.step: u.checkpoint for u in ledger.uploads(run).values() if not u.removed}
    known = ledger.scores(run).items()
    scores = {step: score for step, score in known if there.get(step, score.checkpoint) == score.checkpoint}
    if not scores:
        return None
    best = min(scores.values(), key=order)
    others = [score for score in scores.values() if score is not best]
    found = differences((run, best), [(run, score) for score in others])
    against = dict(zip((score.step for score in others), found, strict=True))
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
    waiting = {step: measured.get(step, {}).get("loss", math.nan) for step in there if step not in scores}
    return Ranking(entries, waiting)


def order(score: Score) -> tuple[float, int]:
    """To sort by: the best first."""
    return by_loss((score.loss, score.step))


def by_loss(measured: tuple[float, int]) -> tuple[float, int]:
    """Lowest loss first, then the earliest; a loss that is not a number comes last."""
    loss, step = measured
    return (math.inf if math.isnan(loss) else loss, step)


def lowest_measured(run: RunDir, best: int) -> str:
    """Training's lowest held-out loss where that is of another step than `best`, for people; else empty."""
    found = ((record["loss"], step) for step, record in ledger.heldout_at_saves(run).items())
    loss, step = min(found, default=(math.nan, best), key=by_loss)
    if step == best or math.isnan(loss):
        return ""
    return f"lowest measured {loss:.4f} (step {step:,}{'' if step in ledger.saved_steps(run) else ', not saved'})"


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


def differences(best: tuple[RunDir, Score], others: Sequence[tuple[RunDir, Score] | None]) -> list[Interval | None]:
    """Simultaneous 95% intervals of each one's loss minus the best one's; None where they cannot be compared.

    Between two precisions they cannot: rounding shifts the loss of every stretch by about the same, which a paired
    bootstrap takes for a sure difference between the checkpoints.
    """
    wanted = precision(best[1])
    same = (read_losses(*one) if one is not None and precision(one[1]) == wanted else None for one in others)
    return intervals.compare(read_losses(*best), same, len(others))
