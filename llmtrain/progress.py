"""What the person at the terminal sees while a run goes on: a live line, or plain lines without one."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import Any, cast

from llmtrain import log

_PLAIN_EVERY_S = 10.0


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
        self._last_plain = -_PLAIN_EVERY_S
        if enabled and sys.stderr.isatty():
            self._start_live(total_steps, first_step)

    def _start_live(self, total_steps: int, first_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._live = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=cast(Any, _Stderr())),
        )
        self._task = self._live.add_task("", total=total_steps, completed=first_step, figures="")
        self._live.start()

    def show_heldout(self, step: int, loss: float) -> None:
        """A new held-out loss: the live line takes it up at once."""
        if self._live is not None and self._last is not None:
            self.show(dataclasses.replace(self._last, heldout=(step, loss)))

    def show(self, reading: Reading) -> None:
        if not self._enabled:
            return
        self._last = reading
        figures = (
            f"loss {reading.loss:.4f}{_heldout(reading)}  {reading.tokens_per_s:,.0f} tokens/s"
            f"  {_duration(reading.seconds_left)} left"
        )
        if self._live is not None:
            self._live.update(self._task, completed=reading.step, figures=figures)
        elif time.monotonic() - self._last_plain >= _PLAIN_EVERY_S or reading.step == reading.total_steps:
            self._last_plain = time.monotonic()
            log.info(f"step {reading.step}/{reading.total_steps}  {figures}")

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


def _heldout(reading: Reading) -> str:
    """A step's line comes before its evaluation: that of an earlier step says so."""
    if reading.heldout is None:
        return ""
    step, loss = reading.heldout
    return f"  held-out {loss:.4f}" + (f" (step {step})" if step != reading.step else "")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
