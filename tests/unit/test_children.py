"""The service's children: how they are run beside training."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmtrain.service.children import Child, Pause
from llmtrain.service.niceness import niceness, step_back

AUTOGROUP = Path("/proc/self/autogroup")


def said_by_child(folder: Path, nice: int) -> dict[str, Any]:
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    child = Child("tests.support.says_niceness", [], folder / "log", lock, {}, nice)
    try:
        while child.exit_code is None:
            time.sleep(0.02)
        (said,) = child.lines()
    finally:
        child.end()
        os.close(lock)
    assert (folder / "log").read_text() == ""
    return said


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel does not group processes by session")
def test_a_child_steps_back_behind_other_sessions_too(tmp_path: Path):
    """Training is another session: niceness alone would not count against it."""
    ours = AUTOGROUP.read_text()
    said = said_by_child(tmp_path, nice=10)
    assert (said["nice"], said["leads_its_session"]) == (10, True)
    assert 10 <= said["session_nice"] <= 19
    assert AUTOGROUP.read_text() == ours


def test_a_child_with_the_cores_to_itself_is_not_nice(tmp_path: Path):
    said = said_by_child(tmp_path, nice=0)
    assert said["nice"] == 0
    assert said["session_nice"] in (0, None)


def test_a_week_of_failures_does_not_end_the_service():
    pause = Pause(first_s=2.0)
    pauses = [pause.failed() for _ in range(1100)]
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0]
    assert set(pauses[10:]) == {600.0}


@pytest.mark.parametrize(("asked", "pause"), [(0.0, 2.0), (100.0, 100.0), (3600.0, 3600.0), (1e9, 3600.0)])
def test_a_server_may_ask_for_an_hour_at_most(asked: float, pause: float):
    assert Pause(first_s=2.0).failed(asked) == pause


def test_the_more_waits_the_less_patient():
    assert [niceness(10, waiting) for waiting in (0, 1, 2, 3, 9)] == [10, 10, 7, 4, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")
def test_a_thread_steps_back_alone():
    """The service verifies in one: children that start later are no more patient for it."""
    before = os.nice(0), AUTOGROUP.read_text() if AUTOGROUP.exists() else ""
    with ThreadPoolExecutor(1, initializer=step_back, initargs=(10,)) as patient:
        found = patient.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
    assert found == 10
    assert (os.nice(0), AUTOGROUP.read_text() if AUTOGROUP.exists() else "") == before  # pytest leads no session
