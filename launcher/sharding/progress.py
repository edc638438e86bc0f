"""How far a build has come: a bar on a terminal, a line every few seconds without one."""

import sys
import time
from types import TracebackType
from typing import Any, Self

_PLAIN_EVERY_S = 5.0


class ShardProgress:
    """Shows one stage after another, in bytes of text."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._name, self._done, self._total, self._last_plain = "", 0, 0, 0.0

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
        self._name, self._total, self._done, self._last_plain = name, total_bytes, done_bytes, time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total_bytes, completed=done_bytes)
        else:
            print(f"sharding: {name} ({total_bytes / 1e6:,.1f} MB)", file=sys.stderr, flush=True)

    def advance(self, size_bytes: int) -> None:
        self._done += size_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._last_plain >= _PLAIN_EVERY_S:
            self._last_plain = time.monotonic()
            share = self._done / max(1, self._total)
            print(f"sharding: {self._name} {share:.0%}", file=sys.stderr, flush=True)
