"""The processes of a run on this machine: which they are, and how to end them."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import psutil


def ranks_of(agent: int) -> list[psutil.Process]:
    """torchrun's workers. They are signalled themselves: torchrun would report a failure."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(agent).children()
    return []


def keeper_of(rank: psutil.Process) -> psutil.Process:
    """The topmost of the processes that would start the rank again or report its end: torchrun, `llmtrain run`."""
    found = rank
    for parent in rank.parents():
        if not (is_torchrun(command_of(parent)) or is_launcher(command_of(parent))):
            break
        found = parent
    return found


def is_torchrun(command: Sequence[str]) -> bool:
    return _python_runs(command) in ("torch.distributed.run", "torchrun")


def is_launcher(command: Sequence[str]) -> bool:
    return _python_runs(command) in ("launcher", "llmtrain")


def _python_runs(command: Sequence[str]) -> str:
    """The module or script that a Python was started with; a terminal that was given such words runs none."""
    if not command or not Path(command[0]).name.startswith("python"):
        return ""
    for number, word in enumerate(command[1:], 1):
        if word == "-m":
            # `-m llmtrain` is a rank, the script of that name is the launcher.
            module = "".join(command[number + 1 : number + 2])
            return "rank" if module == "llmtrain" else module
        if not word.startswith("-"):
            return Path(word).name
    return ""


def command_of(process: psutil.Process) -> list[str]:
    """Empty where it has ended, or is another user's."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.cmdline()
    return []


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def ignores(pid: int, number: int) -> bool:
    """Whether a signal would be lost on a process: ranks begin with stops ignored, as torchrun has them."""
    with contextlib.suppress(OSError):  # it is gone, or this is no Linux
        status = Path(f"/proc/{pid}/status").read_text()
        mask = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn:")), 0)
        return bool(mask >> (number - 1) & 1)
    return False


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all that it started but the checkpoint service; first for the one that would start them
    again."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for victim in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "llmtrain.service" not in victim.cmdline():  # it finishes what is queued
                    victim.kill()
