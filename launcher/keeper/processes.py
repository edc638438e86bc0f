"""The processes of a run on this machine: which they are, how they ended, how to end them."""

import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmtrain.errors import EXIT_REQUEUE, UserError


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


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def read_codes(folder: Path) -> dict[int, Left]:
    """What the ranks left, by process id; one that was killed left nothing."""
    left: dict[int, Left] = {}
    for file in folder.iterdir():
        code, _, why = file.read_text().partition(" ")
        if code:  # else it is being written
            left[int(file.name)] = Left(int(code), why.strip().partition("\n")[0], file.stat().st_mtime)
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


def is_for_a_person(code: int) -> bool:
    """Whether starting again would meet the same error."""
    return code in {kind.exit_code for kind in UserError.__subclasses__()}


def told(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"{signal.Signals(-code).name}"
