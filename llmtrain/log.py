"""Log lines for people: rank 0 speaks, the others only warn. A copy goes into the run folder.

The terminal may be closed while a run is at work: then the lines go into the run folder alone.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

RANK_LOGS = "LLMTRAIN_RANK_LOGS"
"""Variable that names a folder for the output of all ranks but the first."""
_logger = logging.getLogger("llmtrain")
_OUTPUTS = {"stdout": 1, "stderr": 2}


class _CurrentStderr(logging.Handler):
    """Looks `sys.stderr` up at each line, because a live progress line replaces it for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        with terminal_may_go():
            print(self.format(record), file=sys.stderr, flush=True)  # noqa: T201


class _RunLog(logging.FileHandler):
    """What a full disk keeps out of the run folder's log is said on standard error all the same: no traceback there."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        del record


def printable(text: str, keep: str = "") -> str:
    """Text of a model, a server or a file: nothing in it can move the cursor, colour or reorder what follows.

    `keep`: such as line breaks, that stay what they are.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


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
    handler = _RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _logger.addHandler(handler)


@contextlib.contextmanager
def terminal_may_go() -> Iterator[None]:
    """Around what is written to standard error: that nobody can read it any more is no reason to end a run."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EIO, errno.EPIPE):  # a closed terminal; a pipe whose reader has ended
            _write_nowhere()


def _write_nowhere() -> None:
    """Python keeps what it could not write, and would fail on it again at exit, with an exit code of its own."""
    gone = os.fstat(2)
    if stat.S_ISREG(gone.st_mode):  # a file on a disk that fails: it may do better later
        return
    for descriptor in _OUTPUTS.values():
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(os.fstat(descriptor), gone):
                _let_go(descriptor)


def _let_go(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def open_missing_outputs() -> None:
    """For an output that whoever started this has closed (`>&-`): Python has none then, and writing to it fails."""
    for name in _OUTPUTS:
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  for the rest of the process


def escape_letters() -> None:
    """For an output whose encoding lacks letters (LC_ALL=C, PYTHONIOENCODING=ascii): they are escaped in what follows,
    as standard error does it, and end nothing. Names whose bytes are no letters stay what they are, where they can."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        with contextlib.suppress(OSError):  # what is held of what was printed before cannot be written
            sys.stdout.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write out what Python holds of both outputs, at the very end: what cannot be written is let go, or Python would
    fail on it after a good end, with an exit code of its own."""
    open_missing_outputs()
    for name, descriptor in _OUTPUTS.items():
        try:
            getattr(sys, name).flush()
        except OSError:
            with contextlib.suppress(OSError):
                _let_go(descriptor)
                getattr(sys, name).flush()


def info(message: str) -> None:
    _logger.info(message)


def to_file_alone(message: str) -> None:
    """A line for the run folder's log: where standard error gets the same in another way."""
    record = _logger.makeRecord(_logger.name, logging.ERROR, "", 0, message, (), None)
    for handler in _logger.handlers:
        if isinstance(handler, _RunLog):
            handler.handle(record)


def warning(message: str) -> None:
    _logger.warning(message)


@functools.cache
def warn_once(message: str) -> None:
    warning(message)
