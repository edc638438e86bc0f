"""Log lines for people: rank 0 speaks, the others only warn. A copy goes into the run folder."""

import logging
import sys
from pathlib import Path

_logger = logging.getLogger("llmtrain")


class _CurrentStderr(logging.Handler):
    """Looks `sys.stderr` up at each line, because a live progress line replaces it for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)  # noqa: T201


def set_up(rank: int = 0) -> None:
    """Send the project's log lines to standard error; ranks above 0 show warnings only."""
    handler = _CurrentStderr()
    prefix = f"[rank {rank}] " if rank else ""
    handler.setFormatter(logging.Formatter(prefix + "%(asctime)s %(message)s", "%H:%M:%S"))
    _logger.handlers[:] = [handler]
    _logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _logger.propagate = False


def also_to_file(path: Path, alone: bool = False) -> None:
    """Append every further line to `path` too, with the date; `alone`: and nowhere else."""
    if alone:
        _logger.handlers.clear()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _logger.addHandler(handler)


def info(message: str) -> None:
    _logger.info(message)


def warning(message: str) -> None:
    _logger.warning(message)
