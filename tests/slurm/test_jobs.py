"""Sharding, a sweep, and the checkpoint service as jobs of their own, on a real SLURM."""

import re
from pathlib import Path

import pytest

from launcher.jobs import JobDir
from launcher.slurm import client
from llmtrain import ledger
from llmtrain.rundir import RunDir
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

ROOT = Path(__file__).parents[2]
SHORT = ["train.steps=12", "train.device=cpu", "checkpoint.every_steps=4", "evaluate.every_steps=null"]


def test_shards_by_jobs_and_training_after_them(cluster: Cluster, own_workplace: Workplace):
    workplace = own_workplace
    profile = str(write_profile(workplace, shard="{cpus: 1}"))
    said = launch(workplace, "shard", str(workplace.config), "--submit", "--cluster", profile, "--parts", "3")
    last = re.search(r"--after (\d+)", said)
    assert last is not None, said
    job = submit(workplace, "after-shards", *SHORT, "--ranks-per-node", "1", "--after", last[1])
    assert cluster.describe(job.job_id)["JobState"] == "PENDING"
    shown = launch(workplace, "status", "runs")
    assert "shard-run" in shown
    assert "after-shards" in shown
    finishes(cluster, workplace, "after-shards", job.job_id)
    assert "building them" not in output_of(workplace, "after-shards")
    workplace.train("run.name=here", "data.dir=shards-here", *SHORT)
    assert workplace.weights("after-shards") == workplace.weights("here")
    names = {path.name for path in (workplace.folder / "shards").rglob("*.arrow")}
    assert names == {path.name for path in (workplace.folder / "shards-here").rglob("*.arrow")}


def test_a_sweep_is_an_array_whose_runs_are_ranked(cluster: Cluster, workplace: Workplace):
    words = ["--sweep", "optim.lr=1e-3,1e-2", "--sweep", "model.dropout=0.0,0.2", "--ranks-per-node", "1"]
    profile = str(write_profile(workplace))
    launch(workplace, "submit", str(workplace.config), "run.name=sweep", *SHORT, *words, "--cluster", profile)
    runs = [JobDir(path) for path in sorted((workplace.folder / "runs/sweep/.jobs").iterdir()) if path.name != "sweep"]
    ids = [record.job_id for jobs in runs for record in jobs.records()]
    assert len(ids) == 4
    assert len({job_id.split("_")[0] for job_id in ids}) == 1
    shown = launch(workplace, "status", "runs/sweep")
    for jobs in runs:
        finishes(cluster, workplace, f"sweep/{jobs.name}", jobs.records()[-1].job_id)
        assert jobs.name in shown
    ranking = launch(workplace, "compare", "runs/sweep")
    assert all(jobs.name in ranking for jobs in runs), ranking
    assert {jobs.name for jobs in runs} == {
        "00-lr_1e-3-dropout_0.0", "01-lr_1e-3-dropout_0.2", "02-lr_1e-2-dropout_0.0", "03-lr_1e-2-dropout_0.2",
    }  # fmt: skip


def test_a_sweep_leaves_room_for_others(cluster: Cluster, workplace: Workplace):
    words = ["--sweep", "optim.lr=1e-3,1e-2,1e-1", "--at-once", "1", "--ranks-per-node", "1"]
    settings = ["run.name=few", "train.device=cpu", "train.steps=100000"]
    launch(workplace, "submit", str(workplace.config), *settings, *words, "--cluster", str(write_profile(workplace)))
    few = [JobDir(path) for path in sorted((workplace.folder / "runs/few/.jobs").glob("0*"))]
    ids = [record.job_id for jobs in few for record in jobs.records()]
    assert len(ids) == 3

    def states() -> list[str]:
        found = client.queue(ids)
        return sorted(f"{job.state} {job.reason}".strip() for job in found.values())

    wait_until(lambda: "RUNNING" in states())
    assert states() == ["PENDING JobArrayTaskLimit"] * 2 + ["RUNNING"]
    assert "waits for other tasks of its array" in launch(workplace, "status", f"runs/few/{few[1].name}")
    cluster.call("scancel", ids[0])
    wait_until(lambda: client.queue([ids[1]])[ids[1]].state == "RUNNING")


def test_the_service_has_a_job_of_its_own(cluster: Cluster, workplace: Workplace):
    name = "served"
    profile = write_profile(workplace, service="{cpus: 1, partition: high}")
    job = submit(workplace, name, *SHORT, "--ranks-per-node", "1", "--service-job", profile=profile)
    service = JobDir.of(run_of(workplace, name)).last("service")
    assert service is not None
    finishes(cluster, workplace, name, job.job_id)
    finishes(cluster, workplace, name, service.job_id)
    run = run_of(workplace, name)
    assert sorted(ledger.scores(run)) == run.checkpoint_steps()
    assert "service" in launch(workplace, "status", str(run.path))
    assert run.summary.exists()


def test_two_jobs_of_one_run_are_refused(cluster: Cluster, workplace: Workplace, monkeypatch: pytest.MonkeyPatch):
    name = "twice"
    monkeypatch.setenv("SBATCH_PARTITION", "closed")  # the profile's word counts
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")  # what the script sets reaches Python all the same
    for variable in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "MEM_PER_CPU", "MEM_PER_NODE"):
        monkeypatch.setenv(f"SLURM_{variable}", "1")  # as in an allocation
    seen = workplace.folder / "seen"
    environment = write_profile(workplace, environment="{SEEN: here}", setup=f"['srun env > {seen}']")
    submit(workplace, name, "train.steps=100000", "--ranks-per-node", "1", profile=environment)
    words = [str(workplace.config), f"run.name={name}", "train.device=cpu", "--ranks-per-node", "1"]
    profile = str(write_profile(workplace))
    said = launch(workplace, "submit", *words, "--cluster", profile, code=2)
    assert cluster.describe(JobDir.of(run_of(workplace, name)).records()[0].job_id)["Partition"] == "low"
    assert re.search(r"run twice is (PENDING|RUNNING) already, as job \d+: stop it first", said)
    wait_until(lambda: RunDir(workplace.run_folder(name)).checkpoint_steps())
    assert "SEEN=here" in seen.read_text().splitlines()
    launch(workplace, "stop", f"runs/{name}")
    assert "because of llmtrain stop: the run saves first" in output_of(workplace, name)
    assert len(JobDir.of(run_of(workplace, name)).records()) == 1


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "slurm").glob("*.sbatch"))])
def test_sbatch_takes_the_scripts(cluster: Cluster, name: str):
    here = ["--partition=low", "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=4"]
    cluster.call("sbatch", "--test-only", *here, str(ROOT / "slurm" / name), "train.steps=2")


def test_a_script_runs_and_comes_back_by_itself(cluster: Cluster, own_workplace: Workplace):
    """As a user calls it: sbatch's options before the script, settings behind it. Preempted once."""
    workplace, name = own_workplace, "scripted"
    (workplace.folder / "configs").mkdir()
    (workplace.folder / "configs/gpt2.yaml").write_text(workplace.config.read_text())
    words = ["--partition=low", "--gpus-per-node=2", "--cpus-per-task=2", "--mem=100"]
    settings = [
        f"run.name={name}",
        "train.device=cpu",
        "train.steps=100",
        "checkpoint.every_steps=5",
        "evaluate.every_steps=null",
    ]
    script = (ROOT / "slurm/one-node.sbatch").read_text()
    own = workplace.folder / "one-node.sbatch"
    own.write_text(script.replace("--ranks 4", "--ranks 2").replace("--cpus-per-task=32", "--cpus-per-task=2"))
    job = cluster.call("sbatch", "--parsable", f"--chdir={workplace.folder}", *words, str(own), *settings)
    run = run_of(workplace, name)
    reached = wait_for_checkpoint(run)
    taker = cluster.submit("sleep 1", "--nodes=3", "--exclusive", "--partition=high")
    assert cluster.wait_for(taker) == "COMPLETED"
    cluster.release(job)
    finishes(cluster, workplace, name, job)
    said = (workplace.folder / f"gpt2-{job}.out").read_text()
    assert "is queued again, and goes on from the newest checkpoint" in said
    assert re.search(r"resuming +from step ", said)
    assert reached < max(run.checkpoint_steps()) == 100
