"""`llmtrain compare RUN RUN ...`: on the terminal, and as a page with the curves over each other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from launcher.display import say
from launcher.report import figures, words
from launcher.report.compare import MEASURES, Comparison, Contender, compare_runs, short_names, show
from launcher.report.facts import Axis, Series
from launcher.report.figures import Estimate
from launcher.report.headline import state_badge
from launcher.report.markup import Child, Html, badge, element, table, visible
from launcher.report.page import bar, footer, write_page
from launcher.report.plots import label_axis, legend_above, picture, thin
from launcher.report.sections import forest, lead, notice, section
from launcher.report.theme import LIGHT, RUN_COLOURS
from launcher.runs import find_runs

_FEW = 4
"""So many settings that differ stand in the ranking itself, as for a sweep."""
_LONGEST_NAME = 18
_CONTENTS = {"ranking": "Ranking", "curves": "Curves", "settings": "Settings"}


def compare(paths: Sequence[Path], output: Path | None, console: Console) -> Path:
    """Print a comparison and write it as a page, by default next to the first run; returns the page's path.

    Raises:
        RunFolderError: a folder is no run, or there are fewer than two.
    """
    runs = find_runs(paths)
    comparison = compare_runs(runs)
    show(comparison, console)
    page = write_comparison(comparison, output or runs[0].path.parent / "compare.html")
    console.print()
    say(console, "page", str(page))
    return page


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page; returns its path."""
    title = f"{len(comparison.contenders)} runs compared"
    first = comparison.contenders[0]
    what = f"Best: {first.label}, {_best_of(comparison, first)}" if first.best is not None else "No held-out loss yet"
    body = element(
        "main",
        element("header", element("h1", title), element("p", what), class_="head"),
        _doubts(comparison),
        _ranking(comparison),
        _curves(comparison),
        _settings(comparison),
    )
    write_page(path, title, [bar(_CONTENTS), body, footer()])
    return path


def _best_of(comparison: Comparison, contender: Contender) -> str:
    value = contender.value(comparison.measure)
    at = "" if contender.best is None else f" at step {contender.best.step:,}"
    return f"{MEASURES[comparison.measure]} {value:.4f}{at}"


def _doubts(comparison: Comparison) -> Html | None:
    if not comparison.doubts:
        return None
    return element(
        "div",
        element("h2", "Losses are not comparable between these runs"),
        element("ul", [element("li", doubt) for doubt in comparison.doubts]),
        element("p", "They are ranked by bits per byte instead, which do not depend on the tokenizer."),
        class_="loud",
        role="alert",
    )


def _ranking(comparison: Comparison) -> Html:
    names = short_names(list(comparison.settings)) if len(comparison.settings) <= _FEW else []
    values = list(comparison.settings.values()) if names else []
    heads = ["", "Run", "", *names, "Held-out", "Above the first, 95%", "Bits/byte", "Perplexity", "Step", "Epoch"]
    heads += ["Learned tokens", "State"]
    rows = [_row(comparison, place, [row[place] for row in values]) for place in range(len(comparison.contenders))]
    numeric = {0, *range(3, len(heads) - 1)}
    classes = ["best" if place == 0 else "" for place in range(len(rows))]
    text = f"The checkpoint with the lowest {MEASURES[comparison.measure]} of each run."
    if any(bounds is not None for bounds in comparison.differences):
        text += (
            " Where the 95% interval of the difference to the first contains 0 it is a tie: another held-out text "
            "might turn them round. The intervals allow for the first being the best of all of them by luck too."
        )
    shown = table(heads, rows, numeric, classes)
    notes = [notice(f"{words.capital(caveat)}.") for caveat in comparison.caveats]
    return section("ranking", "Ranking", lead(text), _forest(comparison), shown, notes)


def _row(comparison: Comparison, place: int, settings: list[str]) -> list[Child]:
    contender = comparison.contenders[place]
    state = state_badge(contender.facts)
    name = [element("span", class_=f"dot b-{colour(place)}"), element("bdi", contender.label)]
    if contender.best is None:
        return [str(place + 1), name, None, *settings, *["\u2013"] * 7, state]
    score = contender.best.score
    mark = "best" if place == 0 else "tie" if comparison.is_tie(place) else None
    by_loss, loss, bits = comparison.measure == "loss", words.loss(score.loss), words.figure(score.bits_per_byte, 4)
    return [
        str(place + 1),
        name,
        None if mark is None else badge(mark, "best" if place == 0 else ""),
        *settings,
        element("b", loss) if by_loss else loss,
        words.interval(comparison.differences[place]),
        bits if by_loss else element("b", bits),
        words.figure(score.perplexity),
        f"{score.step:,}",
        f"{score.epoch:.2f}",
        words.quantity(contender.facts.clock.at_step("tokens", score.step)),
        state,
    ]


def colour(place: int) -> str:
    """The first ones have colours of their own, the rest share the last."""
    return RUN_COLOURS[min(place, len(RUN_COLOURS) - 1)]


def _forest(comparison: Comparison) -> Html | None:
    lines: list[Estimate] = []
    for place, contender in enumerate(comparison.contenders):
        bounds = comparison.differences[place]
        if contender.best is None or (place > 0 and bounds is None):
            continue
        value = contender.value("loss") - comparison.contenders[0].value("loss")
        note = "best" if place == 0 else "tie" if comparison.is_tie(place) else ""
        lines.append(Estimate(_short(contender.label), note, value, bounds, "best" if note else "heldout"))
    lines = lines[: figures.MOST_INTERVALS]
    if len(lines) < 2:
        return None
    alt = "Differences of the runs' best held-out losses, with 95% intervals"
    return forest(lines, alt, "held-out loss above the first, 95% interval").html


def _short(label: str) -> str:
    label = visible(label)
    return label if len(label) <= _LONGEST_NAME else f"{label[: _LONGEST_NAME - 1]}\u2026"


def _curves(comparison: Comparison) -> Html:
    drawn = picture(
        "curves",
        "Line chart of the held-out losses of all runs",
        lambda figure, axis, narrow: draw_curves(comparison, figure, axis, narrow),
        (430, 380),
    )
    dashed = "; dashed: on training rows, scored alike" if comparison.measure == "loss" else ""
    text = lead(
        f"{MEASURES[comparison.measure].capitalize()} as training measured it{dashed}. Marked: the best checkpoint."
    )
    return section("curves", "Curves", text, drawn.html)


def draw_curves(comparison: Comparison, figure: Figure, axis: Axis, narrow: bool) -> None:
    """All runs over each other, the best on top."""
    axes = figure.add_subplot()
    seen: list[Series] = []
    for place, contender in reversed(list(enumerate(comparison.contenders))):
        facts, shade = contender.facts, LIGHT[colour(place)]
        series = facts.heldout(comparison.measure)
        seen.append(series)
        drawn = thin(series)
        x = facts.clock.at(axis, drawn.steps)
        axes.plot(x, drawn.mean, color=shade, linewidth=2.2, label=_short(contender.label), zorder=3 - place / 100)
        if comparison.measure == "loss":
            seen.append(facts.heldout("train_loss"))
            train = thin(seen[-1])
            axes.plot(facts.clock.at(axis, train.steps), train.mean, color=shade, lw=1.2, linestyle=(0, (3, 2)))
        if contender.best is not None and np.isfinite(contender.value(comparison.measure)):
            at = facts.clock.at_step(axis, contender.best.step)
            axes.plot(
                at, contender.value(comparison.measure), color=shade, marker="*", markersize=16,
                markeredgecolor=LIGHT["card"], markeredgewidth=1.0, linestyle="none", zorder=4,
            )  # fmt: skip
    limits = figures.crop(seen)
    if limits is not None:
        axes.set_ylim(*limits)
    axes.set_ylabel(f"{MEASURES[comparison.measure]}{', nats per token' if comparison.measure == 'loss' else ''}")
    label_axis(axes, axis, narrow)
    legend_above(figure, narrow, reverse=True)


def _settings(comparison: Comparison) -> Html:
    if not comparison.settings:
        return section("settings", "Settings that differ", lead("None: the same configuration, run again."))
    heads = ["Setting", *(contender.label for contender in comparison.contenders)]
    rows: list[list[Child]] = [[element("code", key), *values] for key, values in comparison.settings.items()]
    return section("settings", "Settings that differ", table(heads, rows, set()))
