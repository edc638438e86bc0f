"""`llmtrain checkpoints RUN show STEP`: everything that is known of one checkpoint."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from launcher.choosing.listing import Listing, Row
from launcher.display import STRATEGIES, Column, duration, figure, fitted, one_line, say, size, when
from llmtrain import jsonl, ledger, log, manifest
from llmtrain.errors import CheckpointError
from llmtrain.ledger import Score
from llmtrain.manifest import Manifest
from llmtrain.wording import count, name_steps


@dataclass(frozen=True)
class _Line:
    """One measurement."""

    of: str
    by: str
    loss: float
    perplexity: float | None = None
    bits_per_byte: float | None = None
    time: float | None = None


def show(found: Listing, step: int) -> None:
    """Raises CheckpointError for a step that nothing is known of."""
    rows = [row for row in found.rows if row.step == step]
    if not rows:
        known = name_steps(row.step for row in found.rows) if found.rows else "no checkpoint"
        raise CheckpointError(f"{found.run.path}: nothing is known of a step {step}; there are: {known}")
    console = Console(highlight=False)
    for row in rows:  # a step that was saved again after its first checkpoint went into quarantine has two
        _show_checkpoint(console, found, row)
    _show_scores(console, found, rows[-1])
    _show_upload(console, found, step)
    for event in ledger.events(found.run):
        if event.step == step:
            say(console, "event", f"{when(event.time)}  {event.kind}: {one_line(event.message)}")
    _show_sample(console, found, step)


def _show_checkpoint(console: Console, found: Listing, row: Row) -> None:
    marks = ["> proposed"] if row is found.proposed else []
    if row.entry is not None:
        marks += ["best"] if row.entry.is_best else ["within noise of the best"] if row.entry.is_tie else []
    say(console, "step", f"{row.step:,}  {', '.join([row.place, *marks])}")
    if not (row.on_disk or row.damaged or row.quarantined):
        return
    folder = found.path(row)
    say(console, "folder", str(folder))
    try:
        described = manifest.read(folder)
    except (CheckpointError, OSError) as error:
        say(console, "BAD", one_line(str(error)), style="red")
        return
    _show_position(console, described)
    columns = [
        Column("file", [log.printable(name) for name in described.files], 9, left=True),
        Column("size", [size(info.size_bytes) for info in described.files.values()], 8),
        Column("SHA-256", [info.sha256[:16] for info in described.files.values()], 7, left=True),
    ]
    console.print(fitted(columns, [""] * len(described.files), console.width)[0])
    console.print()


def _show_position(console: Console, described: Manifest) -> None:
    state = described.train_state
    say(console, "position", f"epoch {described.epoch:.2f}: {state.samples:,} rows, {state.targets:,} learned tokens")
    ranks = count(described.world_size, "rank")
    say(console, "saved by", f"{ranks}, {STRATEGIES.get(described.strategy, one_line(described.strategy))}")
    batch = f"{described.global_batch_size} rows a step, seed {described.seed}"
    say(console, "data", f"{described.num_rows:,} rows, {batch}, fingerprint {described.fingerprint[:12]}")
    say(console, "identity", manifest.identity(described)[:12])


def _show_scores(console: Console, found: Listing, row: Row) -> None:
    measured = ledger.heldout_at_saves(found.run).get(row.step, {})
    test = ledger.scores(found.run, "test").get(row.step)
    lines: list[_Line] = []
    if row.entry is not None:
        lines.append(_line("held-out", row.entry.score))
    if test is not None and (row.entry is None or test.checkpoint == row.entry.score.checkpoint):
        lines.append(_line("test", test))
    if measured:
        by = "training"
        lines.append(_Line("held-out", by, measured["loss"], measured.get("perplexity"), measured.get("bits_per_byte")))
        if "train_loss" in measured:
            lines.append(_Line("training rows", by, measured["train_loss"]))
    if not lines:
        say(console, "scores", "none yet")
        return
    columns = [
        Column("scored on", [line.of for line in lines], 9, left=True),
        Column("loss", [figure(line.loss) for line in lines], 8),
        Column("perplexity", [figure(line.perplexity, 2) for line in lines], 6),
        Column("bits/byte", [figure(line.bits_per_byte) for line in lines], 5),
        Column("by", [line.by for line in lines], 7, left=True),
        Column("when", ["" if line.time is None else when(line.time) for line in lines], 4, left=True),
    ]
    console.print(fitted(columns, [""] * len(lines), console.width)[0])
    console.print()
    _show_differences(console, row, measured)


def _line(name: str, score: Score) -> _Line:
    parts = ["from disk", one_line(score.how), duration(score.seconds) if score.seconds >= 1 else ""]
    by = ", ".join(part for part in parts if part) if score.origin == "disk" else "training"
    return _Line(name, by, score.loss, score.perplexity, score.bits_per_byte, score.time)


def _show_differences(console: Console, row: Row, measured: dict[str, Any]) -> None:
    if row.entry is not None and row.entry.difference is not None:
        low, high = row.entry.difference
        verdict = "cannot be told from the best" if row.entry.is_tie else "worse than the best one"
        say(console, "difference", f"95%: {low:+.4f} to {high:+.4f} above the best one's loss; {verdict}")
    tasks = {name: value for name, value in measured.items() if name.startswith("task_")}
    for name, value in tasks.items():
        say(console, "task", f"{one_line(name.removeprefix('task_').replace('_', ' '))} {value:.3f}")


def _show_upload(console: Console, found: Listing, step: int) -> None:
    upload = ledger.uploads(found.run).get(step)
    if upload is None:
        return
    where = f"{one_line(upload.repo)}, tag {one_line(upload.tag)}, commit {one_line(upload.commit)[:12]}"
    removed = "; the tag was removed again by the rule" if upload.removed else ""
    say(console, "on the Hub", f"{where}{removed}")
    took = f"{size(upload.size_bytes)} in {duration(upload.seconds)}, {count(upload.attempts, 'attempt')}"
    say(console, "", f"confirmed on {when(upload.time)} ({took})")


def _show_sample(console: Console, found: Listing, step: int) -> None:
    """What the model wrote nearest to that step: quoted as Python would, since a terminal obeys what it is sent."""
    samples = jsonl.read(found.run.samples)
    if not samples:
        return
    near = min(samples, key=lambda sample: (abs(sample["step"] - step), sample["step"]))
    at = "" if near["step"] == step else f"(at step {near['step']}) "
    say(console, "sample", f"{at}{near['prompt']!r} -> {near['text']!r}")
