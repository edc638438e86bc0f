"""The sections of a run's page below the headline."""

import shlex
from functools import partial
from itertools import chain, groupby

import numpy as np

from launcher import display
from launcher.report import figures, words
from launcher.report.facts import Facts
from launcher.report.figures import Estimate, crop, estimates, gap_series
from launcher.report.markup import Child, Html, badge, element, join, table
from launcher.report.plots import Picture, picture
from llmtrain.ledger import Event, drain_command
from llmtrain.ranking import Entry
from llmtrain.wording import count, name_steps

_ROWS = 12
"""Of a ranking that are shown at once."""
_MORE_ROWS = 200
_TEXTS = 8
_LONGEST_TEXT = 1500
_EVENTS = 60
_KINDS = {  # what an event is called, and its tone
    "started": ("Started", ""),
    "resumed": ("Resumed", ""),
    "branched": ("Branched", ""),
    "stopped": ("Stopped", ""),
    "unsaved": ("Ended without saving", "warn"),
    "restarted": ("Started again", "warn"),
    "failed": ("Training failed", "bad"),
    "rejected": ("Checkpoint rejected", "bad"),
    "quarantined": ("Quarantined", "bad"),
    "unreadable": ("Checkpoint not readable", "warn"),
    "score-failed": ("Scoring failed", "warn"),
    "upload-failed": ("Upload failed", "warn"),
    "hub-refused": ("Hub refused", "bad"),
    "hub-accepted": ("Hub accepted", "best"),
    "upload-gone": ("Upload gone", "bad"),
    "stalled": ("Upload stalled", "warn"),
    "early-stop": ("Early stop", ""),
    "service-started": ("Service started", ""),
}


def section(ident: str, title: str, *children: Child) -> Html:
    return element("section", element("h2", title), *children, id=ident)


def lead(*children: Child) -> Html:
    return element("p", *children, class_="lead")


def notice(text: str, tone: str = "") -> Html:
    return element("p", text, class_=f"notice {tone}".strip())


def use(facts: Facts) -> Html | None:
    """Where the proposed checkpoint lies, and how to load it."""
    chosen = facts.listed.proposed
    if chosen is None:
        return None
    folder = facts.listed.path(chosen)
    is_adapter = facts.config is not None and facts.config.model.kind == "qlora"
    package, kind = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")

    def loading(*arguments: str) -> str:
        return f"from {package} import {kind}\nmodel = {kind}.from_pretrained({', '.join(arguments)})"

    rows: list[tuple[str, str]] = []
    if chosen.on_disk:
        rows = [
            ("Where it lies", str(folder)),
            ("Try it", shlex.join(["llmtrain", "generate", str(folder)])),
            ("Load it", loading(repr(str(folder / "model")))),
        ]
    if chosen.upload is not None:
        rows.append(("From the Hub", loading(repr(chosen.upload.repo), f"revision={chosen.upload.tag!r}")))
    body = [element("div", element("span", name), element("pre", text)) for name, text in rows]
    return section("use", f"Use step {chosen.step:,}", element("div", body, class_="how"))


def losses(facts: Facts) -> tuple[Html, list[Picture]]:
    """The curves."""
    if not len(facts.metrics["loss"]) and not facts.evaluations:
        return section("losses", "Losses", notice("No step has been written down yet.")), []
    drawn = picture(
        "losses",
        "Line chart of the training loss and the held-out loss over the run",
        partial(figures.losses, facts),
        (430, 340),
    )
    missing: list[str] = []
    if not facts.evaluations:
        missing.append("The held-out split has not been evaluated yet.")
    elif not len(facts.heldout("train_loss")):
        missing.append("Training rows are not scored like held-out ones (evaluate.train_rows is 0).")
    if not len(facts.disk_scores()):
        missing.append("No checkpoint has been scored from its files.")
    start = facts.heldout().values[:1]
    cut = (
        f" The first steps lie above the picture (start: {start[0]:.2f})."
        if crop(figures.loss_series(facts)) and len(start)
        else ""
    )
    text = lead(
        "Nats per token. \u201cTrain, each step\u201d is the loss of the batch being learned; the other two are scored "
        f"alike, without dropout.{cut}"
    )
    return section("losses", "Losses", text, drawn.html, notice(" ".join(missing)) if missing else None), [drawn]


def ranking(facts: Facts) -> tuple[Html, list[Picture]]:
    """All checkpoints with a score, the best first, and how sure their order is."""
    ranked = facts.ranking
    if ranked is None:
        nothing = notice("Nothing to rank yet: no saved checkpoint has a held-out loss.")
        return section("ranking", "Which checkpoint", nothing), []
    order = sorted(ranked.entries, key=lambda e: (not np.isfinite(e.score.loss), e.score.loss, e.step))
    tasks = sorted({name for e in order for name in e.task})
    chosen = None if facts.listed.proposed is None else facts.listed.proposed.step
    rows = [_row(facts, chosen, place, e, tasks) for place, e in enumerate(order, start=1)]
    classes = ["best" if e.step == chosen else "" for e in order]
    heads = ["", "Step", "", "Epoch", "Held-out", "Perplexity", "Bits/byte", "Train", "Gap"]
    heads += [name.removeprefix("task_").replace("_", " ").capitalize() for name in tasks]
    heads += ["Above the best, 95%", "Where"]
    numeric = set(range(len(heads) - 1)) - {2}
    first = [at for at, e in enumerate(order) if at < _ROWS or e.step == chosen]
    shown = table(heads, [rows[at] for at in first], numeric, [classes[at] for at in first])
    others = [at for at in range(len(rows)) if at not in first]
    rest = None
    if others:
        more = table(heads, [rows[at] for at in others[:_MORE_ROWS]], numeric)
        number = f"{len(others):,} more" if len(others) <= _MORE_ROWS else f"{_MORE_ROWS} of {len(others):,} more"
        rest = element("details", element("summary", number), more)
    lines = estimates(ranked, chosen)
    alt = "Differences of held-out losses to the best checkpoint, with 95% intervals"
    pictures = [forest(lines, alt, "held-out loss above the best, 95% interval")] if len(lines) > 1 else []
    beyond = len(ranked.entries) - len(lines)
    off = lead(f"{count(beyond, 'checkpoint')} further off: in the table alone.") if pictures and beyond else None
    notes = [notice(f"{words.capital(note)}.") for note in facts.listed.notes] if facts.is_scored else []
    inside = [lead(_how_scored(facts)), [p.html for p in pictures], off, shown, rest, notes]
    return section("ranking", "Which checkpoint", *inside), pictures


def _row(facts: Facts, chosen: int | None, place: int, entry: Entry, tasks: list[str]) -> list[Child]:
    score, train = entry.score, entry.train_loss
    marks = [
        badge(text, tone)
        for given, text, tone in (
            (entry.step == chosen, "proposed", "best"),
            (entry.is_best, "best", "best"),
            (entry.is_tie, "tie", ""),
        )
        if given
    ]
    upload = facts.uploads.get(entry.step)
    places = ["disk"] * entry.on_disk + ["Hub"] * entry.uploaded
    gone = "Hub\u2019s history" if upload is not None and upload.removed else "not kept"
    return [
        str(place),
        f"{entry.step:,}",
        marks,
        f"{score.epoch:.2f}",
        element("b", words.loss(score.loss)),
        words.figure(score.perplexity),
        words.figure(score.bits_per_byte, 4),
        words.loss(train),
        "\u2013" if train is None else words.signed(score.loss - train),
        *(words.figure(entry.task.get(name), 3) for name in tasks),
        words.interval(entry.difference),
        ", ".join(places) or gone,
    ]


def _how_scored(facts: Facts) -> str:
    if not facts.is_scored or facts.ranking is None:
        return (
            "As training itself measured them at the saves. Nothing was scored from disk, so there are no intervals: "
            f"differences may be chance. To score them: {drain_command(facts.run.path)}"
        )
    scores = [e.score for e in facts.ranking.entries]
    hows = sorted({score.how for score in scores if score.how and score.origin == "disk"})
    disk = [score.seconds for score in scores if score.origin == "disk"]
    how = f" ({', '.join(hows)}; {_seconds(sum(disk) / len(disk))} each)" if disk and hows else ""
    where = f"Loaded from their files and scored on held-out text{how}" if disk else "As the training ranks scored them"
    return (
        f"{where}. Two checkpoints are compared on the same stretches of text, drawn again with replacement. Where the "
        "95% interval of the difference to the best contains 0 it is a tie, and the first of those on this disk is "
        "proposed (else of those on the Hub). The intervals hold for all of them together, since the best of many is "
        "the best by luck too."
    )


def forest(lines: list[Estimate], alt: str, label: str) -> Picture:
    """Differences with their intervals; `label`: of the axis."""
    high = 60 + 27 * len(lines)
    return picture(
        "intervals",
        alt,
        lambda figure, _, narrow: figures.forest(lines, label, figure, narrow),
        (high, high),
        switchable=False,
    )


def gap(facts: Facts) -> tuple[Html, list[Picture]]:
    """Held-out minus train."""
    if len(gap_series(facts)) < 2:
        missing = notice("It takes two evaluations with evaluate.train_rows above 0.")
        return section("gap", "Gap between held-out and training text", missing), []
    drawn = picture(
        "gap",
        "Line chart of held-out loss minus training loss over the run",
        partial(figures.gap, facts),
        (300, 280),
    )
    text = lead("A gap that grows while the held-out loss no longer falls: the model learns its text by heart.")
    return section("gap", "Gap between held-out and training text", text, drawn.html), [drawn]


def optimisation(facts: Facts) -> tuple[Html, list[Picture]]:
    """Learning rate, gradient norm, speed."""
    inside: list[Child] = []
    pictures: list[Picture] = []
    if len(facts.metrics["lr"]):
        pictures.append(
            picture(
                "schedule",
                "Line charts of learning rate and gradient norm over the run",
                partial(figures.schedule, facts),
                (380, 360),
            )
        )
        inside += [element("h3", "Learning rate and gradient norm"), pictures[-1].html]
    if facts.speed.tokens_per_s:
        pictures.append(
            picture(
                "speed",
                "Tokens a second over the run, and how long training waited for each save",
                partial(figures.speed, facts),
                (340, 330),
            )
        )
        inside += [element("h3", "Speed"), lead(_waits(facts)), pictures[-1].html]
    else:
        inside.append(notice("No times: TensorBoard was switched off (log.tensorboard) or has written nothing yet."))
    return section("optimisation", "Optimisation and speed", *inside), pictures


def _waits(facts: Facts) -> str:
    waits, rates = list(facts.speed.save_wait_s.values()), sorted(facts.speed.tokens_per_s.values())
    middle = f"{words.quantity(rates[len(rates) // 2])} tokens a second (median), evaluations and saves left out."
    if not waits:
        return middle
    saves = count(len(waits), "save")
    return f"{middle} Training waited {_seconds(sum(waits))} in all for {saves}, {_seconds(max(waits))} at most."


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else display.duration(seconds)


def samples(facts: Facts) -> Html:
    """What the model wrote, from its first words to its last."""
    every = facts.samples
    if not every:
        return section("samples", "Generated text", notice("None yet (evaluate.sample)."))
    picked = sorted({round(at) for at in np.linspace(0, len(every) - 1, _TEXTS).tolist()})
    texts = [
        element(
            "article",
            element("h3", f"Step {int(every[at]['step']):,}"),
            element(
                "pre",
                element("span", _shortened(str(every[at]["prompt"])), class_="prompt"),
                _shortened(str(every[at]["text"])),
                dir="auto",
            ),
        )
        for at in picked
    ]
    text = f"{len(picked)} of {len(every):,}, evenly over the run; the prompt in grey."
    return section("samples", "Generated text", lead(text), element("div", texts, class_="texts"))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} \u2026 ({len(text):,} characters)"


def timeline(facts: Facts) -> Html:
    """What happened on the way; one line for what happened again and again."""
    if not facts.events:
        return section("events", "On the way", notice("Nothing has been noted."))
    grouped = [list(same) for _, same in groupby(enumerate(facts.events), key=_repeated)]
    lines = [_event([event for _, event in same]) for same in grouped[-_EVENTS:]]
    shortened = lead(f"The last {_EVENTS} of {len(grouped):,}.") if len(grouped) > _EVENTS else None
    return section("events", "On the way", shortened, element("ol", lines, class_="log"))


def _repeated(numbered: tuple[int, Event]) -> tuple[str, int]:
    """What failed and was tried again counts as one thing; all else stands for itself."""
    number, event = numbered
    return event.kind, -1 if _KINDS.get(event.kind, ("", ""))[1] == "warn" else number


def _event(same: list[Event]) -> Html:
    last = same[-1]
    name, tone = _KINDS.get(last.kind, (last.kind, ""))
    times = f"{len(same):,} times until {words.moment(last.time, seconds_too=True)}, last: " if len(same) > 1 else ""
    numbers = sorted({e.step for e in same if e.step is not None and e.kind not in ("started", "resumed")})
    about = f"{name_steps(numbers)}: " if numbers else ""
    what = [element("span", f"{about}{times}", class_="muted"), element("bdi", last.message)]
    when = element("time", words.moment(same[0].time, seconds_too=True))
    return element("li", when, element("b", name), element("span", what, class_="what"), class_=tone or None)


def configuration(facts: Facts) -> Html:
    unreadable = notice("This version cannot read it; it is shown as it stands.", "warn")
    summary = element("summary", "Every setting, defaults included")
    whole = element("details", summary, element("pre", facts.config_text))
    return section("configuration", "Configuration", unreadable if facts.config is None else None, whole)


def everything(facts: Facts) -> tuple[Html, list[Picture]]:
    """All sections, and the figures in them."""
    drawn = [losses(facts), ranking(facts), gap(facts), optimisation(facts)]
    (curves, ranks, between, speed), pictures = zip(*drawn, strict=True)
    whole = [use(facts), curves, ranks, between, samples(facts), speed, timeline(facts), configuration(facts)]
    return join(whole), list(chain.from_iterable(pictures))
