"""Runs compared: which did best, by how much more than chance, what was set differently; and that for a terminal."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from launcher.choosing import listing
from launcher.display import Column, fitted, one_line
from launcher.report import words
from launcher.report.facts import Facts, read_facts
from launcher.watching.queue_view import read_queue
from llmtrain import intervals, ranking, recipe
from llmtrain.config import yaml_lines
from llmtrain.errors import RunFolderError
from llmtrain.ranking import Entry
from llmtrain.rundir import RunDir

Measure = Literal["loss", "bits_per_byte"]
MEASURES: dict[Measure, str] = {"loss": "held-out loss", "bits_per_byte": "bits per byte"}
_NAMES = {"run.name", "run.dir", "run.resume"}
"""Settings in which runs differ without being different."""


@dataclass(frozen=True)
class Contender:
    """One run, with its best checkpoint."""

    label: str
    facts: Facts
    best: Entry | None
    """None while it has no held-out loss."""
    fingerprint: str | None
    """Of its data; None where no checkpoint is left to tell."""

    def value(self, measure: Measure) -> float:
        """What it is ranked by; infinite where there is none."""
        if self.best is None:
            return float("inf")
        found = self.best.score.loss if measure == "loss" else self.best.score.bits_per_byte
        return found if np.isfinite(found) else float("inf")


@dataclass(frozen=True)
class Comparison:
    contenders: list[Contender]
    """The best one first."""
    measure: Measure
    differences: list[intervals.Interval | None]
    """Simultaneous 95% intervals of each best checkpoint's loss minus the very best one's, where the same text was
    scored in the same precision."""
    doubts: list[str]
    """Why losses cannot be compared."""
    caveats: list[str]
    """Why a difference to the first has no interval though losses can be compared."""
    settings: dict[str, list[str]]
    """Those that differ, each with the values of all contenders."""

    def is_tie(self, place: int) -> bool:
        """Whether that contender cannot be told from the first."""
        bounds = self.differences[place]
        return bounds is not None and bounds[0] <= 0


def compare_runs(runs: Sequence[RunDir]) -> Comparison:
    """Raises RunFolderError where there is nothing to compare."""
    if len(runs) < 2:
        raise RunFolderError("a comparison takes two runs or more: name them, or a folder that holds them")
    queue = read_queue(runs)
    every = [read_facts(run, queue) for run in runs]
    contenders = [_contender(label, facts) for label, facts in zip(labels(runs), every, strict=True)]
    doubts = find_doubts(contenders)
    measure: Measure = "bits_per_byte" if doubts else "loss"
    contenders.sort(key=lambda c: (c.value(measure), c.label))
    differences: list[intervals.Interval | None] = [None] * len(contenders)
    caveats: list[str] = []
    if not doubts:
        differences[1:] = _differences(contenders[0], contenders[1:])
        caveats = _caveats(contenders[0], contenders[1:])
    return Comparison(contenders, measure, differences, doubts, caveats, differing_settings(contenders))


def labels(runs: Sequence[RunDir]) -> list[str]:
    """The shortest ends of their paths that tell them apart."""
    paths = [run.path.resolve() for run in runs]
    lengths = range(1, max(len(path.parts) for path in paths) + 1)
    ends = (["/".join(path.parts[-length:]) for path in paths] for length in lengths)
    return next(found for found in ends if len(set(found)) == len(set(paths)))


def _contender(label: str, facts: Facts) -> Contender:
    read = (listing.read_manifest(facts.run.checkpoint(step)) for step in reversed(facts.run.checkpoint_steps()))
    newest = next((found for found in read if found is not None), None)
    best = None if facts.ranking is None else facts.ranking.best
    return Contender(label, facts, best, None if newest is None else newest.fingerprint)


def find_doubts(contenders: Sequence[Contender]) -> list[str]:
    """Reasons for which a loss of one run says nothing about a loss of another."""
    doubts: list[str] = []
    prints = {c.label: c.fingerprint[:12] for c in contenders if c.fingerprint is not None}
    are_same_data = len(prints) == len(contenders) and len(set(prints.values())) == 1
    if len(set(prints.values())) > 1:
        told = ", ".join(f"{label} {print_}" for label, print_ in prints.items())
        doubts.append(f"the data are not the same (fingerprints: {told})")
    recipes = [recipe.recipe_of(c.facts.config) for c in contenders if c.facts.config is not None]
    if not are_same_data:
        for key in sorted({key for r in recipes for key in r}):
            if len({json.dumps(r.get(key), sort_keys=True) for r in recipes}) > 1:
                name = "model.context" if key == "context" else f"data.{key}"
                doubts.append(f"{name} differs")
    sizes = {c.best.score.targets for c in contenders if c.best is not None and c.best.score.targets}
    if len(sizes) > 1:
        told = " and ".join(f"{number:,}" for number in sorted(sizes))
        doubts.append(f"the held-out splits are not the same size ({told} learned tokens)")
    if doubts and any(d.startswith(("data.sources", "data.split", "data.format")) for d in doubts):
        doubts.append("not even the held-out text is the same, so bits per byte compare only roughly")
    return doubts


def _differences(first: Contender, others: Sequence[Contender]) -> list[intervals.Interval | None]:
    if first.best is None:
        return [None] * len(others)
    bests = [None if other.best is None else (other.facts.run, other.best.score) for other in others]
    return ranking.differences((first.facts.run, first.best.score), bests)


def _caveats(first: Contender, others: Sequence[Contender]) -> list[str]:
    """Training's own losses do not say their precision, and have no interval anyway."""
    if first.best is None or not (wanted := ranking.precision(first.best.score)):
        return []
    scored = [(c.label, ranking.precision(c.best.score)) for c in others if c.best is not None]
    return [
        f"no interval for {label}: {ranking.why_apart(precision, first.label, wanted)}"
        for label, precision in scored
        if precision not in ("", wanted)
    ]


def differing_settings(contenders: Sequence[Contender]) -> dict[str, list[str]]:
    """Every setting that is not the same in all runs."""
    flat = [_flat_settings(c.facts) for c in contenders]
    keys = list(dict.fromkeys(key for settings in flat for key in settings if key not in _NAMES))
    rows = {key: [settings.get(key, "\u2013") for settings in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flat_settings(facts: Facts) -> dict[str, str]:
    """`section.key` and value, as written in config.yaml; nothing where that is no YAML."""
    try:
        values, _ = yaml_lines.read(facts.config_text, str(facts.run.config))
    except yaml_lines.YamlError:
        return {}
    found: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        else:
            found[path] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    walk(values, "")
    return found


def short_names(keys: Sequence[str]) -> list[str]:
    """Settings by their last word, where that tells them apart."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return [name if last.count(name) == 1 else key for name, key in zip(last, keys, strict=True)]


def show(comparison: Comparison, console: Console) -> None:
    """For a terminal."""
    if comparison.doubts:
        console.print(Text("LOSSES ARE NOT COMPARABLE BETWEEN THESE RUNS", style="bold yellow"))
        for doubt in comparison.doubts:
            console.print(Text(f"  - {one_line(doubt)}", style="yellow"))
        console.print(Text("Ranked by bits per byte instead, which do not depend on the tokenizer.\n", style="yellow"))
    table, left_out = fitted(_columns(comparison), _styles(comparison), console.width)
    console.print(table)
    if left_out:
        console.print(Text(f"left out, too narrow here: {', '.join(left_out)}", style="dim"))
    for caveat in comparison.caveats:
        console.print(Text(one_line(caveat), style="yellow"))
    names = short_names(list(comparison.settings))
    console.print()
    if not comparison.settings:
        console.print("No setting differs.")
        return
    console.print(Text("Settings that differ", style="bold"))
    columns = [Column("run", [one_line(c.label) for c in comparison.contenders], 99, left=True)]
    for number, (name, values) in enumerate(zip(names, comparison.settings.values(), strict=True)):
        columns.append(Column(one_line(name), [_cut(one_line(value)) for value in values], 50 - number))
    table, left_out = fitted(columns, ["" for _ in comparison.contenders], console.width)
    console.print(table)
    if left_out:
        console.print(Text(f"and {', '.join(left_out)} (on the page)", style="dim"))


def _cut(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:31]}\u2026"


def _columns(comparison: Comparison) -> list[Column]:
    every = comparison.contenders
    scores = [None if c.best is None else c.best.score for c in every]
    tokens = [None if c.best is None else c.facts.clock.at_step("tokens", c.best.step) for c in every]
    return [
        Column("", [str(place) for place in range(1, len(every) + 1)], 90),
        Column("run", [one_line(c.label) for c in every], 100, left=True),
        Column("best held-out", ["" if s is None else words.loss(s.loss) for s in scores], 80),
        Column("bits/byte", ["" if s is None else words.figure(s.bits_per_byte, 4) for s in scores],
               95 if comparison.measure == "bits_per_byte" else 30),
        Column("above the first, 95%", [words.interval(d) for d in comparison.differences], 70),
        Column("", ["tie" if comparison.is_tie(place) else "" for place in range(len(every))], 69, left=True),
        Column("step", ["" if s is None else f"{s.step:,}" for s in scores], 60),
        Column("epoch", ["" if s is None else f"{s.epoch:.2f}" for s in scores], 50),
        Column("learned tokens", ["" if t is None else words.quantity(t) for t in tokens], 40),
        Column("state", [c.facts.now.training.state for c in every], 65, left=True),
    ]  # fmt: skip


def _styles(comparison: Comparison) -> list[str]:
    return ["bold" if place == 0 else "" for place in range(len(comparison.contenders))]
