"""What the ranks of a node leave when they end, their exit codes, and what those come to."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import EXIT_REQUEUE, disk_errors, is_for_a_person

_ROOM = 1 << 16
"""Bytes that have to be free: a rank leaves its exit code, a sign of life, and at a hang some pages of stacks."""


@dataclass(frozen=True)
class Left:
    """What a rank left when it ended."""

    code: int
    why: str = ""
    """Where it ended in an exception."""
    time: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.code in (0, EXIT_REQUEUE)


@contextlib.contextmanager
def folders_of_ranks(beside: Path) -> Iterator[tuple[Path, Path]]:
    """Where the ranks of this node leave their exit codes and their signs of life, until they have ended.

    In the folder for temporary files; below `beside` where that one is full.
    """
    try:
        scratch = _scratch(None)
    except OSError:
        with disk_errors("exit codes of ranks", beside):
            beside.mkdir(parents=True, exist_ok=True)
            scratch = _scratch(beside)
    with scratch as folder:
        yield Path(folder) / "codes", Path(folder) / "beats"


def _scratch(where: Path | None) -> "tempfile.TemporaryDirectory[str]":
    scratch = tempfile.TemporaryDirectory(prefix="llmtrain-", dir=where, ignore_cleanup_errors=True)
    try:
        for name in ("codes", "beats"):
            (Path(scratch.name) / name).mkdir()
        room = Path(scratch.name) / "room"
        room.write_bytes(bytes(_ROOM))
        room.unlink()
    except OSError:
        scratch.cleanup()
        raise
    return scratch


def keep_from_cleaners(codes: Path, beats: Path) -> None:
    """Touch what is not written to while ranks live: from /tmp many machines delete what is ten days old."""
    for path in (codes, *beats.glob("stacks-*")):
        with contextlib.suppress(OSError):
            os.utime(path)


def read_codes(folder: Path) -> dict[int, Left]:
    """What the ranks left, by process id; one that was killed left nothing."""
    left: dict[int, Left] = {}
    with contextlib.suppress(FileNotFoundError):  # a cleaner of /tmp was here, while this machine slept
        for file in folder.iterdir():
            number, _, code = file.name.partition(".")
            why = file.read_text().strip().partition("\n")[0]
            left[int(number)] = Left(int(code), why, file.stat().st_mtime)
    return left


def verdict(agents: list[int], codes: list[int], ranks: int) -> int:
    """What a start came to, from the exit codes of torchrun's agents, one a node, and of all ranks."""
    failed = next((code for code in agents if code), 0)
    if not failed:
        return max(codes, default=0)  # ranks that were asked to stop leave 75, and end well for torchrun
    for code in codes:
        if is_for_a_person(code):
            return code
    if len(codes) == ranks and all(code in (0, EXIT_REQUEUE) for code in codes):
        return max(codes)
    return failed


def name_code(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"{signal.Signals(-code).name}"
