"""A run's processes: which of them keeps it going, and whom a kill spares."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.keeper.processes import is_alive, is_launcher, is_torchrun, keeper_of, kill_tree


@pytest.mark.parametrize(
    ("command", "torchrun", "launcher"),
    [
        (["python", "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "llmtrain"], True, False),
        (["/v/bin/python3.11", "-u", "/v/bin/torchrun", "-m", "llmtrain"], True, False),
        (["python", "/v/bin/llmtrain", "run", "c.yaml"], False, True),
        (["python", "-m", "launcher", "run", "c.yaml"], False, True),
        (["python", "-u", "-m", "llmtrain", "c.yaml"], False, False),
        (["tmux", "new-session", "llmtrain", "run"], False, False),
        (["bash", "-c", "llmtrain run c.yaml"], False, False),
        (["python", "-m", "pytest"], False, False),
        (["python", "train.py", "torchrun"], False, False),
        ([], False, False),
    ],
)
def test_who_keeps_a_run_going(command: list[str], torchrun: bool, launcher: bool):
    assert (is_torchrun(command), is_launcher(command)) == (torchrun, launcher)


def test_the_keeper_is_the_topmost(tmp_path: Path):
    (tmp_path / "launcher").mkdir()
    start = "import subprocess, sys; subprocess.run([sys.executable, *{}])"
    inner = ["-c", "import time; time.sleep(60)"]
    (tmp_path / "torchrun").write_text(start.format(inner))
    (tmp_path / "launcher" / "__main__.py").write_text(start.format([str(tmp_path / "torchrun")]))
    (tmp_path / "launcher" / "__init__.py").write_text("")
    process = subprocess.Popen([sys.executable, "-m", "launcher", "run"], cwd=tmp_path)
    try:
        top = psutil.Process(process.pid)
        deadline = time.monotonic() + 20
        while len(found := top.children(recursive=True)) < 2 or "-c" not in found[-1].cmdline():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert keeper_of(found[-1]) == top
    finally:
        kill_tree(process.pid)
        process.wait()


STARTS_TWO = """
import subprocess, sys, time
for name in ("llmtrain", "llmtrain.service"):
    words = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", name]
    child = subprocess.Popen(words, stdout=subprocess.PIPE)
    child.stdout.readline()  # /proc tells its name by now
    print(child.pid, flush=True)
time.sleep(60)
"""


def test_of_all_that_a_start_has_started_the_service_alone_is_not_killed():
    process = subprocess.Popen([sys.executable, "-c", STARTS_TWO], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    rank, service = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
    try:
        kill_tree(process.pid)
        assert process.wait(20) == -signal.SIGKILL
        deadline = time.monotonic() + 20
        while is_alive(rank):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert is_alive(service)
    finally:
        for each in (process, rank, service):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
