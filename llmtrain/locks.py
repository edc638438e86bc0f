"""Locks on files that say who holds them; a lock ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import os
import re
import tempfile
import time
from pathlib import Path
from typing import IO

from llmtrain import log

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a file system says that has none: Lustre without flock, NFS without lockd."""
_HELD = (errno.EAGAIN, errno.EACCES)
_LOOKS = 20
_SKEW_S = 60.0


def hold(path: Path, be_sure: str) -> IO[str] | None:
    """Lock a file for this process, and write into it who holds it; None where another process does.

    Where the file system has no locks, only one that is at work on this machine is found.

    Args:
        be_sure: of what a person has to be sure there, said once.

    Raises:
        OSError: it cannot be told whether somebody holds it; with the file's name.
    """
    handle = path.open("a+")
    try:
        if not _take(handle, path, be_sure):
            handle.close()
            return None
    except OSError:
        handle.close()
        raise
    handle.truncate(0)
    handle.write(name(os.getpid(), os.uname().nodename))
    handle.flush()
    return handle


def why_none(folder: Path) -> str | None:
    """Why no file in a folder can be locked, tried on one without a name; None where they can."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return error.strerror
    return None


def name(pid: int, host: str) -> str:
    """A process as the locks that it holds name it."""
    return f"process {pid} on {host}"


def parse(text: str) -> tuple[int, str] | None:
    """Number and machine of a process that is named so; None where that is no such name."""
    matched = re.fullmatch(r"process (\d+) on (.+)", text)
    return None if matched is None else (int(matched[1]), matched[2])


def holder(path: Path) -> str | None:
    """Name of the process that holds a lock, or held it last: it stays there. None where there is none."""
    return (path.read_text().strip() or None) if path.exists() else None


def _take(handle: IO[str], path: Path, be_sure: str) -> bool:
    for attempt in range(_LOOKS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _HELD:
                if attempt + 1 < _LOOKS:  # it may have been `is_held` looking, for an instant
                    time.sleep(0.01)
                continue
            if error.errno not in NO_LOCKS:  # a disk that fails is no reason to train beside another process
                error.filename = str(path)
                raise
            handle.seek(0)
            # This process's own number: what it wrote itself, or what another wrote that had the number before.
            if _at_work(handle) not in (None, os.getpid()):
                return False
            log.warn_once(f"{path.parent}: no locks here ({error.strerror}): be sure that {be_sure}")
            return True
    return False


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of that file (on this machine; elsewhere as far as the file system tells)."""
    if not path.exists():
        return False
    with path.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _HELD or _at_work(handle) is not None
    return False


def _at_work(lock: IO[str]) -> int | None:
    """Without locks: the number of the process that wrote the file, if it runs here, and did before it wrote (numbers
    are used again)."""
    import psutil

    if (found := parse(lock.read())) is None:
        return None
    pid, host = found
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        is_old = process.create_time() <= os.fstat(lock.fileno()).st_mtime + _SKEW_S
        # One that has ended may be listed for long, where nobody asks how it ended (in containers without an init).
        if host == os.uname().nodename and is_old and process.status() != psutil.STATUS_ZOMBIE:
            return process.pid
    return None
