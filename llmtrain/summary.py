"""What a run came to: the best checkpoint, where overfitting began, and a picture of it."""

import contextlib
import io
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtrain import choose, files, jsonl, ledger, overfitting, ranking
from llmtrain.choose import Choice
from llmtrain.ranking import Ranking
from llmtrain.rundir import RunDir


@dataclass(frozen=True)
class Summary:
    steps: int
    epochs: float
    first_heldout: float
    first_step: int
    last_heldout: float
    last_step: int
    """Of the last evaluation."""
    lowest_heldout: float
    lowest_step: int
    lowest_epoch: float
    best_checkpoint: str | None
    best_checkpoint_heldout: float | None
    overfits: bool | None
    """None where it is not known."""
    overfitting: str
    """What became of the held-out loss after its lowest point, for people."""
    best_reason: str
    """Why that checkpoint: how it was scored, and what it cannot be told from."""
    last_train_loss: float


def summarise(run: RunDir) -> Summary | None:
    """From the ledgers alone; None while there is no evaluation, or no step."""
    evaluations, newest = jsonl.read(run.heldout), jsonl.last_record(run.metrics)
    if not evaluations or newest is None:
        return None
    lowest = min(evaluations, key=lambda e: e["loss"])
    last = evaluations[-1]
    ranked = ranking.rank(run)
    chosen = choose.propose_on_disk(run, ranked)
    last_train_loss = last.get("train_loss", newest["loss"])
    overfits, verdict = _overfitting(run, ranked, evaluations, lowest, last_train_loss)
    return Summary(
        steps=newest["step"],
        epochs=newest["epoch"],
        first_heldout=evaluations[0]["loss"],
        first_step=evaluations[0]["step"],
        last_heldout=last["loss"],
        last_step=last["step"],
        lowest_heldout=lowest["loss"],
        lowest_step=lowest["step"],
        lowest_epoch=lowest["epoch"],
        best_checkpoint=None if chosen is None else str(run.checkpoint(chosen.step)),
        best_checkpoint_heldout=None if chosen is None else chosen.loss,
        best_reason="" if chosen is None else _reason(chosen, is_ranked=ranked is not None),
        overfits=overfits,
        overfitting=verdict,
        last_train_loss=last_train_loss,
    )


def _overfitting(
    run: RunDir,
    ranked: Ranking | None,
    evaluations: list[dict[str, Any]],
    lowest: dict[str, Any],
    last_train_loss: float,
) -> tuple[bool | None, str]:
    """Whether, where known, and in words: of the scored checkpoints; of fewer than two, of training's evaluations."""
    first, last = evaluations[0], evaluations[-1]
    if ranked is not None and (verdict := overfitting.judge(ranked)).is_known:
        return None if verdict.perhaps else verdict.began, verdict.describe()
    if last["step"] == first["step"]:
        return None, "not known: the held-out loss was measured once"
    if last["step"] > lowest["step"] and last["loss"] > lowest["loss"] * overfitting.RISE:
        scored = "nothing" if ranked is None else "only one checkpoint"
        return None, (
            f"perhaps since step {lowest['step']} (epoch {lowest['epoch']:.2f}): the held-out loss rose by "
            f"{last['loss'] / lowest['loss'] - 1:.1%} while the training loss went to {last_train_loss:.4f}; "
            f"{overfitting.UNSURE} ({scored} scored from disk: {ledger.drain_command(run.path)})"
        )
    return False, "none seen: the held-out loss ended at (or within 1% of) its lowest"


def _reason(chosen: Choice, is_ranked: bool) -> str:
    """How it was scored, and of a ranking why that one."""
    how = "scored from disk" if chosen.origin == "disk" else "scored at the save"
    return f"{how}: {chosen.why}" if is_ranked else how


def describe(run: RunDir, summary: Summary) -> str:
    """The summary for a terminal."""
    if summary.first_step == summary.last_step:
        heldout = f"{summary.first_heldout:.4f} at step {summary.first_step} (measured once)"
    else:
        first = f"step {summary.first_step}" if summary.first_step else "the start"
        last = "the end" if summary.last_step == summary.steps else f"step {summary.last_step}"
        saved = "" if summary.lowest_step in {0, *ledger.saved_steps(run)} else ", not saved"
        heldout = (
            f"{summary.first_heldout:.4f} at {first} -> {summary.last_heldout:.4f} at {last}, "
            f"lowest {summary.lowest_heldout:.4f} at step {summary.lowest_step} "
            f"(epoch {summary.lowest_epoch:.2f}{saved})"
        )
    lines = [
        f"{summary.steps} steps, {summary.epochs:.2f} epochs",
        f"held-out loss   {heldout}",
        f"overfitting     {summary.overfitting}",
    ]
    if summary.best_checkpoint is not None:
        lines += [
            f"use checkpoint  {summary.best_checkpoint} (held-out loss {summary.best_checkpoint_heldout:.4f}, "
            f"{summary.best_reason})",
            f"try it          llmtrain generate {shlex.quote(summary.best_checkpoint)}",
        ]
    if run.report.exists():
        lines.append(f"report          {run.report}")
    if run.curve.exists():
        lines.append(f"curves          {run.curve}")
    lines.append(f"TensorBoard     tensorboard --logdir {shlex.quote(str(run.path.parent))}")
    return "\n".join(lines)


def write(run: RunDir, with_curve: bool) -> Summary | None:
    """Write summary.json and curve.png; returns the summary. A curve of the run's earlier life does not stay."""
    summary = summarise(run)
    if summary is not None:
        _put(run, summary, with_curve)
    return summary


def renew(run: RunDir, with_curve: bool) -> bool:
    """Write both again if what they say has changed since, as checkpoints were scored or deleted; whether it had."""
    run = RunDir(run.path.absolute())
    summary = summarise(run)
    if summary is None or (run.summary.exists() and _content(run.summary.read_bytes()) == _content(_json(summary))):
        return False
    _put(run, summary, with_curve)
    return True


def _put(run: RunDir, summary: Summary, with_curve: bool) -> None:
    files.write_atomic(run.summary, _json(summary))
    if with_curve:
        draw(run, run.curve)
    else:
        run.curve.unlink(missing_ok=True)


def _json(summary: Summary) -> str:
    return json.dumps(asdict(summary), indent=1) + "\n"


def _content(text: str | bytes) -> object:
    """Of a summary.json, whatever folder it was written from; of a damaged one nothing."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found = json.loads(text, parse_constant=str)  # NaN equals nothing
        best = found["best_checkpoint"]
        return {**found, "best_checkpoint": None if best is None else Path(best).name}
    return None


def discard(run: RunDir) -> None:
    """Of a run that goes on after its end: what was written then would be taken for what it has come to now."""
    if run.summary.exists():
        for path in (run.report, run.curve, run.summary):
            path.unlink(missing_ok=True)


def write_report(run: RunDir) -> None:
    """The page. A process border instead of an import: the core does not depend on the launcher."""
    subprocess.run([sys.executable, "-m", "launcher", "report", str(run.path), "--quiet"], check=False)


def _lowest_saved(run: RunDir, evaluations: list[dict[str, Any]]) -> tuple[int, float, float, str] | None:
    """Step, epoch and held-out loss of the best checkpoint, kept or not: as scored, else as measured at the save."""
    if (ranked := ranking.rank(run)) is not None:
        return ranked.best.step, ranked.best.score.epoch, ranked.best.score.loss, ranked.scope
    steps = ledger.saved_steps(run)
    saved = [e for e in evaluations if e["step"] in steps]
    best = min(saved, key=lambda e: e["loss"], default=None)
    return None if best is None else (best["step"], best["epoch"], best["loss"], "saved")


def has_curve(run: RunDir) -> bool:
    """Whether there is something to draw: a step, and an evaluation."""
    return all(jsonl.last_record(records) is not None for records in (run.metrics, run.heldout))


def draw(run: RunDir, to: Path) -> None:
    """Train and held-out loss over epochs, with a second axis for learned tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    newest, evaluations = jsonl.last_record(run.metrics), jsonl.read(run.heldout)
    assert newest is not None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    def line(records: Path, key: str, **style: Any) -> None:
        points = jsonl.columns(records, ("epoch", key)).drop_null()
        if len(points):
            axes.plot(points["epoch"].to_numpy(), points[key].to_numpy(), **style)

    line(run.metrics, "loss", color="#9db8d9", linewidth=0.8, label="train (each step)")
    line(run.heldout, "train_loss", color="#2a5d9f", linewidth=1.6, label="train (scored like held-out)")
    line(run.heldout, "loss", color="#d1495b", linewidth=2, marker="o", markersize=3, label="held-out")
    lowest = min(evaluations, key=lambda e: e["loss"])
    axes.margins(x=0.15)  # room for the label of a lowest point at the end
    axes.axvline(lowest["epoch"], color="#d1495b", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"lowest {lowest['loss']:.3f}\nstep {lowest['step']}",
        (lowest["epoch"], lowest["loss"]),
        textcoords="offset points",
        xytext=(6, 14),
        fontsize=8,
        color="#8c2f3b",
    )
    saved = _lowest_saved(run, evaluations)
    if saved is not None and saved[0] != lowest["step"]:
        step, epoch, loss, of = saved
        axes.plot([epoch], [loss], marker="*", markersize=9, linestyle="none", color="#8c2f3b")
        axes.annotate(
            f"lowest {of} {loss:.3f}\nstep {step}",
            (epoch, loss),
            textcoords="offset points",
            xytext=(6, -24),
            fontsize=8,
            color="#8c2f3b",
        )
    per_epoch = newest["targets"] / newest["epoch"]
    upper = axes.secondary_xaxis("top", functions=(lambda e: e * per_epoch, lambda t: t / per_epoch))
    upper.set_xlabel("learned tokens")
    axes.set(xlabel="epochs", ylabel="loss (nats per token)", title=run.path.name.replace("$", r"\$"))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    files.write_atomic(to, drawn.getvalue())
