"""Named points at which tests end a process as a power cut would: nothing is cleaned up.

LLMTRAIN_CRASH_AT=NAME:FILE in the environment ends the first process that comes to the point NAME; FILE, which is
created, keeps it from happening again after a restart.
"""

import os
import signal
from pathlib import Path
from typing import Literal

Point = Literal[
    "before-score-record",
    "after-bytes",
    "after-commit",
    "after-tag",
    "before-upload-record",
    "between-rename-and-delete",
    "before-untag-record",
    "after-publish",
]


def point(name: Point) -> None:
    """Die here if a test says so."""
    wanted, _, marker = os.environ.get("LLMTRAIN_CRASH_AT", "").partition(":")
    if wanted != name:
        return
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
