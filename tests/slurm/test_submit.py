"""`llmtrain submit` on a real SLURM: runs that come back from whatever SLURM does to them."""

import random
import re
import time

import pytest

from launcher.jobs import JobDir
from llmtrain.errors import NotFinite
from tests.support.runs import Workplace
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_runs import (
    finishes,
    launch,
    output_of,
    run_of,
    submit,
    wait_for_checkpoint,
    wait_until,
    write_profile,
)

LENGTH = ["train.steps=240", "train.global_batch_size=32", "checkpoint.every_steps=20", "evaluate.every_steps=null"]
CALM = "calm-on-slurm"
WHOLE = ["--nodes=3", "--exclusive", "--partition=high"]


@pytest.fixture(scope="module")
def calm(workplace: Workplace) -> str:
    """A run that nothing has disturbed, on one machine."""
    workplace.train(f"run.name={CALM}", *LENGTH, ranks=4)
    return CALM


def same_as(workplace: Workplace, name: str, calm: str) -> None:
    assert workplace.weights(name) == workplace.weights(calm)
    assert workplace.ledger(name) == workplace.ledger(calm)


def test_two_nodes_train_as_torchrun_does(cluster: Cluster, workplace: Workplace, calm: str):
    job = submit(workplace, "undisturbed-on-slurm", "--nodes", "2", *LENGTH)
    finishes(cluster, workplace, "undisturbed-on-slurm", job.job_id)
    ours, theirs = workplace.ledger("undisturbed-on-slurm"), workplace.ledger(calm)
    assert [record["digest"] for record in ours] == [record["digest"] for record in theirs]
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], abs=1e-6)


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_preempted_it_saves_in_time_and_comes_back(cluster: Cluster, workplace: Workplace, calm: str, times: int):
    draw, name = random.Random(times), f"preempted-{times}"
    job = submit(workplace, name, "--nodes", "2", *LENGTH)
    run = run_of(workplace, name)
    reached = 0
    for restart in range(1, times + 1):
        reached = wait_for_checkpoint(run, reached)
        time.sleep(draw.uniform(0, 1))
        taker = cluster.submit("sleep 1", *WHOLE)
        assert cluster.wait_for(taker) == "COMPLETED"
        cluster.release(job.job_id)
        cluster.wait_for_restart(job.job_id, restart)
        reached = max(run.checkpoint_steps())
    finishes(cluster, workplace, name, job.job_id)
    same_as(workplace, name, calm)
    said = output_of(workplace, name)
    assert len(re.findall(r"stopped by .+ at step [\d,]+, saved", said)) == times, said
    assert said.count("is queued again, and goes on from the newest checkpoint") == times
    assert "Traceback" not in said


def test_preempted_without_grace_it_goes_on_from_the_last_checkpoint(cluster: Cluster, workplace: Workplace, calm: str):
    name = "preempted-at-once"
    job = submit(workplace, name, "--nodes", "2", *LENGTH, profile=write_profile(workplace, partition="nograce"))
    wait_for_checkpoint(run_of(workplace, name))
    taker = cluster.submit("sleep 1", *WHOLE)
    assert cluster.wait_for(taker) == "COMPLETED"
    finishes(cluster, workplace, name, job.job_id)
    same_as(workplace, name, calm)


@pytest.mark.soak
def test_before_the_time_limit_it_saves_and_comes_back(cluster: Cluster, workplace: Workplace, calm: str):
    """SLURM's signal and the supervisor's own clock are both early; whichever is first, the limit is not reached."""
    name, length = "limited", [*LENGTH, "train.steps=4000", "checkpoint.every_steps=1000"]
    workplace.train("run.name=calm-and-long", *length, ranks=4)
    job = submit(workplace, name, "--nodes", "2", *length, "--time", "1", "optim.lr=3e-3")
    cluster.wait_for_restart(job.job_id, timeout_s=120)
    cluster.call("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=30")
    assert re.search(r"stopped by .+ at step [\d,]+, saved", output_of(workplace, name))
    finishes(cluster, workplace, name, job.job_id)
    same_as(workplace, name, "calm-and-long")


@pytest.mark.soak
def test_requeued_by_hand_it_goes_on(cluster: Cluster, workplace: Workplace, calm: str):
    name = "requeued"
    job = submit(workplace, name, "--nodes", "2", *LENGTH)
    wait_for_checkpoint(run_of(workplace, name))
    cluster.call("scontrol", "requeue", job.job_id)
    finishes(cluster, workplace, name, job.job_id)
    same_as(workplace, name, calm)


@pytest.mark.soak
def test_a_node_that_crashes_costs_nothing_but_time(cluster: Cluster, workplace: Workplace, calm: str):
    """Two of three nodes; then the crashed one is down, and the two others go on."""
    name = "crashed"
    job = submit(workplace, name, "--nodes", "2", *LENGTH)
    wait_for_checkpoint(run_of(workplace, name))
    cluster.kill_node("n2")
    finishes(cluster, workplace, name, job.job_id)
    same_as(workplace, name, calm)


def test_with_one_node_left_it_goes_on_with_that_one(cluster: Cluster, workplace: Workplace, calm: str):
    name = "smaller"
    profile = write_profile(workplace, nodes_at_least=1, extra="{exclude: n3}")
    wait_until(lambda: cluster.call("sinfo", "-h", "-n", "n[1-2]", "-p", "low", "-o", "%t") == "idle")
    job = submit(workplace, name, "--nodes", "2", *LENGTH, profile=profile)
    wait_for_checkpoint(run_of(workplace, name))
    cluster.kill_node("n2")
    finishes(cluster, workplace, name, job.job_id)
    ours, theirs = workplace.ledger(name), workplace.ledger(calm)
    assert [record["digest"] for record in ours] == [record["digest"] for record in theirs]
    said = run_of(workplace, name).log.read_text()
    assert said.index("4 ranks on cpu") < said.index("2 ranks on cpu")


def test_a_node_that_the_batch_leaves_over_waits(cluster: Cluster, workplace: Workplace, calm: str):
    """Four nodes would divide the batch of 8 rows among 8 ranks; SLURM has three, whose 6 ranks do not."""
    name = "three"
    wait_until(lambda: cluster.call("sinfo", "-h", "-n", "n[1-3]", "-p", "low", "-o", "%t") == "idle")
    job = submit(workplace, name, "--nodes", "4", *LENGTH, profile=write_profile(workplace, nodes_at_least=1))
    finishes(cluster, workplace, name, job.job_id)
    assert "4 ranks on cpu" in run_of(workplace, name).log.read_text()
    waits = "the ranks of 3 nodes do not divide train.global_batch_size: 2 train, this one (node 2) waits"
    assert waits in output_of(workplace, name)
    ours, theirs = workplace.ledger(name), workplace.ledger(calm)
    assert [record["digest"] for record in ours] == [record["digest"] for record in theirs]


def test_an_error_that_a_person_has_to_mend_is_not_queued_again(cluster: Cluster, workplace: Workplace):
    """A learning rate with which the loss is soon not a number: nothing that could be seen before."""
    job = submit(workplace, "diverging", "optim.lr=1e30", "optim.clip_norm=null", "optim.schedule.warmup_steps=0")
    finishes(cluster, workplace, "diverging", job.job_id, state="FAILED")
    assert cluster.describe(job.job_id)["ExitCode"] == f"{NotFinite.exit_code}:0"
    assert cluster.describe(job.job_id)["Restarts"] == "0"
    assert "starting again" not in output_of(workplace, "diverging")


def test_what_is_known_to_fail_is_not_queued(cluster: Cluster, workplace: Workplace):
    first = submit(workplace, "first", "train.steps=2")
    finishes(cluster, workplace, "first", first.job_id)
    words = [str(workplace.config), "run.name=first", "train.device=cpu", "train.steps=2", "optim.lr=1e-5"]
    said = launch(workplace, "submit", *words, "--cluster", str(write_profile(workplace)), code=2)
    assert "nothing was queued: 1 problem" in said
    assert "optim.lr: the run has 0.003, now 1e-05" in said
    assert len(JobDir.of(run_of(workplace, "first")).records()) == 1
