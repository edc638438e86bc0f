"""A GPU that training has left is for scoring until training takes it again; a child moves with that."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pynvml
import pytest

from llmtrain import cpu, gpus, ledger, log, origin, scoring_place
from llmtrain.rundir import RunDir
from llmtrain.service import scoring
from llmtrain.service.__main__ import work
from llmtrain.service.children import Pause
from llmtrain.service.queue import Work
from llmtrain.service.scoring import Presence, Scoring
from llmtrain.service.worker import ServiceOptions
from tests.support.checkpoint_runs import config_of, make_run, save, train


class Endless:
    """A scoring process that goes on for ever."""

    started: list[list[str]]
    exit_code = None

    def __init__(self, module: str, arguments: list[str], *_: Any):
        self.started.append(arguments)
        self.ended = False

    def lines(self) -> list[dict[str, Any]]:
        return []

    def end(self) -> None:
        self.ended = True

    def stalled_s(self) -> float:
        return 0.0


def device_of(arguments: list[str]) -> str:
    return arguments[arguments.index("--device") + 1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each child; the machine has two GPUs."""
    Endless.started = []
    monkeypatch.setattr(scoring, "Child", Endless)
    monkeypatch.setattr(scoring_place, "num_gpus", lambda: 2)
    return Endless.started


def advance(lane: Scoring, run: RunDir, presence: Presence, *steps: int) -> None:
    config = config_of(run)
    where = scoring_place.find(run, config, presence.look(), lane.device)
    lane.advance(config, Work(to_score=list(steps or [7])), where)


def note_gpus(run: RunDir, used: int) -> None:
    """That training started with so many GPUs."""
    origin.note(run, "cuda", max(1, used), max(1, used))
    run.origin.write_text(json.dumps(json.loads(run.origin.read_text()) | {"gpus_used": used}))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the service's clock forward."""
    clock = SimpleNamespace(time=time.time)
    monkeypatch.setattr(scoring, "time", clock)
    return lambda seconds: monkeypatch.setattr(clock, "time", lambda: time.time() + seconds)


@pytest.mark.parametrize(
    ("gpus", "used", "trains", "expected"),
    [
        (8, 7, True, "cuda:7"),  # one is left over
        (8, 8, True, "cpu"),  # all of them train: one more model would not fit beside another
        (8, 8, False, "cuda:0"),
        (0, 0, False, "cpu"),
    ],
)
def test_scoring_takes_a_gpu_that_training_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, used: int, trains: bool, expected: str
):
    run = make_run(tmp_path / "run")
    note_gpus(run, used)
    monkeypatch.setattr(scoring_place, "num_gpus", lambda: gpus)
    assert scoring_place.find(run, config_of(run), trains) == expected


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        ({"machine": "another"}, "cuda:0"),  # training's GPUs are not here
        ({"machine": "another", "num_machines": 2}, "cpu"),  # this may be the second one
        ({}, "cpu"),
        ({"machine": ""}, "cpu"),  # a run that is older than this
    ],
)
def test_gpus_of_another_machine_are_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: dict[str, Any], expected: str
):
    run = make_run(tmp_path / "run")
    origin.note(run, "cuda", 2, 2)
    run.origin.write_text(json.dumps(json.loads(run.origin.read_text()) | noted))
    monkeypatch.setattr(scoring_place, "num_gpus", lambda: 1)
    assert scoring_place.find(run, config_of(run), trains=True) == expected


@pytest.mark.parametrize(
    ("in_use", "own", "expected"),
    [
        ([70e9, 20e9, 3e6], "", "cuda:2"),  # training's own, somebody else's, nobody's
        ([70e9, 20e9, 3e6], "cuda:1", "cuda:1"),  # that is its own process
        ([70e9, 20e9, 20e9], "", "cpu"),
        ([70e9, None, 3e6], "", "cuda:1"),  # the driver does not tell
    ],
)
def test_a_gpu_that_somebody_else_uses_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_use: list[float | None], own: str, expected: str
):
    run = make_run(tmp_path / "run")
    origin.note(run, "cuda", 1, 1)
    monkeypatch.setattr(scoring_place, "num_gpus", lambda: 3)
    monkeypatch.setattr(scoring_place, "memory_used", in_use.__getitem__)
    assert scoring_place.find(run, config_of(run), trains=True, own=own) == expected


def test_a_child_stays_on_its_gpu_and_leaves_the_cpu_for_one_that_becomes_free(
    tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
):
    run = make_run(tmp_path / "run")
    note_gpus(run, 0)
    lane, presence = Scoring(run, lock=0), Presence(run)
    with run.lock():
        for in_use in ([9e9, 9e9], [9e9, 0.0], [9e9, 9e9], [0.0, 9e9]):
            monkeypatch.setattr(scoring_place, "memory_used", in_use.__getitem__)
            for _ in range(3):
                advance(lane, run, presence)
    assert [device_of(arguments) for arguments in started] == ["cpu", "cuda:1"]


@pytest.mark.parametrize(("visible", "asked"), [(None, "gpu 1"), ("3,2", "gpu 2"), ("0,GPU-b", "gpu 1"), ("0", None)])
@pytest.mark.parametrize("is_old", [False, True])
def test_memory_in_use_is_that_of_the_gpu_as_cuda_counts(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: str | None, is_old: bool
):
    def info(handle: str, version: int | None = None) -> SimpleNamespace:
        if is_old and version is not None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        found.append(handle)
        return SimpleNamespace(used=5)

    found: list[str] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", "gpu {}".format)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-{'abcd'[int(handle[-1])]}123")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", info)
    assert gpus.memory_used(1) == (None if asked is None else 5)
    assert found == ([] if asked is None else [asked])


def test_a_container_with_a_name_of_its_own_is_still_the_same_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("1f0c\n")
    monkeypatch.setattr(origin, "_BOOT_ID", boot_id)
    run = make_run(tmp_path / "run")
    origin.note(run, "cuda", 2, 2)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename="container"))
    assert origin.gpus_used_here(run) == 2
    boot_id.unlink()  # not Linux
    assert origin.machine() == "container"
    assert origin.gpus_used_here(run) == 0


@pytest.mark.parametrize(
    ("gpus", "score", "devices"),
    [
        (1, "auto", ["cuda:0", "cuda:1"]),
        (2, "auto", ["cuda:0", "cpu"]),
        (2, "cuda:1", ["cuda:1"]),  # it was asked for
        (2, "cpu", ["cpu"]),
    ],
)
def test_a_gpu_is_given_back_when_training_starts_again(
    tmp_path: Path, started: list[list[str]], gpus: int, score: str, devices: list[str]
):
    run = make_run(tmp_path / "run", f"service.score={score}")
    origin.note(run, "cuda", gpus, gpus)
    lane, presence = Scoring(run, lock=0), Presence(run)
    advance(lane, run, presence)
    with run.lock():
        for _ in range(3):
            advance(lane, run, presence)
        assert lane.doing == "scoring step 7"
        assert not lane.has_given_up
        assert lane.last_error is None
    assert [device_of(arguments) for arguments in started] == devices
    assert all(arguments[-1] == "7" for arguments in started if device_of(arguments) != "cpu")


def test_a_gpu_that_training_does_not_use_is_kept(
    tmp_path: Path, started: list[list[str]], later: Callable[[float], None]
):
    run = make_run(tmp_path / "run")
    origin.note(run, "cuda", 1, 1)
    lane, presence = Scoring(run, lock=0), Presence(run)
    with run.lock():
        advance(lane, run, presence)
    later(100)
    advance(lane, run, presence)  # without training it would be the first one's turn
    with run.lock():
        advance(lane, run, presence)
        note_gpus(run, 0)  # fewer than before: the first would be free as well
        advance(lane, run, presence)
    assert [device_of(arguments) for arguments in started] == ["cuda:1"]


@pytest.mark.parametrize("finishes", [False, True])
def test_training_that_has_gone_may_come_back_for_a_minute(
    tmp_path: Path, started: list[list[str]], later: Callable[[float], None], finishes: bool
):
    """Between a crash and the restart all GPUs look free. A child on the CPU makes way for one on a GPU."""
    run = make_run(tmp_path / "run")
    origin.note(run, "cuda", 2, 2)
    lane, presence = Scoring(run, lock=0), Presence(run)
    with run.lock():
        advance(lane, run, presence)
    if finishes:
        origin.note_finished(run)
    for seconds in (1, 50, 70):
        later(seconds)
        for _ in range(2):
            advance(lane, run, presence)
        expected = ["cpu", "cuda:0"] if finishes or seconds > 60 else ["cpu"]
        assert [device_of(arguments) for arguments in started] == expected
    assert lane.last_error is None


def test_a_service_that_starts_after_a_crash_waits_too(
    tmp_path: Path, started: list[list[str]], later: Callable[[float], None]
):
    run = make_run(tmp_path / "run")
    origin.note(run, "cuda", 2, 2)
    train(run, 10)  # it has just written
    advance(Scoring(run, lock=0), run, Presence(run))
    later(100)
    advance(Scoring(run, lock=0), run, Presence(run))
    assert [device_of(arguments) for arguments in started] == ["cpu", "cuda:0"]


@pytest.mark.parametrize(
    ("trained_on", "where", "asked"),
    [("cuda", "cpu", ["7"]), ("cuda", "cuda:0", ["7", "8"]), ("cpu", "cpu", ["7", "8"])],
)
def test_a_child_that_may_have_to_move_is_given_one_step(
    tmp_path: Path, started: list[list[str]], trained_on: Literal["cuda", "cpu"], where: str, asked: list[str]
):
    """What it has not finished is lost then; elsewhere one process scores all that waits."""
    run = make_run(tmp_path / "run")
    origin.note(run, trained_on, 1, 1)
    Scoring(run, lock=0).advance(config_of(run), Work(to_score=[7, 8]), where)
    words = started[0][started[0].index("--steps") + 1 :]
    assert (words[: words.index("--threads")] if "--threads" in words else words) == asked


@pytest.mark.parametrize(
    ("trained_on", "trains", "threads"), [("cpu", True, "4"), ("cpu", False, "8"), ("cuda", True, "8")]
)
def test_a_child_on_the_cpu_leaves_half_of_the_cores_to_training_there(
    tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch,
    trained_on: Literal["cuda", "cpu"], trains: bool, threads: str,
):  # fmt: skip
    monkeypatch.setattr(cpu, "usable_cores", lambda: 8)
    run = make_run(tmp_path / "run")
    origin.note(run, trained_on, 1, 1)
    with run.lock() if trains else contextlib.nullcontext():
        Scoring(run, lock=0).advance(config_of(run), Work(to_score=[7]), "cpu")
    assert started[0][started[0].index("--threads") + 1] == threads


class Failing(Endless):
    exit_code = 2

    def close(self) -> None:
        pass


def test_a_step_that_cannot_be_scored_keeps_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Failing.started = []
    monkeypatch.setattr(scoring, "Child", Failing)
    monkeypatch.setattr(log, "warning", lambda _: None)
    run = make_run(tmp_path / "run")
    origin.note(run, "cpu", 1, 1)
    lane = Scoring(run, lock=0)
    lane.pause = Pause(first_s=0.0)
    for _ in range(5):  # each child is started, and then has failed at its first step
        lane.advance(config_of(run), Work(to_score=[10, 20]), "cuda:0")
    order = [arguments[arguments.index("--steps") + 1 :] for arguments in Failing.started]
    assert order == [["10", "20"], ["20", "10"], ["10", "20"]]


class Hanging(Endless):
    stalled = 0.0

    def stalled_s(self) -> float:
        return self.stalled


def test_a_scoring_process_that_hangs_is_ended_and_told(
    tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scoring, "Child", Hanging)
    run = make_run(tmp_path / "run")
    origin.note(run, "cpu", 1, 1)
    lane = Scoring(run, lock=0)
    lane.pause = Pause(first_s=0.0)

    def turn() -> None:
        lane.advance(config_of(run), Work(to_score=[10, 20]), "cpu")

    turn()
    monkeypatch.setattr(Hanging, "stalled", scoring._STALLED_S - 1)  # slow, on a busy machine
    turn()
    child = lane._child
    assert (lane.pause.failures, ledger.events(run)) == (0, [])
    monkeypatch.setattr(Hanging, "stalled", scoring._STALLED_S + 1)
    turn()
    assert isinstance(child, Hanging)
    assert (child.ended, lane.doing, lane.pause.failures) == (True, None, 1)
    (event,) = ledger.events(run)
    assert (event.kind, event.step, event.message) == ("stalled", 10, lane.last_error)
    assert "scoring step 10 made no progress for 1801 s, ended; next try in" in event.message
    turn()
    assert [arguments[arguments.index("--steps") + 1] for arguments in started] == ["10", "20"]  # first the other one


def test_a_service_that_has_given_up_scoring_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Failing.started = []
    monkeypatch.setattr(scoring, "Child", Failing)
    monkeypatch.setattr(scoring, "_GIVE_UP", 1)
    said: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(log, level, said.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    save(run, 10)
    save(run, 20)
    assert work(run, ServiceOptions(drain=True)) == 0
    assert said[-1] == "service    ended; 2 not scored: it failed too often"
