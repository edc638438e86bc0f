"""What the nodes of a job say to each other, and what becomes of the others where the first one has gone."""

import concurrent.futures
import contextlib
import errno
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.keeper import meeting
from launcher.keeper.meeting import FirstNodeGone, Meeting
from launcher.keeper.processes import is_alive
from launcher.keeper.rules import Rules
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.torchrun import Start
from launcher.slurm import node, requeueing
from llmtrain import files
from llmtrain.rundir import RunDir
from tests.support.runs import environment, make_workplace


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_SETTLES_S", 0.2)
    monkeypatch.setattr(meeting, "_TRY_EVERY_S", 0.01)


def waits(second: Meeting) -> "concurrent.futures.Future[Any]":
    """In a thread: what never ends is to fail here."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    found = pool.submit(second.wait_for_first, "decision", 0)
    pool.shutdown(wait=False)
    return found


def test_the_others_leave_where_the_first_one_has_gone(tmp_path: Path):
    first, second = Meeting(tmp_path, 0, 2), Meeting(tmp_path, 1, 2)
    waiting = waits(second)
    with pytest.raises(concurrent.futures.TimeoutError):
        waiting.result(timeout=0.5)  # it may take as long as it likes
    first.end()
    with pytest.raises(FirstNodeGone, match="the first node has ended without a word on 'decision'"):
        waiting.result(timeout=10)


def test_what_it_said_before_it_left_counts(tmp_path: Path):
    first = Meeting(tmp_path, 0, 2)
    first.end()
    waiting = waits(Meeting(tmp_path, 1, 2))
    first.tell("decision", 0, {"again": False, "code": 0})  # seen later, over a network
    assert waiting.result(timeout=10) == {"again": False, "code": 0}


def test_ranks_are_not_kept_for_a_first_node_that_has_gone(tmp_path: Path):
    first, second = Meeting(tmp_path, 0, 2), Meeting(tmp_path, 1, 2)
    own = Supervisor(Start([], 1, node=1, num_nodes=2), RunDir(tmp_path), Rules(), second, tmp_path, tmp_path / "stop")
    assert not own._others_failed(0)
    first.end()
    assert own._others_failed(0)
    first.tell("decision", 0, {"again": False, "code": 0})  # it ended well, and these are on their way
    assert not own._others_failed(0)


KEEPS_GOING = """
import sys
from launcher.keeper import meeting, torchrun
from launcher.keeper.rules import Rules
from launcher.slurm import node, requeueing
meeting._BEAT_S, meeting._SILENT_S, meeting._LOOK_S, meeting._SETTLES_S = 0.1, {silent_s}, 0.1, 0.2
torchrun.command = lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"]
sys.exit(node.keep_going({words!r}, 1, "cpu", Rules(hang_s=0, may_requeue=True), requeueing.requeue_with_scontrol))
"""


def test_a_first_node_that_was_killed_ends_the_others(tmp_path: Path):
    """With SIGKILL it can say nothing any more, and SLURM leaves the other nodes' tasks alone."""
    workplace = make_workplace(tmp_path)
    words = [str(workplace.config), f"run.dir={tmp_path / 'runs'}", "run.name=two", "train.global_batch_size=8"]
    started, ranks = list[subprocess.Popen[str]](), list[psutil.Process]()
    for number in (0, 1):
        end = int(time.time()) + 9000
        slurm = {"JOB_ID": "7", "NODEID": str(number), "JOB_NUM_NODES": "2", "JOB_END_TIME": str(end)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", KEEPS_GOING.format(silent_s=3.0, words=words)],
                env={**environment(), **{f"SLURM_{name}": value for name, value in slurm.items()}},
                stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    first, second = started
    try:
        deadline = time.monotonic() + 60
        while not all(psutil.Process(each.pid).children() for each in started):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks = [rank for each in started for rank in psutil.Process(each.pid).children()]
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(5)  # longer than the first one may be silent
        first.kill()
        _, said = second.communicate(timeout=60)
        assert second.returncode == 1, said
        assert "the first node has ended without a word on 'decision'" in said
        assert not is_alive(ranks[1])
    finally:
        for each in [*started, *ranks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def test_a_first_node_that_gives_no_more_signs_is_not_taken_for_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While it asks SLURM to queue the job again, nodes that the batch leaves over wait for it."""
    for name, seconds in (("_SILENT_S", 0.2), ("_LOOK_S", 0.01)):
        monkeypatch.setattr(meeting, name, seconds)
    first, second = Meeting(tmp_path, 0, 2), Meeting(tmp_path, 1, 2)

    def seems_gone() -> bool:
        deadline = time.monotonic() + 1
        while True:
            time.sleep(0.02)
            if (gone := second.first_is_gone()) or time.monotonic() > deadline:
                return gone

    assert not seems_gone()  # it has not come yet
    first.beat()
    assert seems_gone()
    first.beat(last=True)
    assert not seems_gone()


def test_a_word_is_said_again_where_the_file_server_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write, failures = files.write_atomic, [2]

    def fails(path: Path, text: str) -> None:
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        write(path, text)

    monkeypatch.setattr(files, "write_atomic", fails)
    own = Meeting(tmp_path, 0, 2)
    own.tell("decision", 0, 7)
    assert Meeting(tmp_path, 1, 2).wait_for_first("decision", 0) == own.wait_for_first("decision", 0) == 7
    failures[0] = 100
    with pytest.raises(OSError, match="Stale"):
        own.tell("decision", 1, 7)
    for alone in (Meeting(tmp_path), Meeting(None)):  # nobody else waits for its words
        alone.tell("decision", 1, 8)
        assert alone.wait_for_first("decision", 1) == 8


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_of_the_first_node_ends_every_nodes_task(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Else the others would wait until the time limit, and nobody would queue the job again."""
    workplace = make_workplace(tmp_path)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NODEID": str(number), "SLURM_JOB_NUM_NODES": "2"}.items():
        monkeypatch.setenv(name, value)

    def begin(*arguments: object) -> float:
        if number == 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        met = next(each for each in arguments if isinstance(each, Meeting))
        Meeting(met.folder, 0, 2).end()
        return met.wait_for_first("begin", 0)

    monkeypatch.setattr(node, "_begin", begin)
    words = [str(workplace.config), f"run.dir={tmp_path / 'runs'}", "run.name=two", "train.global_batch_size=8"]

    def keep_going() -> int:
        return node.keep_going(words, 1, "cpu", Rules(may_requeue=True), requeueing.requeue_with_scontrol)

    if number == 0:
        with pytest.raises(OSError, match="Stale"):
            keep_going()
        assert list((tmp_path / "runs").rglob("over-0-0.json"))
    else:
        assert keep_going() == 1
        assert "the first node has ended without a word on 'begin': its output says why" in capfd.readouterr().err


def test_a_task_of_an_array_is_known_by_both_of_its_numbers(monkeypatch: pytest.MonkeyPatch):
    """SLURM_JOB_ID is another number then, under which nobody has written the job down."""
    variables = {"JOB_ID": "125", "NODEID": "1", "JOB_NUM_NODES": "2", "RESTART_COUNT": "3"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "STEP_NUM_NODES"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    assert node.this_node() == node.Node("125", 1, 2, 3)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "123")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert node.this_node() == node.Node("123_1", 1, 2, 3)
