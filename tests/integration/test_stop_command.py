"""`llmtrain stop` and `llmtrain logs` on a real run of several ranks."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.keeper.processes import is_alive
from llmtrain import errors
from tests.support.runs import TIMEOUT_S, Workplace, environment

LENGTH = ["train.steps=100000", "checkpoint.every_steps=10", "evaluate.every_steps=null", "evaluate.sample.tokens=1"]


def llmtrain(workplace: Workplace, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=workplace.folder, env=environment(), text=True, capture_output=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


def start(workplace: Workplace, name: str) -> subprocess.Popen[str]:
    """A run of two ranks that has a checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "run", str(workplace.config), f"run.name={name}", "--ranks", "2", *LENGTH],
        cwd=workplace.folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_S
    while not any((workplace.run_folder(name) / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def newest(run: Path) -> int:
    return max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("now", [False, True])
def test_a_run_of_two_ranks_is_stopped(workplace: Workplace, now: bool):
    name = "stopped-now" if now else "stopped"
    process = start(workplace, name)
    run = workplace.run_folder(name)
    family = psutil.Process(process.pid).children(recursive=True)
    other = llmtrain(workplace, "logs", f"runs/{name}", "--rank", "1")
    assert other.returncode == 0, other.stderr
    before = newest(run)
    done = llmtrain(workplace, "stop", f"runs/{name}", *(["--now"] if now else []))
    assert done.returncode == 0, done.stderr
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == (-9 if now else errors.EXIT_REQUEUE), output
    _, left = psutil.wait_procs(family, timeout=10)
    assert not any(is_alive(child) for child in left)
    assert f"has ended; last checkpoint: step {newest(run):,} (runs/{name}/checkpoints/" in done.stdout
    assert newest(run) > before or now
    assert "starting again" not in output
    again = llmtrain(workplace, "stop", f"runs/{name}")
    assert (again.returncode, "does not run" in again.stdout) == (0, True)


@pytest.mark.parametrize("now", [False, True])
def test_a_run_that_still_builds_its_shards_is_stopped(own_workplace: Workplace, now: bool):
    """Nothing holds the run's own lock yet, and its folder is not there."""
    workplace = own_workplace
    words = ["run.name=early", "data.sources=[{kind: stdlib}]", "data.tokenizer.vocab_size=20000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "run", str(workplace.config), *words],
        cwd=workplace.folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    top = psutil.Process(process.pid)
    deadline = time.monotonic() + TIMEOUT_S
    while not any("shard" in child.cmdline() for child in top.children(recursive=True)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = top.children(recursive=True)
    shown = llmtrain(workplace, "status", "runs/early")
    assert f"starting (process {process.pid} on " in " ".join(shown.stdout.split()), shown.stdout + shown.stderr
    done = llmtrain(workplace, "stop", "runs/early", *(["--now"] if now else []))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("has ended; no checkpoint yet\n")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == (-9 if now else errors.EXIT_REQUEUE), output
    assert "starting again" not in output
    _, left = psutil.wait_procs(family, timeout=10)
    assert not any(is_alive(child) for child in left)  # neither the build nor its workers
    assert not list((workplace.folder / "shards").glob("manifest.json"))
