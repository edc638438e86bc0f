"""What the Hub should show, derived from the ledgers: which checkpoint on `main`, which tags, whether it is stale."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from llmtrain import ledger, manifest, ranking, retention
from llmtrain.config import RunConfig
from llmtrain.ledger import Upload
from llmtrain.ranking import Entry, Ranking
from llmtrain.rundir import RunDir


@dataclass(frozen=True)
class Shown:
    """What belongs on `main`, and the ranking that says so."""

    upload: Upload
    ranked: Ranking | None

    @property
    def entry(self) -> Entry | None:
        """Its place in the ranking; None as long as this very checkpoint is not scored."""
        entries = [] if self.ranked is None else self.ranked.entries
        return next((entry for entry in entries if is_of(entry, self.upload)), None)

    def title(self) -> str:
        """Of the commit that brings it."""
        if self.ranked is None or self.entry is None:
            what = "newest, not scored yet"
        elif self.entry.is_best:
            what = "best so far"
        elif self.entry.is_tie:
            what = "cannot be told from the best so far"
        else:
            what = "best of those uploaded"
        return f"{what}: step {self.upload.step}"

    def describe(self) -> str:
        """The end of "the weights are those of step N, ...": no more than is known."""
        if self.ranked is None or self.entry is None:
            return "the newest one uploaded, which is not scored on held-out data yet"
        if self.entry.is_best:
            return "the best checkpoint so far: it has the lowest loss on held-out data"
        lowest = self.ranked.best.step
        if self.entry.is_tie:
            return f"whose loss on held-out data cannot be told from the lowest one so far, that of step {lowest:,}"
        return f"which of those uploaded has the lowest loss on held-out data; that of step {lowest:,} is lower"


def digest(run: RunDir, repo: str) -> str | None:
    """Tells whether what `main` shows has changed; None while nothing is uploaded."""
    uploads = {step: u for step, u in ledger.uploads(run).items() if u.repo == repo}
    if not uploads:
        return None
    scored = [*ledger.scores(run, "heldout").values(), *ledger.scores(run, "test").values()]
    scores = [(s.step, s.split, s.checkpoint, s.loss) for s in scored]
    told = {
        "scores": scores,
        "uploads": {s: (u.commit, u.removed) for s, u in uploads.items()},
        "on disk": _scored_on_disk(run),  # of several that cannot be told apart, one on disk is proposed
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _scored_on_disk(run: RunDir) -> list[int]:
    here = manifest.identities(run)
    return sorted(step for step, score in ledger.scores(run).items() if here.get(step) == score.checkpoint)


def is_stale(run: RunDir, repo: str) -> bool:
    """Whether `main` was last renewed with something else than what it should show."""
    published: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # damaged: it is written anew
        published = json.loads(run.published.read_text())
    wanted = digest(run, repo)
    return wanted is not None and (published.get("digest"), published.get("repo")) != (wanted, repo)


def to_show(run: RunDir, repo: str) -> Shown | None:
    """What belongs on `main`: of the confirmed checkpoints the proposed one.

    Where that is not confirmed, the first that cannot be told from the best one, else the best of them; before any of
    them is scored, the newest.
    """
    uploads = uploads_at(run, repo)
    if not uploads:
        return None
    ranked = ranking.rank(run)
    there = [] if ranked is None else [e for e in ranked.entries if e.step in uploads and is_of(e, uploads[e.step])]
    if ranked is None or not there:
        return Shown(uploads[max(uploads)], ranked)
    proposed = [e for e in there if e is ranked.proposed]
    as_good = [e for e in there if e.is_as_good]
    shown = (proposed or as_good or [min(there, key=lambda e: ranking.order(e.score))])[0]
    return Shown(uploads[shown.step], ranked)


def uploads_at(run: RunDir, repo: str) -> dict[int, Upload]:
    """What this repository holds under tags."""
    return {s: u for s, u in ledger.uploads(run).items() if u.repo == repo and not u.removed}


def is_of(entry: Entry, upload: Upload) -> bool:
    """Whether these are one checkpoint: a step may have been saved again with other content."""
    return (entry.step, entry.score.checkpoint) == (upload.step, upload.checkpoint)


def untaggable(run: RunDir, config: RunConfig) -> list[int]:
    """Uploaded steps whose tags the rule removes (hub.prune); never one that it keeps on this disk: after `restore
    --step` an abandoned life's later ones are on the Hub alone."""
    if not config.hub.prune:
        return []
    losses = {step: score.loss for step, score in ledger.scores(run).items()}
    tagged = [s for s, u in ledger.uploads(run).items() if u.repo == config.hub.repo and not u.removed]
    kept = retention.to_keep(tagged, losses, config.checkpoint)
    kept |= retention.to_keep(run.checkpoint_steps(), losses, config.checkpoint)
    return [s for s in sorted(tagged) if s not in kept and s in losses]
