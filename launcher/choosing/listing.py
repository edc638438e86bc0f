"""All checkpoints of a run with what is known of each, from its folder and its ledgers; and the one to use."""

import contextlib
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain import choose, intervals, ledger, manifest, overfitting, ranking
from llmtrain.config.load import load_written
from llmtrain.errors import CheckpointError, UserError
from llmtrain.ledger import Upload
from llmtrain.manifest import Manifest
from llmtrain.ranking import Entry, Ranking
from llmtrain.rundir import RunDir
from llmtrain.wording import name_steps


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint: on disk, on the Hub, in quarantine, or gone with only its score left."""

    step: int
    epoch: float | None
    size_bytes: int | None
    entry: Entry | None = None
    """Its score; None while it has none."""
    loss_at_save: float | None = None
    """As the training ranks computed it."""
    on_disk: bool = False
    damaged: bool = False
    """Its folder is there, but its manifest cannot be read."""
    quarantined: bool = False
    upload: Upload | None = None
    """Where its tag stands."""

    @property
    def place(self) -> str:
        if self.quarantined or self.damaged:
            return "quarantined" if self.quarantined else "damaged"
        return {
            (True, True): "disk+Hub",
            (True, False): "disk",
            (False, True): "Hub",
            (False, False): "gone",
        }[self.on_disk, self.upload is not None]

    @property
    def loss(self) -> float | None:
        return self.loss_at_save if self.entry is None else self.entry.score.loss

    @property
    def gap(self) -> float | None:
        """Held-out minus training loss."""
        if self.entry is None or self.entry.train_loss is None:
            return None
        return self.entry.score.loss - self.entry.train_loss


@dataclass(frozen=True)
class Listing:
    run: RunDir
    rows: list[Row]
    """By step."""
    ranked: Ranking | None
    proposed: Row | None
    """None where none is left, or no loss of any is known."""
    why: str
    caveat: str
    """What may still change which one is proposed (`choose.Choice.note`); empty: nothing."""
    notes: list[str]
    """What limits these figures."""

    @property
    def overfitting(self) -> str | None:
        if self.ranked is None:
            return "not known without scores from disk" if any(row.on_disk for row in self.rows) else None
        return overfitting.judge(self.ranked).describe()

    def path(self, row: Row) -> Path:
        return self.run.quarantined(row.step) if row.quarantined else self.run.checkpoint(row.step)


def gather(run: RunDir) -> Listing:
    """Reads ledgers and manifests; hashes nothing."""
    ranked = ranking.rank(run)
    scored = {} if ranked is None else {entry.step: entry for entry in ranked.entries}
    uploads = {step: upload for step, upload in ledger.uploads(run).items() if not upload.removed}
    known = {*run.checkpoint_steps(), *scored, *uploads}
    rows = [_quarantined_row(run, step) for step in run.quarantined_steps()]
    rows += [_row(run, step, scored.get(step), uploads.get(step)) for step in known]
    rows.sort(key=lambda row: (row.step, row.quarantined))
    proposed, why, caveat = propose(rows, ranked)
    return Listing(run, rows, ranked, proposed, why, caveat, [*_notes(run, rows), *_missing_intervals(run, ranked)])


def read_manifest(folder: Path) -> Manifest | None:
    """None where it cannot be read: `verify` says why."""
    with contextlib.suppress(CheckpointError, OSError):
        return manifest.read(folder)
    return None


def _row(run: RunDir, step: int, entry: Entry | None, upload: Upload | None) -> Row:
    there = run.checkpoint(step).is_dir()
    found = read_manifest(run.checkpoint(step)) if there else None
    wanted = manifest.identity(found) if found is not None else None if entry is None else entry.score.checkpoint
    if upload is not None and wanted is not None and upload.checkpoint != wanted:
        upload = None  # of what was saved here before
    return Row(
        step=step,
        epoch=entry.score.epoch if entry is not None else None if found is None else found.epoch,
        entry=entry,
        loss_at_save=None if found is None else found.heldout_loss,
        on_disk=found is not None,
        damaged=there and found is None,
        upload=upload,
        size_bytes=found.size_bytes if found is not None else None if upload is None else upload.size_bytes,
    )


def _quarantined_row(run: RunDir, step: int) -> Row:
    found = read_manifest(run.quarantined(step))
    return Row(
        step=step,
        epoch=None if found is None else found.epoch,
        size_bytes=None if found is None else found.size_bytes,
        quarantined=True,
    )


def propose(rows: list[Row], ranked: Ranking | None) -> tuple[Row | None, str, str]:
    """The one to use, why that one, and what may still change it."""
    at_save = {row.step: row.loss_at_save for row in rows if row.on_disk and row.loss_at_save is not None}
    chosen = choose.propose(ranked, at_save)
    there = {row.step: row for row in rows if row.on_disk or row.upload is not None}
    if chosen is not None and chosen.step in there:  # it may have been deleted while this was read
        return there[chosen.step], chosen.why, chosen.note
    if ranked is None:
        return None, "no checkpoint has a held-out loss yet", ""
    return None, "of those that were scored none is left, neither on disk nor on the Hub", ""


def _missing_intervals(run: RunDir, ranked: Ranking | None) -> list[str]:
    """Why some checkpoints have no interval of their difference to the best."""
    missing = [] if ranked is None else [e for e in ranked.entries if e.difference is None and not e.is_best]
    if ranked is None or not missing:
        return []
    best = ranked.best.score
    reference = ranking.read_losses(run, best)
    if reference is None:
        reason = (
            "training computed its loss as a whole (service.score)"
            if best.origin == "training"
            else f"{run.losses(best.step, best.checkpoint, best.split).name} is not in service/losses"
        )
        return [f"no intervals: they need the best one's losses stretch by stretch, and {reason}"]
    if reference.shape[1] < intervals.MIN_UNITS:
        return [
            f"no intervals: the held-out split has {reference.shape[1]} stretches; {intervals.MIN_UNITS} are needed"
        ]
    by_training = [e.step for e in missing if e.score.origin == "training"]
    notes = [f"no interval for {name_steps(by_training)}: training computed the loss as a whole"] if by_training else []
    wanted = ranking.precision(best)
    scored = [(e.step, ranking.precision(e.score)) for e in missing if e.score.origin != "training"]
    for other in sorted({precision for _, precision in scored} - {wanted}):
        steps = name_steps(step for step, precision in scored if precision == other)
        notes.append(f"no interval for {steps}: {ranking.why_apart(other, 'the best one', wanted)}")
    if others := [step for step, precision in scored if precision == wanted]:
        notes.append(f"no interval for {name_steps(others)}: no finite losses by stretch, or of another held-out text")
    return notes


def _is_never_scored(run: RunDir) -> bool:
    """Nobody scores what is not scored, unless it is asked for."""
    with contextlib.suppress(UserError):
        return load_written(run.config).service.start == "never" and not run.is_served()
    return False


def _notes(run: RunDir, rows: list[Row]) -> list[str]:
    unscored = [row for row in rows if row.entry is None and row.on_disk]
    notes: list[str] = []
    if unscored:
        at_save = ", in brackets the loss at the save" if any(row.loss_at_save is not None for row in unscored) else ""
        which = f"{name_steps(row.step for row in unscored)}{at_save}"
        if _is_never_scored(run):
            notes.append(f"never scored from disk (service.start=never): {which}")
            notes.append(f"to score: {ledger.drain_command(run.path)}")
        else:
            notes.append(f"not scored from disk yet: {which}")
    damaged = [row.step for row in rows if row.damaged]
    if damaged:
        notes.append(f"the manifest cannot be read ('verify' says why): {name_steps(damaged)}")
    bad = [row.step for row in rows if row.quarantined]
    if bad:
        notes.append(f"in quarantine, because a file did not match its hash: {name_steps(bad)}")
    return notes


def command_to_try(listing: Listing) -> str | None:
    """The command that tries the proposed one."""
    row = listing.proposed
    if row is None:
        return None
    if row.on_disk:
        return f"llmtrain generate {shlex.quote(str(listing.path(row)))}"
    return f"{download_command(row)} && llmtrain generate {_local_name(row)}"


def _local_name(row: Row) -> str:
    return RunDir(Path()).checkpoint(row.step).name


def download_command(row: Row) -> str:
    """The command that brings an uploaded one here."""
    assert row.upload is not None
    repo, tag = shlex.quote(row.upload.repo), shlex.quote(row.upload.tag)
    return f"hf download {repo} --revision {tag} --local-dir {_local_name(row)}"


def as_json(listing: Listing) -> dict[str, Any]:
    """For programs; every figure in full."""
    verdict = None if listing.ranked is None else overfitting.judge(listing.ranked)
    return {
        "run": str(listing.run.path),
        "checkpoints": [_row_as_json(listing, row) for row in listing.rows],
        "proposed": None if listing.proposed is None else listing.proposed.step,
        "why": listing.why,
        "use": command_to_try(listing),
        "overfitting": None if verdict is None else {"began": verdict.began, "text": verdict.describe()},
        "notes": listing.notes,
    }


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no such number: null where bits per byte are not known."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _row_as_json(listing: Listing, row: Row) -> dict[str, Any]:
    entry, upload = row.entry, row.upload
    score = None if entry is None else _without_nan(entry.score.model_dump(mode="json"))
    return {
        "step": row.step,
        "epoch": row.epoch,
        "place": row.place,
        "path": str(listing.path(row)) if row.on_disk or row.damaged or row.quarantined else None,
        "hub": None if upload is None else {"repo": upload.repo, "tag": upload.tag, "commit": upload.commit},
        "size_bytes": row.size_bytes,
        "score": score,
        "loss_at_save": row.loss_at_save,
        "train_loss": None if entry is None else entry.train_loss,
        "gap": row.gap,
        "task": {} if entry is None else entry.task,
        "difference": None if entry is None else entry.difference,
        "best": entry is not None and entry.is_best,
        "within_noise": entry is not None and entry.is_tie,
        "proposed": row is listing.proposed,
    }
