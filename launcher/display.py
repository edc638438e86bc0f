"""How figures are shown to people: tables that fit the terminal, sizes, times, text of unknown origin."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.log import printable

STRATEGIES = {"ddp": "DDP", "zero2": "ZeRO-2"}
"""What `strategy.kind` is called."""
_GAP = 2
"""Blanks between two columns."""
_NAME = 12
"""Width of the names of lines."""


@dataclass(frozen=True)
class Column:
    header: str
    cells: Sequence[str]
    importance: int
    """The column with the smallest one is left out first."""
    left: bool = False

    @property
    def width(self) -> int:
        return max(cell_len(text) for text in (self.header, *self.cells))


def fitted(columns: Iterable[Column], styles: Sequence[str], width: int) -> tuple[Table, list[str]]:
    """A table of those columns that fit beside each other, and the headers of the others.

    Args:
        styles: of each row; empty for none.
        width: of the terminal, in characters.
    """
    filled = [column for column in columns if any(column.cells)]
    shown = list(filled)
    while len(shown) > 1 and sum(column.width + _GAP for column in shown) - _GAP > width:
        shown.remove(min(shown, key=lambda column: column.importance))
    left_out = [column.header for column in filled if column not in shown]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in shown:
        justify = "left" if column.left else "right"
        table.add_column(Text(column.header), justify=justify, no_wrap=True)
    for number, style in enumerate(styles):
        table.add_row(*(Text(column.cells[number]) for column in shown), style=style)
    return table, left_out


def say(console: Console, name: str, text: str, style: str = "") -> None:
    console.print(named(name, text, style))


def say_command(console: Console, name: str, command: str) -> None:
    console.print(unfolded(name, command), soft_wrap=True)


def unfolded(name: str, command: str) -> Text:
    """A line with a name in front that can be copied, however long; a group of lines with it is printed uncropped."""
    return Text.assemble((f"{name:<{_NAME}} ", "bold"), printable(command), no_wrap=True, overflow="ignore")


def named(name: str, text: str, style: str = "") -> Table:
    """A line with a name in front, folded under itself where it is longer than the terminal is wide."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(min_width=_NAME, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(name, style="bold"), Text(text, style=style))
    return grid


def one_line(text: str) -> str:
    """A message of several lines as one that is printable."""
    return printable(" ".join(text.split()))


def figure(value: float | None, digits: int = 4) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def size(size_bytes: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    seconds = max(0.0, seconds)  # clocks of two machines differ
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


def when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
