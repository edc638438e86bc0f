"""How far a build has come: a bar on a terminal, a line now and then without one."""

import sys
import time
from types import TracebackType
from typing import Any, Self

_PLAIN_EVERY_S = (5.0, 60.0)
"""Between two lines, at first and at most: a job of hours should not fill its log."""


def say(text: str) -> None:
    """A line beside the bar, which is standard error's."""
    print(f"sharding: {text}", file=sys.stderr, flush=True)


class ShardProgress:
    """Shows one stage after another, in bytes of text."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._name, self._done, self._before, self._total = "", 0, 0, 0
        self._started = self._last_plain = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description:>16}"),
                BarColumn(),
                DownloadColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._name, self._total, self._done, self._before = name, total_bytes, done_bytes, done_bytes
        self._started = self._last_plain = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total_bytes, completed=done_bytes)
        else:
            before = f", {done_bytes / 1e6:,.1f} MB of them done before" if done_bytes else ""
            say(f"{name} ({total_bytes / 1e6:,.1f} MB{before})")

    def advance(self, size_bytes: int) -> None:
        self._done += size_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        first, most = _PLAIN_EVERY_S
        if now - self._last_plain >= min(most, max(first, (now - self._started) / 10)):
            self._last_plain = now
            seconds = now - self._started
            speed = max(1.0, (self._done - self._before) / seconds)  # of no text at all, too
            say(
                f"{self._name} {self._done / max(1, self._total):.0%}, {speed / 1e6:,.1f} MB/s, "
                f"{(self._total - self._done) / speed / 60:,.1f} min left"
            )
