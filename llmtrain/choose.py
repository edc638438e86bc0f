"""Which checkpoint to use: of all that are left, or of those on this disk; and what may still change that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmtrain import ledger, manifest, ranking
from llmtrain.ranking import Ranking
from llmtrain.rundir import RunDir


@dataclass(frozen=True)
class Choice:
    """The checkpoint to use."""

    step: int
    loss: float
    origin: Literal["disk", "training"]
    """What computed the loss, as in `Score`."""
    why: str
    note: str
    """A line for whoever takes it without having read why: what may still change the choice; empty: nothing."""


def propose(ranked: Ranking | None, at_save: Mapping[int, float], on_disk_alone: bool = False) -> Choice | None:
    """Of all checkpoints that are left, or of those on disk; None where none is, or no loss of any is known.

    Args:
        at_save: `losses_at_save`.
    """
    elsewhere: list[str] = []
    if ranked is not None:
        chosen = ranked.proposed
        if chosen.on_disk or (chosen.uploaded and not on_disk_alone):
            note = _note(chosen.step, ranked.caveats)
            return Choice(chosen.step, chosen.score.loss, chosen.score.origin, ranked.reason(), note)
        if chosen.uploaded:
            elsewhere = [f"step {chosen.step}, which 'llmtrain checkpoints' proposes, is on the Hub alone"]
        if here := [entry.score for entry in ranked.entries if entry.on_disk]:
            best = min(here, key=ranking.order)
            why = "; ".join(["the lowest held-out loss of those on disk", *elsewhere])
            return Choice(best.step, best.loss, best.origin, why, _note(best.step, [*elsewhere, *ranked.caveats]))
    if not at_save:
        return None
    loss, step = min(((loss, step) for step, loss in at_save.items()), key=ranking.by_loss)
    scored = "has been scored" if ranked is None else "is left of those that were scored"
    caveats = elsewhere or [f"none {scored} from disk"]
    why = "; ".join(["the lowest held-out loss that training computed of those on disk", *caveats])
    return Choice(step, loss, "training", why, _note(step, [f"it has {why}"]))


def propose_on_disk(run: RunDir, ranked: Ranking | None) -> Choice | None:
    """Of a run's checkpoints on this disk."""
    return propose(ranked, losses_at_save(run), on_disk_alone=True)


def losses_at_save(run: RunDir) -> dict[int, float]:
    """Held-out losses that training computed, of the checkpoints on this disk whose manifest can be read."""
    losses = ledger.heldout_losses(run)
    return {step: losses[step] for step in manifest.identities(run) if step in losses}


def _note(step: int, caveats: list[str]) -> str:
    return "; ".join([f"note: step {step} is taken", *caveats]) if caveats else ""
