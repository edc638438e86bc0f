"""Some room on the disk that nobody else can take: a full one must not keep the service from what frees it.

A checkpoint is deleted after its score has been written down, for which a full disk has no room: with many that wait to
be scored nothing would ever move again. Then this file is deleted, and comes back with the first deletion after it.
"""

import contextlib
import errno
import os

from llmtrain import log
from llmtrain.rundir import RunDir

_FIRST_BYTES = 128 << 10
"""For the log, events and the status."""
SCORE_BYTES = 40 << 10
"""What a score takes: the losses by stretch (16 bytes for each of 2,048), and a line in the ledger."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Reserve:
    """RUN/service/reserve."""

    def __init__(self, run: RunDir):
        self._path = run.reserve

    def fill(self, keep_best: int) -> None:
        """Make it, where there is room. So large that as many scores fit in as are needed before any of those that
        wait can be deleted: the best ones stay."""
        size = _FIRST_BYTES + SCORE_BYTES * (keep_best + 2)
        try:
            if self._path.exists() and self._path.stat().st_size >= size:
                return
            self._path.write_bytes(os.urandom(size))  # zeros take no room where the file system compresses
        except OSError:
            self.release()

    def release(self) -> bool:
        """Delete it; False where there was none."""
        with contextlib.suppress(OSError):
            self._path.unlink()
            return True
        return False

    def give_way(self) -> None:
        """The disk is full: `release` it, and say so."""
        if self.release():
            log.warning("service    the disk is full: its reserve is given up, for what has to be written to delete")
