"""`llmtrain report RUN`: one page about a run, RUN/report/index.html, and its figures as PNG beside it."""

import platform
import time
from importlib import metadata
from pathlib import Path

from launcher.report import headline, sections, theme, words
from launcher.report.facts import AXES, read_facts
from launcher.report.markup import Html, element
from launcher.watching.queue_view import read_queue
from llmtrain import __version__, files, summary
from llmtrain.errors import disk_errors
from llmtrain.rundir import RunDir

_CONTENTS = {
    "losses": "Losses",
    "ranking": "Checkpoints",
    "gap": "Gap",
    "samples": "Text",
    "optimisation": "Speed",
    "events": "On the way",
    "configuration": "Configuration",
}
_ANEW = "it writes the page anew"


def write_report(run: RunDir) -> Path:
    """Write the page about a run as it is now; returns its path.

    Raises:
        RunFolderError: there is no run in that folder.
    """
    facts = read_facts(run, read_queue([run]))
    if facts.now.training.state in ("finished", "ended early"):
        with disk_errors("summary", run.path, then=_ANEW):
            summary.renew(run, with_curve=facts.config is None or facts.config.log.report)
    below, pictures = sections.everything(facts)
    body = element("main", headline.header(facts), headline.cards(facts), below)
    write_page(run.report, f"{facts.name}: {facts.now.training.state}", [bar(_CONTENTS), body, footer()])
    with disk_errors("report", run.report.parent, then=_ANEW):
        for picture in pictures:
            files.write_atomic(run.report.parent / f"{picture.name}.png", picture.png)
    return run.report


def write_page(path: Path, title: str, body: list[Html]) -> None:
    with disk_errors("report", path.parent, then=_ANEW):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, theme.document(title, Html("".join(body))))


def bar(contents: dict[str, str]) -> Html:
    """Always at the top: where things are, and what the figures' horizontal axis shows."""
    links = [element("a", name, href=f"#{ident}") for ident, name in contents.items()]
    choices = [
        (
            element("input", type="radio", name_="axis", id=f"axis-{axis}", checked=axis == AXES[0]),
            element("label", axis.capitalize(), for_=f"axis-{axis}"),
        )
        for axis in AXES
    ]
    switch = element("fieldset", element("legend", "Horizontal axis of the figures"), choices, class_="switch")
    return element("div", element("div", element("nav", links, aria_label="Sections"), switch), class_="bar")


def footer() -> Html:
    versions = {"llmtrain": __version__, "Python": platform.python_version()}
    for package in ("torch", "transformers", "matplotlib"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    makers = ", ".join(f"{name} {version}" for name, version in versions.items())
    now = time.time()
    return element("footer", f"Made {words.moment(now)} {time.strftime('%Z', time.localtime(now))} with {makers}.")
