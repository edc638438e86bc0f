"""What the Hub should show, derived from the ledgers: which checkpoint on `main`, which tags, whether it is stale."""

import hashlib
import json

from llmtrain import choose, ledger, retention
from llmtrain.config import RunConfig
from llmtrain.ledger import Upload
from llmtrain.rundir import RunDir


def digest(run: RunDir, repo: str) -> str | None:
    """Tells whether what `main` shows has changed; None while nothing is uploaded."""
    uploads = {step: u for step, u in ledger.uploads(run).items() if u.repo == repo}
    if not uploads:
        return None
    scored = [*ledger.scores(run, "heldout").values(), *ledger.scores(run, "test").values()]
    scores = [(s.step, s.split, s.checkpoint, s.loss) for s in scored]
    told = {"scores": scores, "uploads": {s: (u.commit, u.removed) for s, u in uploads.items()}}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def best_uploaded(run: RunDir, repo: str) -> Upload | None:
    """What belongs on `main`: of the confirmed checkpoints the first that cannot be told from the best one."""
    uploads = {s: u for s, u in ledger.uploads(run).items() if u.repo == repo and not u.removed}
    ranked = choose.ranking(run)
    if ranked is None or not uploads:
        return uploads[max(uploads)] if uploads else None
    there = [e for e in ranked.entries if e.step in uploads and uploads[e.step].checkpoint == e.score.checkpoint]
    if not there:
        return uploads[max(uploads)]
    ties = [e for e in there if e.is_best or e.is_tie]
    return uploads[(ties or [min(there, key=lambda e: e.score.loss)])[0].step]


def untaggable(run: RunDir, config: RunConfig) -> list[int]:
    """Uploaded steps whose tags the rule removes (hub.prune)."""
    if not config.hub.prune:
        return []
    losses = {step: score.loss for step, score in ledger.scores(run).items()}
    tagged = [s for s, u in ledger.uploads(run).items() if u.repo == config.hub.repo and not u.removed]
    kept = retention.to_keep(tagged, losses, config.checkpoint)
    return [s for s in sorted(tagged) if s not in kept and s in losses]
