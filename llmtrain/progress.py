"""What the person at the terminal sees while a run goes on: a live line, or plain lines without one."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import Any, cast

from llmtrain import log

_PLAIN_EVERY_S = 10.0
_BAR, _SMALLEST_BAR = 24, 8
_GAP = "  "


@dataclass(frozen=True)
class Reading:
    """The latest figures of a run."""

    step: int
    total_steps: int
    loss: float
    heldout: tuple[int, float] | None
    """Step and loss of the last evaluation."""
    tokens_per_s: float
    seconds_left: float


class Progress:
    """Shows readings on rank 0; `close` leaves the last line standing."""

    def __init__(self, total_steps: int, first_step: int, enabled: bool = True):
        self._live: Any = None
        self._enabled = enabled
        self._last: Reading | None = None
        self._step, self._total_steps = first_step, total_steps
        self._last_plain = -_PLAIN_EVERY_S
        if enabled and sys.stderr.isatty():
            self._start_live()

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=cast(Any, _Stderr()))
        self._live = Live(get_renderable=lambda: self._line(console.width), console=console)
        self._live.start()

    def _line(self, width: int) -> Any:
        """The latest reading in one line of a terminal that is so wide now."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        counter, bar_width, figures = fitted(self._step, self._total_steps, self._last, width)
        parts: list[Any] = [Text(counter, style="bold")]
        if bar_width:
            parts.append(ProgressBar(self._total_steps, self._step, bar_width))
        line = Table.grid(padding=(0, len(_GAP), 0, 0))
        for _ in range(len(parts) + 1):
            line.add_column(no_wrap=True, overflow="crop")
        line.add_row(*parts, Text(figures))
        return line

    def show_heldout(self, step: int, loss: float) -> None:
        """A new held-out loss: the live line takes it up at once."""
        if self._live is not None and self._last is not None:
            self.show(dataclasses.replace(self._last, heldout=(step, loss)))

    def show(self, reading: Reading) -> None:
        if not self._enabled:
            return
        self._last, self._step = reading, reading.step
        if self._live is not None:  # which looks several times a second
            return
        if time.monotonic() - self._last_plain >= _PLAIN_EVERY_S or reading.step == reading.total_steps:
            self._last_plain = time.monotonic()
            log.info(_GAP.join([f"step {reading.step}/{reading.total_steps}", *_figures(reading)[0]]))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class _Stderr:
    """Standard error as it is now, which rich goes on writing to, from a thread of its own, after it was closed."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    def write(self, text: str) -> int:
        with log.terminal_may_go():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with log.terminal_may_go():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def fitted(step: int, total_steps: int, reading: Reading | None, width: int) -> tuple[str, int, str]:
    """The live line in so many columns: which step of how many, the width of the bar (0: none), the figures.

    Never half a number: where there is no room the bar goes first, then one figure after the other.
    """
    counter = f"step {step:{len(str(total_steps))}}/{total_steps}"
    choices = [[]] if reading is None else _figures(reading)
    for shown in choices:
        figures = _GAP.join(shown)
        room = width - len(_GAP.join([counter, figures]))
        if room >= 0:
            bar = min(_BAR, room - len(_GAP))
            return counter, bar if bar >= _SMALLEST_BAR and shown == choices[0] else 0, figures
    return counter, 0, ""


def _figures(reading: Reading) -> list[list[str]]:
    """All of them; then fewer and fewer, the more telling ones last."""
    loss, rate = f"loss {reading.loss:.4f}", f"{reading.tokens_per_s:,.0f} tokens/s"
    left = f"{_duration(reading.seconds_left)} left"
    if reading.heldout is None:
        return [[loss, rate, left], [loss, left], [loss]]
    step, value = reading.heldout
    heldout = f"held-out {value:.4f}"
    # A step's line comes before its evaluation: that of an earlier step says so.
    whose = f"{heldout} (step {step})" if step != reading.step else heldout
    return [[loss, whose, rate, left], [loss, heldout, rate, left], [loss, heldout, left], [loss, left], [loss]]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
