"""What a supervisor decides: again or not, when to stop, and with which code; its ranks are small scripts here."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.keeper import torchrun
from launcher.keeper.exit_codes import read_codes, verdict
from launcher.keeper.meeting import Meeting
from launcher.keeper.ranks import Ranks
from launcher.keeper.reached import slowest_save
from launcher.keeper.rules import Rules
from launcher.keeper.stopping import Stopper
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.torchrun import Start
from llmtrain import errors, jsonl, ledger, rundir
from llmtrain.rundir import RunDir

CRASH = "import os; os.abort()"
SAVES_AND_STOPS = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda *_: sys.exit(75))
time.sleep(600)
"""


class Attempts:
    """Scripts that take the place of training, one after the other."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.run = folder, RunDir(folder / "run")
        self.started: list[bool] = []
        """For each attempt, whether it is one that never begins anew."""
        self._monkeypatch = monkeypatch
        self.run.create()
        self.run.config.touch()

    def supervise(self, rules: Rules, *scripts: str, since: float | None = None) -> tuple[int, Supervisor]:
        """The last script is started again and again."""

        def command(_: Start, __: object, again: bool, ___: Path) -> list[str]:
            self.started.append(again)
            return [sys.executable, "-c", scripts[min(len(self.started), len(scripts)) - 1]]

        self._monkeypatch.setattr(torchrun, "command", command)
        stop = self.folder / "stop"
        own = Supervisor(Start([], 1), self.run, rules, Meeting(self.folder / "meeting"), self.folder / "logs", stop)
        return own.supervise(since), own

    def beginning(self, kind: str = "started", ago_s: float = 0.0) -> str:
        """What a script says as training does when it begins."""
        event = f"json.dumps(dict(kind={kind!r}, message='', step=0, time=time.time() - {ago_s}))"
        return f"import json, time; open({str(self.run.events)!r}, 'a').write({event} + chr(10)); "

    def saving(self, step: int) -> str:
        """A script that begins, leaves a checkpoint, and crashes."""
        return f"{self.beginning()}import os; os.mkdir({str(self.run.checkpoint(step))!r}); {CRASH}"


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempts]:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    yield Attempts(tmp_path, monkeypatch)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Supervisor, "_rest", lambda *_: None)


@pytest.mark.usefixtures("no_pause")
def test_crashes_count_in_a_row_without_a_new_checkpoint(attempts: Attempts):
    code, _ = attempts.supervise(Rules(max_restarts=1), *map(attempts.saving, (10, 20, 30, 40)), "")
    assert code == 0
    assert attempts.started == [False, True, True, True, True]
    events = [event for event in ledger.events(attempts.run) if event.kind != "started"]
    assert [(event.kind, event.step, event.message) for event in events] == [
        ("restarted", step, "ended with SIGABRT") for step in (10, 20, 30, 40)
    ]


@pytest.mark.usefixtures("no_pause")
def test_without_a_new_checkpoint_it_is_given_up(attempts: Attempts, capfd: pytest.CaptureFixture[str]):
    code, _ = attempts.supervise(Rules(max_restarts=2), attempts.saving(10), CRASH)
    assert (code, len(attempts.started)) == (1, 3)
    why = "ended with SIGABRT, 3 times in a row without a new checkpoint: not started again"
    assert why in capfd.readouterr().err
    last = ledger.events(attempts.run)[-1]
    assert (last.kind, last.message) == ("failed", f"exit code 1: {why}")


@pytest.mark.parametrize("code", [2, 17, 19, 20, 23])
def test_what_a_person_has_to_mend_is_not_repeated(attempts: Attempts, code: int):
    assert attempts.supervise(Rules(), f"import sys; sys.exit({code})")[0] == code
    assert len(attempts.started) == 1


@pytest.mark.usefixtures("no_pause")
def test_a_start_that_has_not_begun_leaves_run_resume_as_it_is(attempts: Attempts):
    """With run.resume=never the old run still lies there: going on would go on with that one."""
    old = ledger.Event(kind="started", message="of the old run", step=0, time=time.time() - 60)
    ledger.append(attempts.run.events, old)
    code, _ = attempts.supervise(Rules(), CRASH, CRASH, attempts.beginning("resumed") + CRASH, "")
    assert (code, attempts.started) == (0, [False, False, False, True])


@pytest.mark.usefixtures("no_pause")
def test_a_clock_that_was_set_back_does_not_hide_that_training_has_begun(attempts: Attempts):
    """With run.resume=never what was reached would be moved aside."""
    ledger.append(attempts.run.events, ledger.Event(kind="started", message="of the old run", step=0))
    assert attempts.supervise(Rules(), attempts.beginning(ago_s=3600) + CRASH, "")[0] == 0
    assert attempts.started == [False, True]


@pytest.mark.usefixtures("no_pause")
def test_a_run_whose_folder_went_away_is_not_begun_anew(attempts: Attempts, capfd: pytest.CaptureFixture[str]):
    """Its mount point stays, and is empty."""
    goes = f"import os; os.rename({str(attempts.run.path)!r}, {str(attempts.folder / 'elsewhere')!r}); "
    code, _ = attempts.supervise(Rules(), attempts.saving(40), goes + CRASH)
    assert (code, len(attempts.started)) == (errors.RunFolderError.exit_code, 2)
    said = capfd.readouterr().err
    assert f"{attempts.run.path}: the checkpoints that were here (step 40) are gone: is the disk mounted?" in said
    assert not attempts.run.path.exists()


@pytest.mark.usefixtures("no_pause")
def test_a_job_that_comes_back_goes_on_where_an_earlier_start_has_begun(attempts: Attempts):
    began = ledger.Event(kind="started", message="from the beginning", step=0, time=1000.0)
    ledger.append(attempts.run.events, began)
    assert attempts.supervise(Rules(), "", since=999.0)[0] == 0
    assert attempts.supervise(Rules(), "", since=1001.0)[0] == 0
    assert attempts.started == [True, False]


@pytest.mark.usefixtures("no_pause")
def test_a_file_server_that_fails_for_a_moment_ends_nothing(attempts: Attempts, monkeypatch: pytest.MonkeyPatch):
    def append(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(ledger, "append", append)
    assert attempts.supervise(Rules(), CRASH, "")[0] == 0


PLACE = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "elsewhere", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip


def test_a_rank_alone_is_told_no_place_among_others(attempts: Attempts, monkeypatch: pytest.MonkeyPatch):
    """enroot's PyTorch hook and Kubernetes set such variables, also for one process."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    assert attempts.supervise(Rules(), f"import os, sys; sys.exit(bool({set(PLACE)!r} & set(os.environ)))")[0] == 0
    assert PLACE.items() <= torchrun.environment(Start([], 2), False, {}).items()


@pytest.mark.usefixtures("no_pause")
def test_ranks_know_that_they_were_started_again(attempts: Attempts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(rundir.RESTARTED, "1")  # of a run around this one
    says = f"import os, sys; was = {rundir.RESTARTED!r} in os.environ; "
    assert attempts.supervise(Rules(), f"{says}sys.exit(2) if was else os.abort()", f"{says}sys.exit(not was)")[0] == 0
    assert len(attempts.started) == 2


def later(seconds: float, act: Callable[[], object]) -> None:
    threading.Timer(seconds, act).start()


def interrupt(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_stop_during_the_pause_between_attempts_leaves_at_once(
    attempts: Attempts, number: int, monkeypatch: pytest.MonkeyPatch
):
    paused = Supervisor._rest

    def rest(own: Supervisor, seconds: float) -> None:
        assert seconds == (2.0 if len(attempts.started) == 2 else 0.0)
        later(0.2, lambda: interrupt(number)) if seconds else None
        paused(own, 600.0 if seconds else 0.0)

    monkeypatch.setattr(Supervisor, "_rest", rest)
    code, own = attempts.supervise(Rules(), CRASH)
    assert (code, own.stopper.reason, len(attempts.started)) == (75, signal.Signals(number).name, 2)


def test_llmtrain_stop_reaches_a_supervisor_that_pauses(attempts: Attempts, monkeypatch: pytest.MonkeyPatch):
    paused = Supervisor._rest
    monkeypatch.setattr(Supervisor, "_rest", lambda own, _: paused(own, 600.0))
    later(1.0, (attempts.folder / "stop").touch)
    code, own = attempts.supervise(Rules(), CRASH)
    assert (code, own.stopper.reason, len(attempts.started)) == (75, "llmtrain stop", 1)


def test_it_stops_before_its_time_is_over(attempts: Attempts):
    code, own = attempts.supervise(Rules(ends_at=time.time() + 6, lead_s=4), SAVES_AND_STOPS)
    assert (code, own.stopper.reason, own.stopper.met_limit) == (75, "time limit", True)


def lead_s(attempts: Attempts, rules: Rules) -> float:
    return Stopper(Start([], 1), attempts.run, rules, attempts.folder / "stop").lead_s()


def test_slow_saves_need_more_time_before_the_end(attempts: Attempts):
    """The last one can be a quick one, of a moment when nothing else wrote."""
    took = [900.0, 1.0, 100.0, 2.0, 3.0, 2.0]
    jsonl.append(attempts.run.saves, [{"step": n, "wrote_s": wrote_s} for n, wrote_s in enumerate(took)])
    assert slowest_save(attempts.run) == 100.0
    assert lead_s(attempts, Rules(ends_at=time.time() + 10_000, lead_s=30)) == 230.0
    assert lead_s(attempts, Rules(ends_at=time.time() + 10_000, lead_s=600)) == 600.0


def test_a_short_job_trains_for_half_of_its_time(attempts: Attempts):
    assert lead_s(attempts, Rules(ends_at=time.time() + 100, lead_s=120)) == pytest.approx(50, abs=1)


def test_ranks_that_do_not_stop_are_killed_before_the_time_limit(attempts: Attempts, capfd: pytest.CaptureFixture[str]):
    """At the limit SLURM would kill the supervisor too, and nobody would queue the job again."""
    ends_at = time.time() + 8
    code, own = attempts.supervise(Rules(ends_at=ends_at, lead_s=6), "import time; time.sleep(20)")
    assert (code, own.stopper.reason, len(attempts.started)) == (75, "time limit", 1)
    assert ends_at - 2.5 < time.time() < ends_at
    said = capfd.readouterr().err
    assert said.count("s before the time limit: killed") == 1
    assert "ended without saving: the same command goes on from step 0" in said


@pytest.mark.parametrize(("left_s", "met"), [(1000, False), (170, True)])
def test_slurm_announces_the_time_limit_with_a_signal(attempts: Attempts, left_s: float, met: bool):
    """Up to a minute early; hours before the limit the same signal may mean preemption."""
    later(0.5, lambda: interrupt(signal.SIGUSR2))
    code, own = attempts.supervise(Rules(ends_at=time.time() + left_s, lead_s=120), SAVES_AND_STOPS)
    assert code == 75
    assert (own.stopper.reason, own.stopper.met_limit) == ("SIGUSR2", met)


def test_ranks_that_do_not_stop_are_killed_in_the_end(attempts: Attempts, capfd: pytest.CaptureFixture[str]):
    later(0.5, lambda: interrupt(signal.SIGTERM))
    code, _ = attempts.supervise(Rules(grace_s=1), "import time; time.sleep(600)")
    assert code == 75
    said = capfd.readouterr().err
    assert "SIGTERM: the run saves and stops" in said
    assert "still there after 1 s: killed" in said
    assert "ended without saving: the same command goes on from step 0" in said


def test_a_save_that_is_known_to_take_long_is_waited_for(attempts: Attempts):
    later(0.5, lambda: interrupt(signal.SIGTERM))
    jsonl.append(attempts.run.saves, [{"step": 1, "wrote_s": 900.0}])
    slow = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(3), sys.exit(75))); time.sleep(600)"
    began = time.monotonic()
    assert attempts.supervise(Rules(grace_s=1), slow)[0] == 75
    assert time.monotonic() - began > 3


def test_a_stop_before_the_ranks_listen_is_not_lost(attempts: Attempts):
    """torchrun and its ranks begin with stops ignored."""
    later(0.3, lambda: interrupt(signal.SIGTERM))
    code, _ = attempts.supervise(Rules(), f"import time; time.sleep(1)\n{SAVES_AND_STOPS}")
    assert (code, len(attempts.started)) == (75, 1)


def test_a_stop_that_ends_what_does_not_listen_is_no_crash(attempts: Attempts, capfd: pytest.CaptureFixture[str]):
    later(0.3, lambda: interrupt(signal.SIGTERM))
    code, _ = attempts.supervise(Rules(), "import signal, time; signal.signal(15, signal.SIG_DFL); time.sleep(600)")
    assert (code, len(attempts.started)) == (75, 1)
    assert "ended without saving" in capfd.readouterr().err


# Ranks

Started = list["subprocess.Popen[bytes]"]


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[tuple[Ranks, Started]]:
    """Started by this process, which is their torchrun here."""
    (tmp_path / "codes").mkdir()
    (tmp_path / "rank-1.log").write_text("ValueError: of an earlier attempt\n")
    found = Ranks(os.getpid(), tmp_path / "codes", tmp_path)
    started = [subprocess.Popen(["sleep", "600"], env={**os.environ, "RANK": str(rank)}) for rank in (0, 1)]
    deadline = time.monotonic() + 10
    while len(found._processes) < 2:  # /proc tells nothing of a process in the instant after it was started
        found.meet()
        assert time.monotonic() < deadline
    yield found, started
    found.kill()
    for process in started:
        process.wait()


def end(ranks: Ranks, process: "subprocess.Popen[bytes]", left: str = "") -> None:
    if left:
        code, _, why = left.partition(" ")
        (ranks.codes / f"{process.pid}.{code}").write_text(why)
    process.kill()
    process.wait()


def test_one_that_was_killed_fell_before_those_that_lost_it(two_ranks: tuple[Ranks, Started]):
    ranks, (first, second) = two_ranks
    assert not ranks.has_fallen()
    end(ranks, first, "1 RuntimeError: Connection closed by peer")
    end(ranks, second)
    assert ranks.has_fallen()
    assert ranks.describe() == "rank 1 was killed, or crashed"
    assert ranks.last_words() == {}


def test_of_two_errors_the_earlier_one_counts(two_ranks: tuple[Ranks, Started]):
    ranks, (first, second) = two_ranks
    end(ranks, second, "1 RuntimeError: a bad row\nin a file")
    end(ranks, first, "1 RuntimeError: Connection closed by peer")
    os.utime(ranks.codes / f"{second.pid}.1", (1, 1))
    with (ranks.logs / "rank-1.log").open("a") as log:
        log.write("Traceback\nRuntimeError: a bad row\n")
    assert ranks.has_fallen()
    assert ranks.describe() == "rank 1 failed: RuntimeError: a bad row"
    assert ranks.last_words() == {ranks.logs / "rank-1.log": ["Traceback", "RuntimeError: a bad row"]}


def test_a_crash_shows_the_stack_of_the_thread_that_crashed(two_ranks: tuple[Ranks, Started]):
    ranks, (_, second) = two_ranks
    end(ranks, second)
    other = "Thread 1 (most recent call first):\n" + "  File x\n" * 30
    own = "Current thread 2 (most recent call first):\n  File bad\n"
    with (ranks.logs / "rank-1.log").open("a") as log:
        log.write(f"Fatal Python error: Segmentation fault\n\n{other}\n{own}\nExtension modules: many\n")
    assert ranks.has_fallen()
    assert ranks.describe() == "rank 1 crashed: Fatal Python error: Segmentation fault"
    (shown,) = ranks.last_words().values()
    assert shown[:3] == ["Fatal Python error: Segmentation fault", *own.splitlines()]


def test_ranks_that_end_well_do_not_fall(two_ranks: tuple[Ranks, Started]):
    ranks, (first, second) = two_ranks
    end(ranks, second, "75 ")
    end(ranks, first, "0 ")
    assert not ranks.has_fallen()


LEAVES = """
import subprocess, sys
from llmtrain.errors import exit_with_code, own_code, SourceError
own_code()
with exit_with_code():
    subprocess.run([sys.executable, "-c", {inner!r}])
    raise {error}
"""


@pytest.mark.parametrize(
    ("error", "code", "why"),
    [
        ("SourceError('gone')", 10, ""),
        ("SystemExit(75)", 75, ""),
        ("ValueError('bad\\nrow')", 1, "ValueError: bad"),
    ],
)
def test_a_rank_leaves_its_code_and_what_it_starts_leaves_none(tmp_path: Path, error: str, code: int, why: str):
    """The checkpoint service and a sharding beside training end with codes of their own."""
    inner = "from llmtrain.errors import exit_with_code, HubError\nwith exit_with_code(): raise HubError('no')"
    environment = {**os.environ, errors.EXIT_CODES: str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    script = LEAVES.format(inner=inner, error=error)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    (left,) = read_codes(tmp_path).values()
    assert (left.code, left.why) == (code, why)


@pytest.mark.parametrize(
    ("agents", "codes", "ranks", "code"),
    [
        ([0, 0], [0, 0], 2, 0),
        ([0, 0], [75, 75], 2, 75),  # asked to stop: torchrun reports a good end
        ([1, 0], [75, 75], 2, 75),  # torchrun was told of the signal too, and calls that a failure
        ([1, 1], [75], 2, 1),  # the other one was killed: it has not saved
        ([-9, 0], [], 2, -9),
        ([1, 1], [1, 19], 2, 19),  # one has no room on its disk, which is for a person; the other only lost it
        ([1, 1], [75, 1], 2, 1),
    ],
)
def test_what_a_start_came_to(agents: list[int], codes: list[int], ranks: int, code: int):
    assert verdict(agents, codes, ranks) == code
