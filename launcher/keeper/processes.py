"""The processes of a run on this machine: which they are, how they ended, how to end them."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmtrain.errors import EXIT_REQUEUE, disk_errors, is_for_a_person

_ROOM = 1 << 16
"""Bytes that have to be free: a rank leaves its exit code, a sign of life, and at a hang some pages of stacks."""


def ranks_of(agent: int) -> list[psutil.Process]:
    """torchrun's workers. They are signalled themselves: torchrun would report a failure."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(agent).children()
    return []


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all that it started but the checkpoint service; first for the one that would start them
    again."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for victim in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "llmtrain.service" not in victim.cmdline():  # it finishes what is queued
                    victim.kill()


def ignores(pid: int, number: int) -> bool:
    """Whether a signal would be lost on a process: ranks begin with stops ignored, as torchrun has them."""
    with contextlib.suppress(OSError):  # it is gone, or this is no Linux
        status = Path(f"/proc/{pid}/status").read_text()
        mask = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn:")), 0)
        return bool(mask >> (number - 1) & 1)
    return False


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


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


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
