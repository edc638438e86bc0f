"""Signs of life, and what is read from them: who hangs, who only waits, who may take its time."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.keeper import hang_watch, hangs
from launcher.keeper.hang_watch import HangWatch
from launcher.keeper.hangs import Seen, culprits
from launcher.keeper.meeting import Meeting
from llmtrain import heartbeat
from llmtrain.heartbeat import Beat

LIMIT_S = 10.0


def seen(rank: int, phase: str = "counts", step: int = 7, stands: bool = True, frozen: bool = False) -> Seen:
    return Seen(rank, phase, step, 12.0, stands or frozen, frozen)


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([], []),
        ([seen(0), seen(1, "data"), seen(2)], [1]),  # it has no data: the others wait for its counts
        ([seen(0, "backward"), seen(1, "forward"), seen(2, "backward")], [1]),
        ([seen(0, "data", step=8), seen(1, "backward"), seen(2, "data", step=8)], [1]),  # a step behind
        ([seen(0, "data"), seen(1, "counts"), seen(2, "counts", frozen=True)], [2]),  # who does not run goes first
        ([seen(0, frozen=True), seen(1, "data"), seen(2, frozen=True)], [0, 2]),
        ([seen(0, "backward"), seen(1, "backward")], [0, 1]),  # tied: a collective that does not end
        ([seen(0, "data", stands=False), seen(1)], []),  # it has begun to read not long ago
        ([seen(0, "evaluate", stands=False), seen(1, "scores"), seen(2, "scores")], []),  # it has more rows
        ([seen(0, "save", step=6, stands=False), seen(1), seen(2)], []),  # the file system may take its time
        ([seen(0, "save", step=6, frozen=True), seen(1), seen(2)], [0]),
        ([seen(0, "preparing", step=0, stands=False), seen(1, "evaluate", step=0)], []),
        ([seen(0, "ending", step=9, stands=False), seen(1, "data", step=8)], [1]),
    ],
)
def test_who_the_others_wait_for(ranks: list[Seen], named: list[int]):
    assert [each.rank for each in culprits(ranks)] == named


def test_what_is_said_of_them():
    stands, frozen = seen(1, "data", step=1234), seen(2, "forward", frozen=True)
    assert stands.describe() == "rank 1 stands still since 12 s, at step 1,234, taking data"
    assert frozen.describe() == "rank 2 does not run at all since 12 s, at step 7, computing"


@pytest.fixture
def process() -> Iterator[psutil.Process]:
    """One that does nothing."""
    with subprocess.Popen(["sleep", "600"]) as sleeping:
        yield psutil.Process(sleeping.pid)
        sleeping.kill()


def write_beat(folder: Path, beat: Beat) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"beat-{beat.rank}").write_text(json.dumps(asdict(beat)).ljust(512))


def beat_of(
    process: psutil.Process, phase: str = "counts", since_s: float = 0, silent_s: float = 0, **other: Any
) -> Beat:
    now = time.monotonic()
    beat = Beat(0, process.pid, phase, 7, now - since_s, phase in heartbeat.PHASES and phase != "save", now - silent_s)
    return replace(beat, **other)


@pytest.mark.parametrize(
    ("phase", "since_s", "silent_s", "stands", "frozen"),
    [
        ("counts", 8, 0, False, False),
        ("counts", 12, 0, True, False),
        ("counts", 12, 12, True, True),
        ("save", 3000, 0, False, False),
        ("preparing", 3000, 12, False, False),  # libraries are loaded by C code that keeps Python's lock
        ("preparing", 3000, 70, True, True),
    ],
)
def test_a_rank_stands_still(
    tmp_path: Path, process: psutil.Process, phase: str, since_s: float, silent_s: float, stands: bool, frozen: bool
):
    write_beat(tmp_path, beat_of(process, phase, since_s, silent_s))
    (rank,) = hangs.look(tmp_path, LIMIT_S)
    assert (rank.stands, rank.frozen) == (stands, frozen)
    assert rank.seconds == pytest.approx(silent_s if frozen else since_s, abs=1)


def test_a_stopped_process_is_frozen_whatever_it_did(tmp_path: Path, process: psutil.Process):
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    write_beat(tmp_path, beat_of(process, "save", silent_s=12))
    assert hangs.look(tmp_path, LIMIT_S)[0].frozen


def test_a_rank_that_has_ended_does_not_hang(tmp_path: Path, process: psutil.Process):
    write_beat(tmp_path, beat_of(process, since_s=1000, silent_s=1000))
    process.kill()
    while process.status() != psutil.STATUS_ZOMBIE:  # nobody has asked for its exit code yet
        time.sleep(0.01)
    assert hangs.look(tmp_path, LIMIT_S) == []


def test_a_beat_that_is_being_written_is_left_out(tmp_path: Path, process: psutil.Process):
    write_beat(tmp_path, beat_of(process))
    (tmp_path / "beat-1").write_text('{"rank": 1, "pi')
    assert [beat.rank for beat in heartbeat.read(tmp_path)] == [0]


LIFE = """
import sys, threading, time
from llmtrain import heartbeat
heartbeat._BEAT_S = 0.05
heartbeat.start(3)
heartbeat.on_to("forward")  # before training: nobody watches
print("began", flush=True)
sys.stdin.readline()
heartbeat.at("data", 41)
heartbeat.on_to("forward")
print("trains", flush=True)
sys.stdin.readline()
heartbeat.stop(3)
print("stopped", flush=True)
sys.stdin.readline()
"""


def test_the_life_of_a_rank(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", LIFE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, heartbeat.FOLDER: str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as rank:
        assert rank.stdin is not None
        assert rank.stdout is not None

        def beat(condition: Callable[[Beat], bool]) -> Beat:
            while not (found := [each for each in heartbeat.read(tmp_path) if condition(each)]):
                time.sleep(0.01)
            return found[0]

        assert rank.stdout.readline() == "began\n"
        first = beat(lambda _: True)
        assert (first.rank, first.pid, first.phase, first.watched) == (3, rank.pid, "starting", False)
        rank.stdin.write("\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "trains\n"
        training = beat(lambda each: each.phase == "forward")
        assert (training.step, training.watched) == (41, True)
        assert beat(lambda each: each.alive > training.alive).since == training.since

        rank.send_signal(signal.SIGSTOP)
        hangs.write_stacks(tmp_path, tmp_path / "new" / "stacks.txt")
        stacks = (tmp_path / "new" / "stacks.txt").read_text()
        assert stacks.startswith(f"rank 3, process {rank.pid}, step 41, forward\n")
        assert 'File "<string>", line' in stacks
        assert "in _beat" in stacks

        rank.stdin.write("\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "stopped\n"
        assert heartbeat.read(tmp_path) == []
        hangs.kill_all(tmp_path)
        assert rank.poll() is None
        rank.communicate("\n")
        assert rank.returncode == 0


def test_a_full_disk_leaves_no_sign_of_life_that_only_looks_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The supervisor would take it for a rank that does not run any more, and end the run."""

    def pwrite(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(heartbeat, "_ended", ended := threading.Event())
    ended.set()  # after one beat
    with (tmp_path / "beat-0").open("w") as file:
        heartbeat._beat(file.fileno(), 0)
        assert [beat.rank for beat in heartbeat.read(tmp_path)] == [0]
        monkeypatch.setattr(os, "pwrite", pwrite)
        heartbeat._beat(file.fileno(), 0)
        assert heartbeat.read(tmp_path) == []


def test_a_phase_that_nobody_watches_has_no_parts(monkeypatch: pytest.MonkeyPatch):
    """A step's parts may take as long as they like before training, as in the isolation check."""
    monkeypatch.setattr(heartbeat, "_heart", heart := heartbeat._Heart())
    heartbeat.at("preparing", watched=False)
    before = replace(heart)
    heartbeat.on_to("forward")
    assert heart == before
    heartbeat.at("data", 3)
    heartbeat.on_to("forward")
    assert (heart.phase, heart.step, heart.watched) == ("forward", 3, True)


def test_nothing_is_written_where_nobody_looks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(heartbeat.FOLDER, raising=False)
    before = threading.active_count()
    heartbeat.start(0)
    heartbeat.stop(0)
    assert threading.active_count() == before


# Several nodes


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[HangWatch, HangWatch]:
    """Two that see the same folder, and have looked for longer than the limit."""
    monkeypatch.setattr(hang_watch, "_AGAIN_S", 0.05)
    monkeypatch.setattr(hang_watch, "_ANSWER_S", 20.0)
    both = [HangWatch(Meeting(tmp_path, node, 2), 0, tmp_path / f"beats-{node}", LIMIT_S) for node in (0, 1)]
    for watch in both:
        watch._since -= 2 * LIMIT_S
    return both[0], both[1]


def look_together(nodes: tuple[HangWatch, HangWatch], questions: int) -> dict[int, list[int]]:
    """Each looks again and again, in a thread of its own, until it has asked so often or found a hang, and until the
    other is done too. Returns who hangs, by the node that says so.
    """
    found: dict[int, list[int]] = {}
    done: set[int] = set()

    def keep_looking(number: int) -> None:
        while len(done) < len(nodes):
            if number not in done and (named := nodes[number].look()):
                found[number] = [each.rank for each in named]
            elif number in done:
                nodes[number]._answer()
            if number in found or nodes[number]._asked >= questions:
                done.add(number)
            time.sleep(0.01)

    threads = [threading.Thread(target=keep_looking, args=[number]) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def test_the_culprit_may_be_on_another_node(
    tmp_path: Path, nodes: tuple[HangWatch, HangWatch], process: psutil.Process
):
    """Both nodes see ranks that stand still, and ask each other at the same time."""
    write_beat(tmp_path / "beats-0", beat_of(process, "backward", since_s=12))
    write_beat(tmp_path / "beats-1", beat_of(process, "forward", since_s=12, rank=1))
    assert look_together(nodes, questions=1) == {0: [1], 1: [1]}


def test_a_save_on_another_node_is_no_hang(tmp_path: Path, nodes: tuple[HangWatch, HangWatch], process: psutil.Process):
    write_beat(tmp_path / "beats-0", beat_of(process, "save", since_s=300, step=6))
    write_beat(tmp_path / "beats-1", beat_of(process, "counts", since_s=12, rank=1))
    nodes[0]._asked = 3  # it sees nothing to ask about
    assert look_together(nodes, questions=3) == {}
    assert nodes[1]._asked == 3


def test_a_node_that_does_not_answer_is_not_waited_for_for_ever(
    tmp_path: Path, nodes: tuple[HangWatch, HangWatch], process: psutil.Process, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hang_watch, "_ANSWER_S", 0.2)
    write_beat(tmp_path / "beats-0", beat_of(process, since_s=12))
    assert [each.rank for each in nodes[0].look()] == [0]


def test_who_was_stopped_itself_gives_the_ranks_time(
    tmp_path: Path, process: psutil.Process, monkeypatch: pytest.MonkeyPatch
):
    """A suspended job: after it goes on all signs of life are old."""
    monkeypatch.setattr(hang_watch, "_AGAIN_S", 0.0)
    watch = HangWatch(Meeting(tmp_path), 0, tmp_path, LIMIT_S)
    watch._since -= 100
    write_beat(tmp_path, beat_of(process, since_s=60, silent_s=60))
    watch._looked_at -= 60
    assert watch.look() == []
    watch._since -= LIMIT_S
    assert [each.rank for each in watch.look()] == [0]


def test_two_nodes_meet(tmp_path: Path):
    first, second = Meeting(tmp_path / "new", 0, 2), Meeting(tmp_path / "new", 1, 2)
    places: dict[int, Any] = {}
    thread = threading.Thread(target=lambda: places.update({1: second.place(0)}))
    thread.start()  # waits for the first node to choose
    places[0] = first.place(0)
    thread.join(30)
    assert (places[0].host, places[0].port) == (places[1].host, places[1].port)
    second.tell("ended", 0, {"agent": 1})
    assert first.wait_for_all("ended", 0, seconds=0.2) == {1: {"agent": 1}}  # the other says nothing
    first.tell("ended", 0, {"agent": 0})
    assert second.wait_for_all("ended", 0, seconds=30) == {0: {"agent": 0}, 1: {"agent": 1}}
    assert second.told("ended", 1) == {}  # of another attempt
    first.tell("decision", 0, {"again": True, "code": 1})
    assert second.wait_for_first("decision", 0) == {"again": True, "code": 1}
