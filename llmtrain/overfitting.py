"""What became of the held-out loss after its lowest point: whether a run overfits, since when, and how sure that is."""

from dataclasses import dataclass

from llmtrain.ranking import Entry, Ranking

RISE, _SURE_RISE = 1.01, 1.002
"""A held-out loss this much above its lowest: without an interval it may be overfitting, beyond chance it is."""
UNSURE = "not known whether that is chance"


@dataclass(frozen=True)
class Overfitting:
    """The last scored checkpoint beside the best one."""

    best: Entry
    last: Entry
    began: bool
    """The last checkpoint is worse than the best one by more than chance explains."""
    is_known: bool
    """At least two checkpoints are scored."""
    perhaps: bool
    """It is worse, and without an interval nobody knows whether by chance."""
    so_far: str
    """See `Ranking`."""

    @property
    def rise(self) -> float:
        return self.last.score.loss - self.best.score.loss

    @property
    def epochs_past(self) -> float:
        return self.last.score.epoch - self.best.score.epoch

    def describe(self) -> str:
        """One or two sentences for people."""
        return f"{self._verdict()}{self.so_far and f'; {self.so_far}'}"

    def _verdict(self) -> str:
        best, last = self.best, self.last
        if not self.is_known:
            return "not known: it takes two checkpoints with a held-out loss"
        if best is last:
            return "none seen: the last checkpoint is the best one"
        how_far = f"{self.epochs_past:.2f} epochs past it the held-out loss is higher by {self.rise:.4f}"
        interval = "" if last.difference is None else f" (95%: {last.difference[0]:+.4f} to {last.difference[1]:+.4f})"
        gaps = [e.score.loss - e.train_loss for e in (best, last) if e.train_loss is not None]
        gap = f"; the gap to the training loss went from {gaps[0]:.3f} to {gaps[1]:.3f}" if len(gaps) == 2 else ""
        if self.perhaps:
            since = f"perhaps since step {best.step} (epoch {best.score.epoch:.2f})"
            return f"{since}: {how_far} ({self.rise / best.score.loss:+.1%}); {UNSURE}{gap}"
        if not self.began:
            by_chance = last.difference is not None and last.difference[0] <= 0
            none = "none that chance does not explain" if by_chance else "none to speak of"
            return f"{none}: {how_far}{interval}"
        return f"began after step {best.step} (epoch {best.score.epoch:.2f}): {how_far}{interval}{gap}"


def judge(ranked: Ranking) -> Overfitting:
    """Whether the last checkpoint is worse than the best one, and more so than chance explains."""
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
