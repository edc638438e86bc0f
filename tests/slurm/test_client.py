"""What SLURM says of jobs, asked of a real one."""

import os
import signal
import time
from pathlib import Path

import pytest

from launcher.slurm import client
from launcher.slurm.client import Queued
from launcher.slurm.partitions import partitions
from llmtrain.errors import SlurmError
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_runs import wait_until

LONG = "sleep 300"
ALL_NODES = ["--nodes=3", "--exclusive"]


def test_jobs_that_run_wait_and_ended(cluster: Cluster):
    fine, failed, killed = cluster.submit("true"), cluster.submit("exit 3"), cluster.submit("kill -9 $$")
    for job in (fine, failed, killed):
        cluster.wait_for(job)
    runs = cluster.submit(LONG, "--nodes=2", "--time=10")
    cluster.wait_for(runs, "RUNNING")
    waits = cluster.submit(LONG, *ALL_NODES)
    depends = cluster.submit(LONG, f"--dependency=afterok:{runs}")
    wait_until(lambda: client.queue([waits])[waits].starts is not None)  # the scheduler says when it expects that
    wait_until(lambda: client.queue([waits])[waits].reason == "Resources")
    told = client.queue([fine, failed, killed, runs, waits, depends, "1"])

    assert told[fine] == Queued(fine, "COMPLETED", "", told[fine].nodes)
    assert (told[failed].state, told[failed].reason) == ("FAILED", "exit code 3")
    assert (told[killed].state, told[killed].reason) == ("FAILED", "signal 9")
    assert all(told[job].is_over for job in (fine, failed, killed))
    assert (told[runs].state, told[runs].nodes, told[runs].is_over) == ("RUNNING", "n[1-2]", False)
    assert told[runs].left_s == pytest.approx(600, abs=30)
    assert client.end_time(runs) == pytest.approx(time.time() + 600, abs=30)
    assert (told[waits].state, told[waits].reason, told[waits].is_over) == ("PENDING", "Resources", False)
    assert told[waits].starts == pytest.approx(time.time() + 600, abs=60)
    assert (told[depends].state, told[depends].reason) == ("PENDING", "Dependency")
    assert "1" not in told  # never heard of
    assert client.queue(["1"]) == {}
    assert client.describe("1") == {}
    assert client.describe(waits)["JobState"] == "PENDING"
    assert client.end_time(waits) is None


def test_tasks_of_an_array_and_the_whole(cluster: Cluster):
    job = cluster.submit('[ "$SLURM_ARRAY_TASK_ID" = 0 ] && exit 4; sleep 300', "--array=0-3%2")
    wait_until(lambda: client.queue([f"{job}_2"])[f"{job}_2"].state == "RUNNING")
    wait_until(lambda: client.queue([f"{job}_0"])[f"{job}_0"].state == "FAILED")
    wait_until(lambda: client.queue([f"{job}_3"])[f"{job}_3"].reason == "JobArrayTaskLimit")
    told = client.queue([f"{job}_0", f"{job}_1", f"{job}_3", job, f"{job}_77"])
    assert (told[f"{job}_0"].state, told[f"{job}_0"].reason) == ("FAILED", "exit code 4")
    assert told[f"{job}_1"].state == "RUNNING"
    assert (told[f"{job}_3"].state, told[f"{job}_3"].reason) == ("PENDING", "JobArrayTaskLimit")
    assert (told[job].state, told[job].reason) == ("RUNNING", "2 running, 1 pending, 1 failed")
    assert f"{job}_77" not in told
    assert client.describe(f"{job}_3")["ArrayTaskId"] == "3"


def test_habits_of_the_user_change_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    job = cluster.submit("true", "--hold")
    for name, value in {"SQUEUE_FORMAT": "%j", "SQUEUE_PARTITION": "high", "SQUEUE_STATES": "RUNNING"}.items():
        monkeypatch.setenv(name, value)
    assert client.queue([job])[job] == Queued(job, "PENDING", "JobHeldUser")
    known = partitions()
    monkeypatch.setenv("SINFO_PARTITION", "another")
    assert partitions() == known


def test_forgotten_jobs_are_asked_of_sacct(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sacct = tmp_path / "sacct"
    sacct.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--jobs=1,2*) ;; *) exit 1;; esac\n'
        "echo '1|CANCELLED by 1000|0:15|n1'; echo '2_0|COMPLETED|0:0|n2'; echo '2_1|OUT_OF_MEMORY|0:125|n[2-3]'\n"
    )
    sacct.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert client.queue(["1", "2"]) == {
        "1": Queued("1", "CANCELLED", "signal 15", "n1", from_accounts=True),
        "2": Queued("2", "OUT_OF_MEMORY", "1 out_of_memory, 1 completed", "n[2-3]", from_accounts=True),
    }


def test_a_slurm_that_is_down_is_said_quickly(cluster: Cluster):
    controller = cluster.daemons[1]
    controller.send_signal(signal.SIGSTOP)  # it would be asked again and again
    try:
        began = time.monotonic()
        with pytest.raises(SlurmError, match=r"slurmctld|scontrol: no answer within 5 s"):
            client.queue(["1"])
        assert time.monotonic() - began < 12
    finally:
        controller.send_signal(signal.SIGCONT)


def test_sbatch_speaks_for_itself(cluster: Cluster):
    with pytest.raises(SlurmError, match="invalid partition specified: nowhere"):
        client.call(["sbatch", "--partition=nowhere", "--wrap=true"])


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not client.is_here()
    with pytest.raises(SlurmError, match="scontrol: not found; is this a login node"):
        client.queue(["1"])
    assert client.queue([]) == {}
