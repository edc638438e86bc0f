"""The way back into the queue: a controller that is silent, starts that end in vain, and the service job's patience."""

import errno
import json
import os
import signal
import subprocess
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launcher.jobs import JobDir
from launcher.keeper.meeting import Meeting
from launcher.keeper.rules import Rules
from launcher.slurm import client, job, node, requeueing
from launcher.slurm.client import Queued
from llmtrain import locks
from llmtrain.errors import EXIT_REQUEUE, SlurmError
from llmtrain.rundir import RunDir
from tests.support.runs import make_workplace
from tests.support.slurm_cluster import Cluster

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SILENT = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.sigtimedwait(SIGNALS, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)


class Controller:
    """A scontrol that fails so many times, and then says that the job is running."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder / "bin"
        self.folder.mkdir()
        monkeypatch.setenv("PATH", f"{self.folder}:/usr/bin:/bin")

    def fails(self, times: int, state: str = "RUNNING") -> None:
        path = self.folder / "scontrol"
        path.write_text(
            f"#!/bin/sh\necho $@ >> {self.folder}/calls\n"
            f'[ $(wc -l < {self.folder}/calls) -gt {times} ] || {{ echo "{SILENT}" >&2; exit 1; }}\n'
            f'case "$*" in *show*) echo JobId=7 JobState={state} Reason=None;; esac\n'
        )
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_signals: None) -> Controller:
    monkeypatch.setattr(requeueing, "_ASK_EVERY_S", 0.05)
    return Controller(tmp_path, monkeypatch)


SHOW, REQUEUE = "--oneliner show job 7", "requeue 7"


def test_a_controller_that_is_silent_is_asked_again(controller: Controller, capfd: pytest.CaptureFixture[str]):
    controller.fails(4)
    requeueing.come_back("7", requeueing.requeue_with_scontrol)
    assert controller.calls == [*[SHOW] * 5, REQUEUE]
    said = capfd.readouterr().err
    assert said.count("Unable to contact slurm controller") == 1
    assert "job 7 is queued again, and goes on from the newest checkpoint" in said


def test_what_fails_once_may_have_been_accepted(controller: Controller, capfd: pytest.CaptureFixture[str]):
    controller.fails(0)
    asked: list[str] = []

    def requeue(job_id: str) -> None:
        asked.append(job_id)
        controller.fails(0, state="PENDING")
        raise SlurmError("Socket timed out on send/recv operation")

    requeueing.come_back("7", requeue)
    assert (asked, controller.calls) == (["7"], [SHOW, SHOW])
    assert "job 7 is PENDING: nothing to ask for" in capfd.readouterr().err


def test_not_for_ever(controller: Controller, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requeueing, "_ASK_FOR_S", 0.5)
    controller.fails(1000)
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        requeueing.come_back("7", requeueing.requeue_with_scontrol)
    assert len(controller.calls) > 3


def test_told_to_end_it_asks_once_more_and_leaves(controller: Controller, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requeueing, "_ASK_EVERY_S", 600.0)
    controller.fails(1000)
    subprocess.Popen(["sh", "-c", f"sleep 1; kill {os.getpid()}"])
    with pytest.raises(SlurmError):
        requeueing.come_back("7", requeueing.requeue_with_scontrol)
    assert len(controller.calls) == 3


@pytest.mark.soak
@pytest.mark.usefixtures("own_signals")
def test_a_real_controller_that_stops_for_a_while(cluster: Cluster):
    number = cluster.submit("sleep 300")
    cluster.wait_for(number, "RUNNING")
    real = cluster.daemons[1]
    real.send_signal(signal.SIGSTOP)
    timer = threading.Timer(40, real.send_signal, [signal.SIGCONT])
    timer.start()
    try:
        requeueing.come_back(number, requeueing.requeue_with_scontrol)
    finally:
        real.send_signal(signal.SIGCONT)
        timer.cancel()
    assert cluster.describe(number)["Restarts"] == "1"


@pytest.mark.usefixtures("own_signals")
def test_a_real_job_keeps_off_a_node_whose_gpu_has_failed(cluster: Cluster):
    number = cluster.submit("sleep 300")
    cluster.wait_for(number, "RUNNING")
    bad = cluster.describe(number)["NodeList"]
    requeueing.come_back(number, requeueing.requeue_with_scontrol)
    requeueing.avoid([bad], number)
    assert cluster.describe(number)["ExcNodeList"] == bad
    cluster.wait_for_restart(number)
    assert cluster.describe(number)["NodeList"] != bad


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_without_submitits_handler_it_comes_back_too(handler: signal.Handlers, monkeypatch: pytest.MonkeyPatch):
    """SUBMITIT_PREEMPT_SIGNAL in a user's shell has submitit listen to another signal."""
    asked: list[str] = []
    monkeypatch.setattr(requeueing, "requeue_with_scontrol", asked.append)

    def keep_going(*arguments: object) -> int:
        requeue = next(each for each in arguments if isinstance(each, types.FunctionType))
        requeue("7")
        return EXIT_REQUEUE

    monkeypatch.setattr(node, "keep_going", keep_going)
    signal.signal(signal.SIGUSR2, handler)
    with pytest.raises(SystemExit) as left:
        job.TrainJob([], 1, None, Rules(may_requeue=True))()
    assert (left.value.code, asked) == (EXIT_REQUEUE, ["7"])


# Starts in vain


class Start:
    """What one start of a job comes to, in place of a supervisor."""

    def __init__(self, by: str | None, saves: int = 0, met_limit: bool = False, lost_gpus_on: Sequence[str] = ()):
        self.stopper = types.SimpleNamespace(reason=by, met_limit=met_limit)
        self.saves, self.lost_gpus_on = saves, lost_gpus_on


PREEMPTED, LIMITED = Start("SIGTERM"), Start("time limit", met_limit=True)
LOST = Start(None, lost_gpus_on=["n1"])


@pytest.fixture
def sinces() -> list[float | None]:
    """What each start was told of the first one."""
    return []


@pytest.fixture
def starts(
    tmp_path: Path, controller: Controller, sinces: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[Start]], int]:
    """Starts a job again and again, as SLURM does; returns the last exit code."""
    monkeypatch.setattr(node.time, "time", lambda: 1000.0 + len(sinces))
    workplace = make_workplace(tmp_path)
    run = RunDir(workplace.run_folder("again"))
    run.create()
    controller.fails(0)
    words = [str(workplace.config), "run.name=again", f"run.dir={run.path.parent}"]

    def start_all(planned: list[Start]) -> int:
        code = EXIT_REQUEUE
        for restart, each in enumerate(planned):
            assert code == EXIT_REQUEUE, f"start {restart} did not come back"

            def supervise(since: float | None, now: Start = each) -> int:
                sinces.append(since)
                if now.saves:
                    run.checkpoint(now.saves).mkdir(parents=True)
                return EXIT_REQUEUE

            own = types.SimpleNamespace(stopper=each.stopper, lost_gpus_on=each.lost_gpus_on, supervise=supervise)
            monkeypatch.setattr(node, "Supervisor", lambda *_, own=own: own)
            variables = {
                "SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_END_TIME": "1",
                "SLURM_RESTART_COUNT": str(restart),
            }  # fmt: skip
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            rules = Rules(max_restarts=2, may_requeue=True)
            code = node.keep_going(words, 1, "cpu", rules, requeueing.requeue_with_scontrol)
        return code

    return start_all


def test_time_limits_without_a_new_checkpoint_are_counted(
    starts: Callable[[list[Start]], int], capfd: pytest.CaptureFixture[str]
):
    """A start-up that takes longer than the job may: it would burn the allocation for ever."""
    assert starts([LIMITED] * 4) == 1
    assert "ended 3 times in a row without a new checkpoint: not started again" in capfd.readouterr().err


def test_gpus_that_are_lost_are_counted_too(starts: Callable[[list[Start]], int], controller: Controller):
    assert starts([LOST] * 4) == 1
    assert [call for call in controller.calls if call.startswith("update")] == ["update JobId=7 ExcNodeList=n1"] * 3


def test_time_limits_with_one_are_not(starts: Callable[[list[Start]], int]):
    saving = [Start("time limit", saves, met_limit=True) for saves in (10, 20)]
    planned = [LIMITED, LIMITED, saving[0], LIMITED, LIMITED, saving[1], LIMITED, LIMITED]
    assert starts(planned) == EXIT_REQUEUE


def test_each_start_knows_when_the_first_one_was(starts: Callable[[list[Start]], int], sinces: list[float | None]):
    """What was trained before that is another order's, which run.resume=never leaves alone."""
    assert starts([PREEMPTED, LIMITED, Start("SIGTERM", saves=10), PREEMPTED]) == EXIT_REQUEUE
    assert sinces == [None, 1000.0, 1000.0, 1000.0]
    assert starts([PREEMPTED, PREEMPTED]) == EXIT_REQUEUE  # submitted anew, to a controller that counts anew
    assert sinces[4:] == [None, 1004.0]


def test_preemption_is_not_counted(starts: Callable[[list[Start]], int]):
    assert starts([PREEMPTED] * 6) == EXIT_REQUEUE


def test_a_note_that_cannot_be_written_keeps_no_job_from_its_return(
    starts: Callable[[list[Start]], int], controller: Controller, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    """A disk that is full: the run itself is saved."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node.files, "write_atomic", full)
    monkeypatch.setattr(node.Meeting, "tell", lambda *_: None)  # it tries for some seconds
    monkeypatch.setattr(node.Meeting, "wait_for_first", lambda *_: 0.0)
    assert starts([PREEMPTED]) == EXIT_REQUEUE
    assert controller.calls[-1] == REQUEUE
    assert "progress.json cannot be written ([Errno 28] No space left on device)" in capfd.readouterr().err


@pytest.mark.parametrize(("at", "restart", "is_left"), [(499, 0, False), (500, 0, True), (499, 1, True)])
def test_a_stop_of_before_the_job_was_submitted_is_not_meant_for_it(
    tmp_path: Path, controller: Controller, at: int, restart: int, is_left: bool
):
    """sbatch, unlike `llmtrain submit`, does not take the file away."""
    (controller.folder / "scontrol").write_text("#!/bin/sh\necho JobId=7 JobState=RUNNING SubmitTime=500\n")
    (controller.folder / "scontrol").chmod(0o755)
    run = RunDir(tmp_path / "runs" / "gpt")
    jobs = JobDir.of(run)
    jobs.path.mkdir(parents=True)
    jobs.stop.touch()
    os.utime(jobs.stop, (at, at))
    node._begin(jobs, run, node.Node("7", 0, 1, restart), Meeting(None), 3)
    assert jobs.stop.exists() == is_left


def test_what_llmtrain_stop_has_ended_does_not_come_back(
    tmp_path: Path, starts: Callable[[list[Start]], int], controller: Controller
):
    """Its file and SLURM's signal may come together, and the signal is seen first."""
    stop = JobDir.of(RunDir(tmp_path / "runs/again")).stop
    stop.parent.mkdir(parents=True)
    stop.touch()
    assert starts([PREEMPTED]) == EXIT_REQUEUE
    assert REQUEUE not in controller.calls
    assert starts([LIMITED]) == EXIT_REQUEUE  # as `llmtrain status` says it, too
    assert json.loads(JobDir.of(RunDir(tmp_path / "runs/again")).progress.read_text())["asked"]
    stop.unlink()
    assert starts([PREEMPTED]) == EXIT_REQUEUE
    assert REQUEUE in controller.calls


@pytest.mark.parametrize(("number", "again", "code"), [(0, False, EXIT_REQUEUE), (1, True, 0)])
def test_with_no_requeue_nobody_asks_and_of_several_nodes_the_first_alone(
    tmp_path: Path, controller: Controller, monkeypatch: pytest.MonkeyPatch, number: int, again: bool, code: int
):
    """The others end well: some clusters end a job with a task that ends badly."""
    controller.fails(0)
    workplace = make_workplace(tmp_path)
    JobDir.of(RunDir(tmp_path / "runs/run")).path.mkdir(parents=True)
    stopper = types.SimpleNamespace(reason="SIGTERM", met_limit=False)
    own = types.SimpleNamespace(stopper=stopper, lost_gpus_on=[], supervise=lambda _: EXIT_REQUEUE)
    monkeypatch.setattr(node, "Supervisor", lambda *_: own)
    monkeypatch.setattr(node, "_begin", lambda *_: 0.0)
    variables = {"JOB_ID": "7", "NODEID": str(number), "JOB_NUM_NODES": "2", "JOB_END_TIME": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    words = [str(workplace.config), f"run.dir={tmp_path}/runs"]
    assert node.keep_going(words, 1, "cpu", Rules(may_requeue=again), requeueing.requeue_with_scontrol) == code
    assert REQUEUE not in controller.calls


# The service in a job of its own


class Days:
    """A clock that waits for nobody, and what happens when it has come so far."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: dict[float, Callable[[], object]] = {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at in [at for at in self.events if at <= self.now]:
            self.events.pop(at)()


def test_the_service_job_waits_with_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Preempted for an hour, in which SLURM is silent once; then it trains for ten minutes."""
    run, days = RunDir(tmp_path / "run"), Days()
    run.create()
    run.config.touch()
    told, served_at = [Queued("7", "PENDING")], list[float]()
    silent = [False, False, True]

    def queue(_: list[str]) -> dict[str, Queued]:
        if silent and silent.pop(0):
            raise SlurmError(SILENT)
        return {"7": told[0]}

    def run_service(command: list[str], check: bool) -> "subprocess.CompletedProcess[str]":
        if "llmtrain.service" in command:
            served_at.append(days.now)
        while run.is_training():
            days.sleep(1.0)
        return subprocess.CompletedProcess(command, 0)

    def train() -> None:
        told[0] = Queued("7", "RUNNING")
        lock = locks.hold(run.path / "lock", "no other process trains in it")
        assert lock is not None
        days.events[days.now + 600] = lambda: (lock.close(), told.__setitem__(0, Queued("7", "COMPLETED")))

    days.events[3600.0] = train
    monkeypatch.setattr(job, "time", days)
    monkeypatch.setattr(client, "queue", queue)
    monkeypatch.setattr(job, "subprocess", types.SimpleNamespace(run=run_service))
    job.ServiceJob(run.path, "7")()
    waiting = [at for at in served_at if at < 3600]
    assert len(waiting) < 30, waiting
    assert waiting[1] <= 2, "the first pauses are short"
    assert 3600 <= served_at[len(waiting)] <= 3604, "it is there when training begins"
    assert len(served_at) <= len(waiting) + 3
    assert days.now < 4300
