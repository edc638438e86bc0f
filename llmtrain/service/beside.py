"""What training does about the service: start it, look after it, wait for it at the end. All on rank 0."""

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

from llmtrain import ledger, log, manifest, retention, rundir
from llmtrain.config import RunConfig
from llmtrain.errors import CheckpointError
from llmtrain.ledger import Event, Status, drain_command
from llmtrain.retention import Held
from llmtrain.rundir import RunDir
from llmtrain.service import plan

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_", "OMP_", "PET_")
"""Variables that tell a process that it is a rank of ours; the service is none."""
_LOOK_S = 0.1
_HUB_S = 20.0
_START_S = 30.0
_SAY_S = 10.0
_HURRY_S = 30.0
"""A save that was forced waits no longer for room: what asks training to stop may kill it soon after."""


class Companion:
    """The service that this training started, or the one that is at work already."""

    def __init__(self, run: RunDir, config: RunConfig):
        self._run, self._config = run, config
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.time()

    def start(self) -> None:
        """Start the service, unless one is at work. It lives on when training ends."""
        with _ends_nothing("starting the checkpoint service"):
            self._start()

    def _start(self) -> None:
        if self._run.is_served():
            return
        self._run.service.mkdir(exist_ok=True)  # not the run's folder, where that has gone meanwhile
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)}
        with self._run.service_log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmtrain.service", "--run", str(self._run.path), "--background"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C is for training alone
            )

    def after_save(self) -> None:
        """Start it again if it has died; without a service, delete what the rule does not keep."""
        if self._config.service.start == "never":
            with _ends_nothing("deleting checkpoints that the rule does not keep"):
                retention.prune(self._run, ledger.heldout_losses(self._run), self._config.checkpoint)
        if self._config.service.start == "auto":
            with _ends_nothing("looking after the checkpoint service"):
                self._start_again()

    def _start_again(self) -> None:
        if self._run.is_served():
            return
        code = None if self._process is None else self._process.poll()
        if self._process is not None and code is None:  # it is starting
            return
        how = "" if code is None else f" (exit code {code})"
        message = f"the checkpoint service had ended{how}; started again"
        self._start()
        log.warning(f"service    {message}; see {self._run.service_log}")
        ledger.append(self._run.events, Event(kind="service-started", message=message))

    def held(self, hurry: bool) -> Held:
        """What the service will delete when it has come that far: a save that finds no room may wait for it.

        `hurry`: training has been told to stop, and may be killed soon.
        """
        is_starting = self._process is not None and self._process.poll() is None
        is_at_work = self._run.is_served() or is_starting
        longest_s = min(_HURRY_S, self._config.service.wait_s) if hurry else self._config.service.wait_s
        why = ""
        with _ends_nothing("looking what waits there"):
            why = on_the_way_out(self._run, self._config)
        if why and not is_at_work and self._config.service.start != "never":
            why += f", and no service is at work on them ({drain_command(self._run.path)})"
        return Held(why, longest_s if is_at_work else 0.0)

    def say_hub(self) -> None:
        """Say whether the Hub takes the checkpoints, loudly if not; training goes on in any case."""
        if (repo := self._config.hub.repo) is None:
            return
        deadline = time.monotonic() + _HUB_S
        while time.monotonic() < deadline:
            state = ledger.hub_state(self._run)
            at_work_before = self._process is None and self._run.is_served()
            if state is not None and state.repo == repo and (at_work_before or state.time >= self._began):
                if state.state == "ok":
                    log.info(f"hub        {state.message}")
                else:
                    log.warning(f"HUB        {state.message}\n{' ' * 20}training goes on; checkpoints wait on disk")
                return
            time.sleep(_LOOK_S)
        log.warning(f"HUB        no answer about {repo} yet; training goes on, checkpoints wait on disk")

    def wait(self) -> None:
        """Until all is scored, uploaded and shown, at most `service.wait_s`. Ctrl-C leaves it at work."""
        deadline = time.monotonic() + self._config.service.wait_s
        started, said, said_at = time.monotonic(), "", 0.0
        since = time.time()
        self.start()
        while time.monotonic() < deadline:
            if not self._run.is_served() and time.monotonic() - started > _START_S:
                why = _last_error(": ", ledger.status(self._run))
                log.warning(f"service    ended with work left{why}; see {self._run.service_log}")
                return
            left = waiting(self._run, self._config, since)
            if left is None:
                return
            if left != said and time.monotonic() - said_at > (_SAY_S if said else 0):
                log.info(f"service    {left}")
                said, said_at = left, time.monotonic()
            time.sleep(_LOOK_S)
        log.info(f"service    goes on by itself; to wait for it: {drain_command(self._run.path)}")


@contextlib.contextmanager
def _ends_nothing(what: str) -> Iterator[None]:
    """Checkpoints are safe whatever becomes of the service: what goes wrong with it is said, and training goes on."""
    try:
        yield
    except OSError as error:
        log.warning(f"service    {what} failed ({type(error).__name__}: {error}); checkpoints wait on disk")


def waiting(run: RunDir, config: RunConfig, since: float) -> str | None:
    """What the service still has to do, for people; None when there is nothing that waiting would bring.

    What it said before `since` does not count: it had not seen the last checkpoint, or was another service.
    """
    status = ledger.status(run)
    if status is not None and status.time < since:
        status = None
    to_score, to_upload = _unscored(run), _unconfirmed(run, config.hub.repo)
    if config.service.score == "training":
        to_score = [step for step in to_score if _was_measured(run, step)]
    if _scores_elsewhere(status, to_score):
        to_score = []
    is_refused = status is not None and status.problem is not None  # nobody waits for what a person has to mend
    if is_refused:
        to_upload = []
    if to_score or to_upload:
        left = f"{len(to_score)} to score, {len(to_upload)} to upload"
    elif config.hub.repo is not None and not is_refused and plan.is_stale(run, config.hub.repo):
        left = "main on the Hub to renew"
    else:
        return None
    doing = f"{', '.join(status.doing)}; " if status is not None and status.doing else ""
    return f"{doing}{left} (Ctrl-C leaves it at work){_last_error('; ', status)}"


def on_the_way_out(run: RunDir, config: RunConfig) -> str:
    """Checkpoints that are on the disk only until the service has done something, for people; empty without any."""
    status = ledger.status(run)
    deleted, held = retention.deletable(run, config, max(run.checkpoint_steps(), default=None))
    reasons = Counter(held.values())
    if status is not None and status.problem is not None:  # nobody waits for what a person has to mend
        reasons[retention.UNCONFIRMED] = 0
    if _scores_elsewhere(status, list(held)) and _has_seen(status, run):
        reasons[retention.UNSCORED] = 0
    going = len(deleted) + len(list(run.checkpoints.glob(f"{rundir.DOOMED}*")))
    counts = {
        "wait to be scored": reasons[retention.UNSCORED],
        "wait to be uploaded": reasons[retention.UNCONFIRMED],
        "are about to be deleted": going,
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"of the checkpoints there {said}{_last_error('; ', status)}" if said else ""


def _last_error(separator: str, status: Status | None) -> str:
    return "" if status is None or not status.last_error else separator + status.last_error


def _unscored(run: RunDir) -> list[int]:
    """Steps whose checkpoint, as it lies there, has no score: the step may have been saved again since."""
    here, scored = manifest.identities(run), ledger.scores(run)
    return [s for s in run.checkpoint_steps() if s not in scored or scored[s].checkpoint != here.get(s)]


def _was_measured(run: RunDir, step: int) -> bool:
    """Whether training left a figure for the service to take over: at a save that a stop forces it does not."""
    with contextlib.suppress(CheckpointError, OSError):  # damaged, or deleted just now
        return manifest.read(run.checkpoint(step)).heldout_loss is not None
    return False


def _unconfirmed(run: RunDir, repo: str | None) -> list[int]:
    """Steps whose checkpoint, as it lies there, was not read back from this repository."""
    if repo is None:
        return []
    here = manifest.identities(run)
    confirmed = {(u.step, u.checkpoint) for u in ledger.uploads(run).values() if u.repo == repo}
    return [step for step in run.checkpoint_steps() if (step, here.get(step)) not in confirmed]


def _scores_elsewhere(status: Status | None, to_score: list[int]) -> bool:
    """The service has looked at these steps and found nothing to score: saves that a stop forced."""
    return status is not None and not status.to_score and not status.doing and bool(to_score)


def _has_seen(status: Status | None, run: RunDir) -> bool:
    """Whether the service has looked since the newest checkpoint is there."""
    newest = run.checkpoint_steps()[-1:]
    return status is not None and all(status.time > run.checkpoint(step).stat().st_mtime for step in newest)
