"""Log lines for people: rank 0 speaks, the others only warn. A copy goes into the run folder."""

import logging
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(message)s"
_logger = logging.getLogger("llmtrain")


def set_up(rank: int = 0) -> None:
    """Send the project's log lines to standard error; ranks above 0 show warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {rank}] " if rank else ""
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, "%H:%M:%S"))
    _logger.handlers[:] = [handler]
    _logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _logger.propagate = False


def also_to_file(path: Path) -> None:
    """Append every further line to `path` too, with the date."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _logger.addHandler(handler)


def info(message: str) -> None:
    _logger.info(message)


def warning(message: str) -> None:
    _logger.warning(message)
