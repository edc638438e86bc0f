"""The way back into the queue: asks SLURM to queue this job again, unless it has done so itself or is to end it."""

import shutil
import signal
import time
from collections.abc import Callable

from launcher.keeper.terminal import say
from launcher.slurm import client
from llmtrain.errors import SlurmError

Requeue = Callable[[str], None]
"""Has the job of that number queued again."""
_ASK_EVERY_S = 15.0
_ASK_FOR_S = 900.0
"""A controller that is being restarted, or that another one takes over from."""
_DEATH = (signal.SIGTERM, signal.SIGINT)


def come_back(job_id: str, requeue: Requeue) -> None:
    """Have SLURM queue this job again, unless it has done so, or has been told to end it.

    A controller that does not answer is asked again for a while: the run is saved, and would wait for a person.

    Raises:
        SlurmError: it refuses, or stays silent.
    """
    ignore_signals()  # the wave of them that ends the job must not end the command that queues it again
    signal.pthread_sigmask(signal.SIG_BLOCK, _DEATH)  # what is blocked is kept for `_pause`, though it is ignored
    deadline, pause_s = time.monotonic() + _ASK_FOR_S, 0.0
    while True:
        try:
            if not _is_ours_to_requeue(job_id):
                return
            requeue(job_id)
            break
        except (SlurmError, OSError, RuntimeError) as error:
            if time.monotonic() > deadline or shutil.which("scontrol") is None:
                raise
            if not pause_s:
                say(f"not queued again: {error}; asking for it for {_ASK_FOR_S / 60:.0f} minutes")
            # It may have been accepted all the same, or SLURM was faster: the queue tells, at once.
            requeue = requeue_with_scontrol
            if not _pause(pause_s):
                deadline = 0.0  # once more, and no longer
            pause_s = _ASK_EVERY_S
    say(f"job {job_id} is queued again, and goes on from the newest checkpoint")


def _is_ours_to_requeue(job_id: str) -> bool:
    """Whether SLURM still takes the job for a running one: else it is queued again already, or was cancelled."""
    state = client.describe(job_id).get("JobState", "")
    if state != "RUNNING":
        say(f"job {job_id} is {state}: nothing to ask for")
    return state == "RUNNING"


def _pause(seconds: float) -> bool:
    """False where a signal has come that ends this process soon."""
    return signal.sigtimedwait(_DEATH, seconds) is None


def requeue_with_scontrol(job_id: str) -> None:
    client.call(["scontrol", "requeue", job_id])


def ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def avoid(nodes: list[str], job_id: str) -> None:
    """Keep a job that was just queued again off these nodes: it would find them first, idle as they are now."""
    try:
        excluded = client.describe(job_id).get("ExcNodeList", "(null)")
        listed = ",".join(nodes if excluded == "(null)" else [excluded, *nodes])
        client.call(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={listed}"])
        say(f"it keeps off {', '.join(nodes)}; once the GPU works again: scontrol update JobId={job_id} ExcNodeList=")
    except SlurmError as error:
        say(f"it may start on {', '.join(nodes)} again: {error}")
