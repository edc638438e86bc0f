"""Stepping back behind training, where both compute on the same cores."""

import math
import os
import sys
import threading
import time
from pathlib import Path

_AUTOGROUP = Path("/proc/self/autogroup")
_TRIES, _PAUSE_S = 10, 0.1


def niceness(mildest: int, waiting: int) -> int:
    """For work in parallel with training, which has priority: `mildest`, and less the more checkpoints wait."""
    return max(0, mildest - 3 * max(0, waiting - 1))


def step_back(nice: int) -> None:
    """Let others go first: this thread (elsewhere than on Linux this process), and the session that it leads, if any.

    Niceness counts within a session alone where Linux groups processes by session (sched_autogroup_enabled, on in most
    distributions): two sessions share the cores evenly, and a step of training on two cores took 11 s instead of 1.5
    while a checkpoint was scored. So the session is made nice too: by as much (a level is a factor of 1.25), and by
    what evens out that a session's weight is spread over the cores that it uses (sched(7), "The autogroup feature").
    """
    if sys.platform != "linux":
        os.nice(nice)
        return
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(nice, os.getpriority(os.PRIO_PROCESS, thread)))
    if os.getsid(0) == os.getpid() and _AUTOGROUP.exists():
        spread = round(math.log(os.cpu_count() or 1, 1.25)) if nice else 0
        _set_session(min(19, nice + spread))


def _set_session(nice: int) -> None:
    if _AUTOGROUP.read_text().endswith(f" nice {nice}\n"):
        return
    for _ in range(_TRIES):
        try:
            _AUTOGROUP.write_text(str(nice))
            return
        except BlockingIOError:  # the kernel takes one such wish in 0.1 s, from all processes together
            time.sleep(_PAUSE_S)
        except OSError as error:  # a container's /proc
            sys.stderr.write(f"cannot step back behind other sessions: {error}\n")
            return
