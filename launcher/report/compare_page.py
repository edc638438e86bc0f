"""The page of `llmtrain compare`: who did best, the curves over each other, the settings that differ."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from launcher.report import figures, words
from launcher.report.compare import MEASURES, Comparison, Contender, short_names
from launcher.report.facts import Axis, Series
from launcher.report.figures import Estimate
from launcher.report.headline import STATE_TONES
from launcher.report.markup import Child, Html, element, table, visible
from launcher.report.page import bar, footer, write_page
from launcher.report.plots import label_axis, legend_above, picture, thin
from launcher.report.sections import lead, notice, section
from launcher.report.theme import LIGHT, RUN_COLOURS

_FEW = 4
"""So many settings that differ stand in the ranking itself, as for a sweep."""
_LONGEST_NAME = 18
_CONTENTS = {"ranking": "Ranking", "curves": "Curves", "settings": "Settings"}


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
    notes = [notice(f"{visible(caveat[:1].upper() + caveat[1:])}.") for caveat in comparison.caveats]
    return section("ranking", "Ranking", lead(text), _forest(comparison), shown, notes)


def _row(comparison: Comparison, place: int, settings: list[str]) -> list[Child]:
    contender = comparison.contenders[place]
    training = contender.facts.now.training
    tone = STATE_TONES.get(training.state, "")
    state = element("span", training.state, class_=f"badge {tone}".strip())
    name = [element("span", class_=f"dot b-{colour(place)}"), element("bdi", contender.label)]
    if contender.best is None:
        return [str(place + 1), name, None, *settings, *["\u2013"] * 7, state]
    score = contender.best.score
    tokens = contender.facts.clock.at("tokens", np.array([float(score.step)]))[0]
    mark = "best" if place == 0 else "tie" if comparison.is_tie(place) else None
    return [
        str(place + 1),
        name,
        None if mark is None else element("span", mark, class_=f"badge {'best' if place == 0 else ''}".strip()),
        *settings,
        element("b", words.loss(score.loss)) if comparison.measure == "loss" else words.loss(score.loss),
        words.interval(comparison.differences[place]),
        words.figure(score.bits_per_byte, 4)
        if comparison.measure == "loss"
        else element("b", words.figure(score.bits_per_byte, 4)),
        words.figure(score.perplexity),
        f"{score.step:,}",
        f"{score.epoch:.2f}",
        words.quantity(float(tokens)),
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
    high = 60 + 27 * len(lines)
    drawn = picture(
        "intervals",
        "Differences of the runs' best held-out losses, with 95% intervals",
        lambda figure, _, narrow: figures.forest(lines, "held-out loss above the first, 95% interval", figure, narrow),
        (high, high),
        switchable=False,
    )
    return drawn.html


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
            at = facts.clock.at(axis, np.array([float(contender.best.step)]))
            axes.plot(
                at, [contender.value(comparison.measure)], color=shade, marker="*", markersize=16,
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
