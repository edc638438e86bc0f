"""Who may work in a shard folder: FOLDER.lock, alone or together with others who share."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from launcher.sharding.progress import say
from llmtrain import locks
from llmtrain.errors import UserError


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def may_lock(folder: Path) -> bool:
    """Whether this process may write what `locked` needs: finished shards may lie where nobody may write."""
    path = _lock_file(folder)
    return os.access(path if path.exists() else path.parent, os.W_OK)


@contextlib.contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Keep others out of a folder; with `shared`, only those who do not share. Waits for them, and says so.

    Also between machines, where their file system knows locks; a lock ends with the process that holds it.

    Raises:
        UserError: the file system knows no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _lock_file(folder)
    with path.open("a+") as lock:  # NFS wants a file that may be read for a shared lock, written for the other one
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        if not _lock(lock, kind | fcntl.LOCK_NB, path):
            say(f"waiting for other jobs, which hold {path}")
            _lock(lock, kind, path)
        yield


def _lock(lock: IO[str], how: int, path: Path) -> bool:
    """Whether the lock was had."""
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise
        raise UserError(
            f"{path}: its file system has no locks ({error.strerror}); set data.dir to a folder on one that has "
            "(Lustre has them where it is mounted with -o flock)"
        ) from error
    return True
