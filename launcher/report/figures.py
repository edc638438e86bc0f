"""The figures of a run's page. Each function fills an empty figure; plots.py turns it into SVG and PNG."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from launcher.report.facts import Axis, Clock, Facts, Series
from launcher.report.plots import Thinned, label_axis, legend_above, thin
from launcher.report.theme import LIGHT
from llmtrain.ranking import Entry, Ranking

MOST_INTERVALS = 14
_SETTLED = 0.1
"""After this share of a run the losses have come down from where they start."""


def _line(axes: Axes, clock: Clock, axis: Axis, series: Series, role: str, **style: object) -> None:
    """A line; with a marker at each point where there are few."""
    if len(series):
        drawn = thin(series)
        options: dict[str, object] = {"color": LIGHT[role], "linewidth": 2.0, "solid_capstyle": "round"}
        if len(series) == 1:
            options |= {"marker": "o", "markersize": 5}
        axes.plot(clock.at(axis, drawn.steps), drawn.mean, **{**options, **style})  # pyright: ignore[reportArgumentType]


def _noisy(axes: Axes, clock: Clock, axis: Axis, series: Series, role: str, width: float, label: str) -> Thinned:
    """A line that jumps from step to step; of a long one the mean, over the band in which it jumps."""
    drawn = thin(series)
    x = clock.at(axis, drawn.steps)
    if not drawn.is_whole:
        axes.fill_between(x, drawn.low, drawn.high, color=LIGHT["train-pale"], alpha=0.45, linewidth=0)
    axes.plot(x, drawn.mean, color=LIGHT[role], linewidth=width, label=label)
    return drawn


def losses(facts: Facts, figure: Figure, axis: Axis, narrow: bool) -> None:
    """Train and held-out loss, what the service scored from disk, and the best checkpoint."""
    axes, clock = figure.add_subplot(), facts.clock
    if len(facts.metrics["loss"]):
        _noisy(axes, clock, axis, facts.metrics["loss"], "train-pale", 1.1, "train, each step")
    heldout, train = facts.heldout(), facts.heldout("train_loss")
    _line(axes, clock, axis, train, "train", label="train, scored like held-out")
    _line(axes, clock, axis, heldout, "heldout", label="held-out", linewidth=2.4)
    disk = facts.disk_scores()
    if len(disk):
        axes.plot(
            clock.at(axis, disk.steps), disk.values, label="scored from disk", linestyle="none", marker="o",
            markersize=6.5, markerfacecolor=LIGHT["card"], markeredgecolor=LIGHT["disk"], markeredgewidth=1.4,
        )  # fmt: skip
    if facts.ranking is not None:
        best = facts.ranking.best
        axes.plot(
            clock.at_step(axis, best.step), best.score.loss, marker="*", markersize=19, linestyle="none",
            color=LIGHT["best"], markeredgecolor=LIGHT["card"], markeredgewidth=1.0,
            label=f"best: step {best.step:,}", zorder=5,
        )  # fmt: skip
    limits = crop(loss_series(facts))
    if limits is not None:
        axes.set_ylim(*limits)
    axes.set_ylabel("loss, nats per token")
    label_axis(axes, axis, narrow)
    legend_above(figure, narrow)


def loss_series(facts: Facts) -> list[Series]:
    """As drawn: of a long run each step's loss is a mean of neighbours, and its noise does not set the scale."""
    each = thin(facts.metrics["loss"])
    return [Series(each.steps, each.mean), facts.heldout(), facts.heldout("train_loss"), facts.disk_scores()]


def crop(series: list[Series]) -> tuple[float, float] | None:
    """Limits of the loss that leave the steep start out, where it would press all the rest flat; else None."""
    there = [s for s in series if len(s)]
    late = [s.values[s.steps >= _SETTLED * s.steps[-1]] for s in there]
    settled = np.concatenate(late) if late else np.array([])
    if len(settled) < 10:
        return None
    low, high = float(settled.min()), float(np.quantile(settled, 0.995))
    highest = max(float(s.values.max()) for s in there)
    if high <= low or highest - low < 2 * (high - low):
        return None
    return low - 0.06 * (high - low), high + 0.12 * (high - low)


def gap(facts: Facts, figure: Figure, axis: Axis, narrow: bool) -> None:
    """How much better the model does on text that it has seen."""
    axes, series = figure.add_subplot(), gap_series(facts)
    _line(axes, facts.clock, axis, series, "heldout", label="held-out minus train")
    axes.fill_between(facts.clock.at(axis, series.steps), 0, series.values, color=LIGHT["heldout"], alpha=0.1, lw=0)
    axes.axhline(0, color=LIGHT["muted"], linewidth=1)
    if facts.ranking is not None:
        best = facts.clock.at_step(axis, facts.ranking.best.step)
        axes.axvline(best, color=LIGHT["best"], linewidth=1.4, linestyle=(0, (4, 3)), label="best checkpoint")
    axes.set_ylabel("gap, nats per token")
    label_axis(axes, axis, narrow)
    legend_above(figure, narrow)


def gap_series(facts: Facts) -> Series:
    records = {step: r for step, r in facts.evaluations.items() if "train_loss" in r}
    return Series.of({step: r["loss"] - r["train_loss"] for step, r in records.items()})


def schedule(facts: Facts, figure: Figure, axis: Axis, narrow: bool) -> None:
    """Learning rate and gradient norm, one above the other."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    _line(upper, facts.clock, axis, facts.metrics["lr"], "train", label="learning rate")
    upper.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    upper.set_ylim(bottom=0)
    norms = _noisy(lower, facts.clock, axis, facts.metrics["grad_norm"], "heldout", 1.3, "gradient norm")
    if len(norms.mean) and norms.low.min() > 0 and norms.high.max() > 30 * np.median(norms.mean):
        lower.set_yscale("log")
    clip = None if facts.config is None else facts.config.optim.clip_norm
    if clip is not None:
        lower.axhline(clip, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (4, 3)), label=f"clipped at {clip:g}")
    label_axis(upper, axis, narrow, label=False)
    label_axis(lower, axis, narrow)
    legend_above(figure, narrow)


def speed(facts: Facts, figure: Figure, axis: Axis, narrow: bool) -> None:
    """Tokens a second, and below it how long training stood still for each save."""
    waits = Series.of(facts.speed.save_wait_s)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1]})
    rates = Series.of(facts.speed.tokens_per_s)
    drawn = _noisy(upper, facts.clock, axis, rates, "train", 1.5, "tokens a second")
    upper.yaxis.set_major_formatter(EngFormatter(sep=""))
    upper.set_ylim(0, 1.1 * float(np.quantile(drawn.high, 0.995)))
    lower.vlines(
        facts.clock.at(axis, waits.steps), 0, waits.values, color=LIGHT["heldout"], linewidth=2,
        label="save wait, seconds",
    )  # fmt: skip
    lower.set_ylim(bottom=0)
    label_axis(upper, axis, narrow, label=False)
    label_axis(lower, axis, narrow)
    legend_above(figure, narrow)


@dataclass(frozen=True)
class Estimate:
    """A difference with its interval, as a line of a forest plot."""

    name: str
    note: str
    value: float
    interval: tuple[float, float] | None
    role: str


def estimates(ranked: Ranking, chosen: int | None) -> list[Estimate]:
    """The best checkpoints, best first: as many as can be seen on one scale."""
    order = sorted((e for e in ranked.entries if np.isfinite(e.score.loss)), key=lambda e: (e.score.loss, e.step))
    order = [e for e in order if e.is_best or e.difference is not None][:MOST_INTERVALS]
    close = [e.difference[1] for e in order if e.difference is not None and (e.is_tie or e is order[1])]
    reach = 6 * max([*close, 1e-9])
    shown = [e for e in order if e.score.loss - ranked.best.score.loss <= reach]
    if chosen is not None and chosen not in (e.step for e in shown):  # first among many that cannot be told apart
        shown += [e for e in ranked.entries if e.step == chosen and e.is_tie]
    return [_estimate(e, ranked, chosen) for e in shown]


def _estimate(entry: Entry, ranked: Ranking, chosen: int | None) -> Estimate:
    words = ["best"] if entry.is_best else []
    if entry.step == chosen:
        words.append("proposed")
    if entry.is_tie:
        words.append("tie")
    role = "best" if entry.is_best or entry.is_tie else "heldout"
    difference = entry.score.loss - ranked.best.score.loss
    return Estimate(f"step {entry.step:,}", ", ".join(words), difference, entry.difference, role)


def forest(lines: list[Estimate], label: str, figure: Figure, narrow: bool) -> None:
    """Differences to the best with their intervals, one line each, the best on top."""
    axes = figure.add_subplot()
    for row, line in enumerate(lines):
        colour = LIGHT[line.role]
        if line.interval is not None:
            axes.plot(line.interval, (row, row), color=colour, linewidth=2.6, solid_capstyle="round")
        marker, size = ("*", 15) if line.interval is None else ("o", 7)
        axes.plot([line.value], [row], marker=marker, markersize=size, color=colour, linestyle="none")
        if line.note and not narrow:
            end = line.value if line.interval is None else line.interval[1]
            axes.annotate(
                line.note, (end, row), xytext=(12, 0), textcoords="offset points", va="center", color=colour, size=12.5
            )
    axes.axvline(0, color=LIGHT["muted"], linewidth=1)
    axes.set_yticks(range(len(lines)), [line.name for line in lines])
    for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_color(LIGHT["ink" if line.role == "best" else "muted"])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.margins(x=0.06)
    axes.set_xlabel(label)
