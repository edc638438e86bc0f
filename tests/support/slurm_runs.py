"""Runs on the SLURM of the tests: small ones, whose ranks are processes on the CPU."""

import hashlib
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.jobs import JobDir, JobRecord
from llmtrain.rundir import RunDir
from tests.support.runs import TIMEOUT_S, Workplace, environment
from tests.support.slurm_cluster import Cluster


def write_profile(workplace: Workplace, **settings: Any) -> Path:
    """A profile of the tests' cluster, with `settings` over it."""
    shared = [str(workplace.folder), sysconfig.get_path("stdlib")]  # runs and shards; the text
    lines = {"partition": "low", "gpus_per_node": 2, "signal_s": 30, "time": "00:30:00", "shared": shared, **settings}
    text = "".join(f"{name}: {value}\n" for name, value in lines.items())
    path = workplace.folder / f"cluster-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    path.write_text(text)
    return path


def launch(workplace: Workplace, *words: str, code: int = 0) -> str:
    """`llmtrain WORDS` in the workplace; returns what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=workplace.folder,
        env={**environment(), "COLUMNS": "200"},
        text=True,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode} instead of {code}:\n{output[-4000:]}"
    return output


def submit(workplace: Workplace, name: str, *words: str, profile: Path | None = None) -> JobRecord:
    """Queue a run; what trains on it stands in its record."""
    cluster = str(profile or write_profile(workplace))
    settings = [f"run.name={name}", "train.device=cpu", *words]
    launch(workplace, "submit", str(workplace.config), *settings, "--cluster", cluster)
    record = JobDir.of(run_of(workplace, name)).last("train")
    assert record is not None
    return record


def run_of(workplace: Workplace, name: str) -> RunDir:
    return RunDir(workplace.run_folder(name))


def output_of(workplace: Workplace, name: str) -> str:
    """What all jobs of a run have said, on all nodes."""
    files = sorted(JobDir.of(run_of(workplace, name)).path.glob("submitted-*/*.out"))
    return "".join(f"== {path.name}\n{path.read_text(errors='replace')}" for path in files)


def wait_for_checkpoint(run: RunDir, beyond: int = 0) -> int:
    """The newest step, once it is beyond this one."""
    return wait_until(lambda: max((step for step in run.checkpoint_steps() if step > beyond), default=0))


def wait_until(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S / 2) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result


def finishes(cluster: Cluster, workplace: Workplace, name: str, job_id: str, state: str = "COMPLETED") -> None:
    """Wait for a job's end, without the pause before it is started again."""
    deadline = time.monotonic() + TIMEOUT_S
    while (now := cluster.wait_for(job_id, {"PENDING", *_OVER}, timeout_s=TIMEOUT_S)) == "PENDING":
        time.sleep(2)  # at once, SLURM can take the end of the old script for that of the new one
        cluster.release(job_id)
        assert time.monotonic() < deadline
        time.sleep(1)
    assert now == state, output_of(workplace, name)[-6000:]


_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
