"""Which checkpoint to use: ranking by held-out loss, with an interval that says how sure it is (`intervals.py`).

Where the 95% interval of the difference to the best contains 0, the two cannot be told apart, and the one that was
saved first is proposed: of those on this disk, else of those on the Hub.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
    unscored: Mapping[int, float] = field(default_factory=dict[int, float])
    """Checkpoints on disk without a score: their held-out losses at the save, NaN where not known."""

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

    @property
    def so_far(self) -> str:
        """The end of a verdict that checkpoints without a score may change; empty where none waits."""
        later = sum(step > self.entries[-1].step for step in self.unscored)
        if not later:
            return ""
        wait = "1 later one waits" if later == 1 else f"{later} later ones wait"
        return f"; this is of the {len(self.entries)} scored so far: {wait}"

    @property
    def lower_at_save(self) -> str:
        """The one without a score that may turn out to be the best, for people; empty where none was lower."""
        loss, step = min(((loss, step) for step, loss in self.unscored.items()), default=(math.nan, 0), key=_by_loss)
        return f"step {step}'s loss was lower at its save: {loss:.4f}" if loss < self.best.score.loss else ""

    @property
    def scope(self) -> str:
        """What the best is the lowest of."""
        return "scored" if self.lower_at_save else "saved"

    def reason(self) -> str:
        """Why the proposed one, for people; and what that leaves out."""
        return f"{self._why()}{self.so_far}{self.lower_at_save and f'; {self.lower_at_save}'}"

    def _why(self) -> str:
        best, chosen = self.best, self.proposed
        there = {e.step for e in self.entries if e.on_disk or e.uploaded}
        gone = "" if best.step in there else f"step {best.step}, the best, is gone; "
        ties = [e.step for e in self.entries if e.is_tie and e.step in there]
        before = [e.step for e in self.entries if (e.is_best or e.is_tie) and e.uploaded and e.step < chosen.step]
        first = f"; {chosen.step} was first" if len(ties) > 1 or not gone else ""
        if before:
            is_are = "is" if len(before) == 1 else "are"
            elsewhere = f"{', '.join(map(str, before))} {is_are} on the Hub alone"
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
    waiting = {step: measured.get(step, {}).get("loss", math.nan) for step in there if step not in scores}
    return Ranking(entries, waiting)


def _order(score: Score) -> tuple[float, int]:
    return _by_loss((score.loss, score.step))


def _by_loss(measured: tuple[float, int]) -> tuple[float, int]:
    """Lowest loss first, then the earliest; a loss that is not a number comes last."""
    loss, step = measured
    return (math.inf if math.isnan(loss) else loss, step)


def lowest_measured(run: RunDir, best: int) -> str:
    """Training's lowest held-out loss where that is of another step than `best`, for people; else empty."""
    found = ((record["loss"], step) for step, record in ledger.heldout_at_saves(run).items())
    loss, step = min(found, default=(math.nan, best), key=_by_loss)
    if step == best or math.isnan(loss):
        return ""
    return f"lowest measured {loss:.4f} (step {step:,}{'' if step in ledger.saved_steps(run) else ', not saved'})"


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
class Choice:
    """The checkpoint to use."""

    step: int
    loss: float
    origin: Literal["disk", "training"]
    """What computed the loss, as in `Score`."""
    why: str


def propose(ranked: Ranking | None, at_save: Mapping[int, float], on_disk_alone: bool = False) -> Choice | None:
    """Of all checkpoints that are left, or of those on disk; None where none is, or no loss of any is known.

    Args:
        at_save: held-out losses that training computed, of checkpoints on disk.
    """
    elsewhere = ""
    if ranked is not None:
        chosen = ranked.proposed
        if chosen.on_disk or (chosen.uploaded and not on_disk_alone):
            return Choice(chosen.step, chosen.score.loss, chosen.score.origin, ranked.reason())
        if chosen.uploaded:
            elsewhere = f"; step {chosen.step}, which 'llmtrain checkpoints' proposes, is on the Hub alone"
        if here := [entry.score for entry in ranked.entries if entry.on_disk]:
            best = min(here, key=_order)
            return Choice(best.step, best.loss, best.origin, f"the lowest held-out loss of those on disk{elsewhere}")
    if not at_save:
        return None
    step = min(at_save, key=lambda step: (math.isnan(at_save[step]), at_save[step], step))
    scored = "has been scored" if ranked is None else "is left of those that were scored"
    why = f"the lowest held-out loss that training computed of those on disk{elsewhere or f'; none {scored} from disk'}"
    return Choice(step, at_save[step], "training", why)


@dataclass(frozen=True)
class Overfitting:
    """What became of the held-out loss after its lowest point."""

    best: Entry
    last: Entry
    began: bool
    """The last checkpoint is worse than the best one by more than chance explains."""
    is_known: bool = True
    """At least two checkpoints are scored."""
    perhaps: bool = False
    """It is worse, and without an interval nobody knows whether by chance."""
    so_far: str = ""
    """See `Ranking`."""

    @property
    def rise(self) -> float:
        return self.last.score.loss - self.best.score.loss

    @property
    def epochs_past(self) -> float:
        return self.last.score.epoch - self.best.score.epoch

    def describe(self) -> str:
        """One or two sentences for people."""
        return f"{self._verdict()}{self.so_far}"

    def _verdict(self) -> str:
        best, last = self.best, self.last
        if not self.is_known:
            return "not known: it takes two checkpoints with a held-out loss"
        if best is last:
            return "none seen: the last checkpoint is the best one"
        how_far = f"{self.epochs_past:.2f} epochs past it the held-out loss is higher by {self.rise:.4f}"
        interval = "" if last.difference is None else f" (95%: {last.difference[0]:+.4f} to {last.difference[1]:+.4f})"
        gaps = [(e, e.score.loss - e.train_loss) for e in (best, last) if e.train_loss is not None]
        gap = f"; the gap to the training loss went from {gaps[0][1]:.3f} to {gaps[1][1]:.3f}" if len(gaps) == 2 else ""
        if self.perhaps:
            since = f"perhaps since step {best.step} (epoch {best.score.epoch:.2f})"
            return f"{since}: {how_far} ({self.rise / best.score.loss:+.1%}); {UNSURE}{gap}"
        if not self.began:
            by_chance = last.difference is not None and last.difference[0] <= 0
            none = "none that chance does not explain" if by_chance else "none to speak of"
            return f"{none}: {how_far}{interval}"
        return f"began after step {best.step} (epoch {best.score.epoch:.2f}): {how_far}{interval}{gap}"


RISE, _SURE_RISE = 1.01, 1.002
"""A held-out loss this much above its lowest: without an interval it may be overfitting, beyond chance it is."""
UNSURE = "not known whether that is chance"


def overfitting(ranked: Ranking) -> Overfitting:
    best, last = ranked.best, ranked.entries[-1]
    rise = last.score.loss / best.score.loss if best.score.loss > 0 else 1.0
    return Overfitting(
        best,
        last,
        began=last.difference is not None and last.difference[0] > 0 and rise > _SURE_RISE,
        is_known=len(ranked.entries) > 1,
        perhaps=last is not best and last.difference is None and rise > RISE,
        so_far=ranked.so_far,
    )


class EarlyStop(pydantic.BaseModel):
    """What service/stop.json says to training."""

    message: str
    saves: int
    """That have not improved."""


def early_stop(run: RunDir) -> EarlyStop | None:
    """What the service has last said to training; nothing where its file is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return EarlyStop.model_validate_json(run.early_stop.read_bytes())
    return None


def asked_to_end(run: RunDir, patience: int | None) -> str | None:
    """Why the service asks training to end, if `service.patience` says so still: it may be larger than it was."""
    asked = early_stop(run)
    return None if asked is None or patience is None or asked.saves < patience else asked.message


def saves_without_improvement(scored: dict[int, Score]) -> list[int]:
    """The steps of the checkpoints since the lowest held-out loss."""
    if not scored:
        return []
    best = min(scored.values(), key=_order)
    return [step for step in scored if step > best.step]
