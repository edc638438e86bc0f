"""What checks came to: all are gathered first and shown together; any error among them refuses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.errors import UserError
from llmtrain.wording import count

Severity = Literal["ok", "warning", "error"]
_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    """In a word or two, e.g. "partition"."""
    message: str
    severity: Severity = "ok"


def fine(what: str, message: str) -> Finding:
    return Finding(what, message)


def doubtful(what: str, message: str) -> Finding:
    """It may work, or only has to wait."""
    return Finding(what, message, "warning")


def wrong(what: str, message: str) -> Finding:
    """It cannot work."""
    return Finding(what, message, "error")


class NotQueued(UserError):
    """What was to be queued would fail. Carries everything that was found, as a wrong configuration's error does."""

    exit_code = 2

    def __init__(self, problems: list[str]):
        self.problems = problems
        lines = ["  - " + problem.replace("\n", "\n    ") for problem in problems]
        super().__init__("\n".join([f"nothing was queued: {count(len(problems), 'problem')}", *lines]))


def show(findings: Iterable[Finding], console: Console) -> None:
    """A line for each."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for found in findings:
        table.add_row(Text(found.severity, style=_STYLES[found.severity]), found.what, Text(found.message))
    console.print(table)


def settle(findings: Sequence[Finding], console: Console) -> None:
    """Print what is well and what is doubtful; what is wrong follows as the error.

    Raises:
        NotQueued: there is an error among them.
    """
    show((found for found in findings if found.severity != "error"), console)
    if problems := [f"{found.what}: {found.message}" for found in findings if found.severity == "error"]:
        raise NotQueued(problems)
