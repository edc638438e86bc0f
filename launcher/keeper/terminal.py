"""What a keeper writes to standard error: its own lines, and the last ones of ranks that write to files."""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llmtrain import log


def say(line: str) -> None:
    # RuntimeError: a signal handler that prints while a print was interrupted.
    with log.terminal_may_go(), contextlib.suppress(RuntimeError):
        print(f"{time.strftime('%H:%M:%S')} llmtrain: {line}", file=sys.stderr, flush=True)


def show_last_lines(file: Path, lines: Sequence[str]) -> None:
    with log.terminal_may_go():
        print(f"\nthe last lines of {file}:", *lines, sep="\n  ", file=sys.stderr, flush=True)
