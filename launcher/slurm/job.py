"""What submitit carries to the nodes: small classes that hold words and paths, and know how to requeue themselves."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.keeper.rules import Rules
from launcher.keeper.terminal import say
from launcher.slurm import client, node, requeueing
from llmtrain.errors import EXIT_REQUEUE, SlurmError, exit_with_code
from llmtrain.rundir import RunDir

_LOOK_S = 2.0
_LONGEST_PAUSE_S = 180.0


@dataclass(frozen=True)
class TrainJob:
    """Trains; one on each node."""

    words: list[str]
    """A configuration file, and settings over it."""
    ranks: int
    device: str | None
    rules: Rules

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a job that an earlier version has queued: whether it may requeue stood beside the rules."""
        if "again" in state:
            state["rules"] = replace(state["rules"], may_requeue=state.pop("again"))
        vars(self).update(state)

    def __call__(self) -> None:
        submitits: Any = signal.getsignal(signal.SIGUSR2)  # before the supervisor takes the signals

        def requeue(job_id: str) -> None:
            """submitit's own way: pickles `checkpoint()`, calls scontrol, leaves with SystemExit."""
            if not callable(submitits):  # SUBMITIT_PREEMPT_SIGNAL names another signal; the pickle is as it was
                requeueing.requeue_with_scontrol(job_id)
                return
            try:
                submitits(signal.SIGUSR2, None)
            except SystemExit:
                return
            except subprocess.SubprocessError as error:
                raise SlurmError(str(error)) from error

        with exit_with_code():
            _leave(node.keep_going(self.words, self.ranks, self.device, self.rules, requeue))

    def checkpoint(self) -> Any:
        """The same again: what the run has reached lies in its folder."""
        return _again(self)


@dataclass(frozen=True)
class ServiceJob:
    """The checkpoint service of a run that another job trains."""

    run: Path
    train_job: str

    def __call__(self) -> None:
        run, code = RunDir(self.run), 0
        pause_s, before = _LOOK_S, None
        while True:
            state, over = self._training()
            seen = state, *_traces(run)
            if run.config.exists():
                # Ends when nothing waits and nobody trains: before, between and after training's own starts.
                code = subprocess.run(
                    [sys.executable, "-m", "llmtrain.service", "--run", str(run.path)], check=False
                ).returncode
            if over:
                break
            # Each start reads all checkpoints again, in which there is nothing new while training waits in the queue.
            pause_s = _LOOK_S if seen != before or run.is_training() else min(2 * pause_s, _LONGEST_PAUSE_S)
            before = seen
            _rest(run, pause_s)
        if run.config.exists():
            subprocess.run([sys.executable, "-m", "llmtrain.finish", str(run.path)], check=False)
        _leave(code)

    def _training(self) -> tuple[str, bool]:
        """How its job stands, and whether it is over."""
        try:
            queued = client.queue([self.train_job]).get(self.train_job)
        except SlurmError as error:
            say(f"SLURM does not say how job {self.train_job} stands: {error}")
            return "", False
        return ("", True) if queued is None else (queued.state, queued.is_over)

    def checkpoint(self) -> Any:
        return _again(self)


@dataclass(frozen=True)
class CommandJob:
    """Runs one of llmtrain's own commands that resume what a killed one has begun."""

    words: list[str]

    def __call__(self) -> None:
        _leave(subprocess.run([sys.executable, "-m", "launcher", *self.words], check=False).returncode)

    def checkpoint(self) -> Any:
        return _again(self)


def _traces(run: RunDir) -> tuple[bool, list[int]]:
    """What a service would look at: whether the run is being trained, and its checkpoints."""
    return run.is_training(), run.checkpoint_steps()


def _rest(run: RunDir, seconds: float) -> None:
    """Sleep for so long, or until training begins, ends or saves."""
    before, deadline = _traces(run), time.monotonic() + seconds
    while time.monotonic() < deadline and _traces(run) == before:
        time.sleep(_LOOK_S)


def _again(job: Any) -> Any:
    import submitit

    return submitit.helpers.DelayedSubmission(job)


def _leave(code: int) -> None:
    """End this task. An error is raised, so that submitit writes it down; a job that was requeued leaves no result."""
    if code == 0:
        return
    if code != EXIT_REQUEUE:
        say(f"ended with exit code {code}")
    raise SystemExit(code)
