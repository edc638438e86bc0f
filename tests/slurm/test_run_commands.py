"""`llmtrain status`, `logs` and `stop` on real jobs; what they run stands in for training."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.stop import stop_runs
from launcher.watching.logs import Wanted, show_logs
from launcher.watching.status_display import show_status
from llmtrain.rundir import RunDir
from tests.support.jobs import submitted
from tests.support.slurm_cluster import Cluster


def submit(cluster: Cluster, run: RunDir, script: str, *options: str) -> str:
    job = cluster.submit(script, "--output=%j_0_log.out", *options)
    jobs = submitted(run, job)
    jobs.folder(job).rmdir()
    jobs.folder(job).symlink_to(cluster.folder)
    return job


def test_jobs_are_shown_followed_and_stopped(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "140")
    first, second = RunDir(tmp_path / "runs" / "first"), RunDir(tmp_path / "runs" / "second")
    stop = tmp_path / "runs" / ".jobs" / "first" / "stop"
    ends = f"echo at work; while [ ! -e {stop} ]; do sleep 0.2; done; echo saved"
    running = submit(cluster, first, ends, "--nodes=3", "--exclusive", "--time=60")
    cluster.wait_for(running, "RUNNING")
    waiting = submit(cluster, second, "true")
    follower = subprocess.Popen(
        [sys.executable, "-m", "launcher", "logs", str(first.path), "-f"],
        env=cluster.environment, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert follower.stdout is not None
    assert follower.stdout.readline() == "at work\n"

    show_status([tmp_path / "runs"], False, False)
    output = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"{running} running, (1 h 00|5[0-9]) min left", output), output
    assert f"{waiting} pending" in output

    stop_runs([first.path, second.path], False)
    output = capsys.readouterr().out
    assert f"job {running} is asked to save and to end" in output
    assert f"job {waiting} waited and is cancelled" in output
    assert output.count("has ended") == 2
    assert (cluster.state(running), cluster.state(waiting)) == ("COMPLETED", "CANCELLED")
    assert follower.communicate(timeout=60) == ("saved\n", None)
    show_logs(first.path, Wanted(node=0), False, None)
    assert capsys.readouterr().out == "at work\nsaved\n"


def test_a_job_is_cancelled_now(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunDir(tmp_path / "runs" / "gpt")
    job = submit(cluster, run, "exec sleep 300")
    cluster.wait_for(job, "RUNNING")
    stop_runs([run.path], True)
    assert cluster.state(job) == "CANCELLED"
    assert capsys.readouterr().out.endswith("has ended; no checkpoint yet\n")
