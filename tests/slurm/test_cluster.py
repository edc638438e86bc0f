"""That the SLURM of these tests does what a cluster does: several nodes, GPUs, preemption, a crash of a node."""

import sys

from tests.support.slurm_cluster import Cluster
from tests.support.slurm_runs import wait_until

WHOLE = ["--nodes=3", "--exclusive", "--requeue"]


def test_a_job_on_two_nodes_sees_their_names_and_gpus(cluster: Cluster):
    script = "srun bash -c 'echo \"$SLURM_NODEID $(hostname) $CUDA_VISIBLE_DEVICES $(getent hosts n2 | cut -c1-9)\"'"
    job = cluster.submit(script, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2")
    assert cluster.wait_for(job) == "COMPLETED"
    assert sorted(cluster.output(job).splitlines()) == ["0 n1 0,1 127.0.77.", "1 n2 0,1 127.0.77."]


def test_steps_find_this_python(cluster: Cluster):
    job = cluster.submit("srun python -c 'import sys; import launcher; print(sys.prefix)'")
    assert cluster.wait_for(job) == "COMPLETED"
    assert cluster.output(job).split() == [sys.prefix]


def test_a_job_is_warned_before_a_higher_partition_takes_its_nodes(cluster: Cluster):
    """One that leaves within the grace time has ended for SLURM: it comes back only if it requeues itself."""
    script = "trap 'echo warned; scontrol requeue $SLURM_JOB_ID' USR1\necho ready\nsleep 300 & wait; wait"
    job = cluster.submit(script, *WHOLE, "--partition=low", "--signal=B:USR1@60", "--open-mode=append")
    cluster.wait_for(job, "RUNNING")
    wait_until(lambda: (cluster.folder / f"slurm-{job}.out").exists() and "ready" in cluster.output(job))
    taker = cluster.submit("sleep 1", *WHOLE, "--partition=high")
    assert cluster.wait_for(taker) == "COMPLETED"
    cluster.wait_for_restart(job)
    assert "warned" in cluster.output(job)


def test_without_a_grace_time_it_is_requeued_at_once(cluster: Cluster):
    job = cluster.submit("sleep 300", *WHOLE, "--partition=nograce")
    cluster.wait_for(job, "RUNNING")
    taker = cluster.submit("sleep 1", *WHOLE, "--partition=high")
    assert cluster.wait_for(taker) == "COMPLETED"
    cluster.wait_for_restart(job)


def test_a_crash_of_a_node_requeues_its_job(cluster: Cluster):
    job = cluster.submit("srun sleep 300", "--nodes=2", "--requeue", "--nodelist=n[2-3]")
    cluster.wait_for(job, "RUNNING")
    cluster.kill_node("n3")
    cluster.wait_for(job, "PENDING")
    cluster.revive_node("n3")
    cluster.wait_for_restart(job)
