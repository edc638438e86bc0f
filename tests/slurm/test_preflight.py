"""Bad input on a real SLURM: one report with everything in it, before anything is queued."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import yaml

from launcher.slurm.partitions import partitions
from tests.support.runs import Workplace, make_workplace
from tests.support.slurm_cluster import Cluster

UNPRIVILEGED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
"""Root may read everything; without these it is held to what files allow."""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    work = make_workplace(tmp_path_factory.mktemp("preflight"))
    subprocess.run([sys.executable, "-m", "launcher", "shard", str(work.config)], cwd=work.folder, check=True)
    return work


class Login:
    """Somebody who wants to submit a job."""

    def __init__(self, cluster: Cluster, work: Workplace):
        self.cluster, self.work = cluster, work

    def submit(
        self, *settings: str, prefix: list[str] | None = None, code: int = 2, options: Sequence[str] = (), **wishes: Any
    ) -> str:
        """What `llmtrain submit` says, with these wishes of the profile or of the job. Refused, it queues nothing."""
        asked = {name: wishes.pop(name) for name in ("nodes", "gpus_per_node", "ranks_per_node") if name in wishes}
        if "gpus_per_node" not in asked:
            asked.setdefault("ranks_per_node", 1)
        profile = {"gpus_per_node": 2, "time": "30", "shared": [str(self.work.folder)], "name": "tests", **wishes}
        (self.work.folder / "profile.yaml").write_text(yaml.safe_dump(profile))
        given = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "launcher", "submit", str(self.work.config), "--cluster", "profile.yaml"]
        done = subprocess.run(
            [*(prefix or []), *command, *given, *options, "train.device=cpu", *settings],
            cwd=self.work.folder, env={**self.cluster.environment, "COLUMNS": "200"}, text=True, capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        if code:
            assert self.cluster.call("squeue", "--noheader") == ""
            assert not (self.work.folder / "runs").exists()
        return done.stdout + done.stderr


@pytest.fixture
def login(cluster: Cluster, sharded: Workplace) -> Iterator[Login]:
    yield Login(cluster, sharded)
    cluster.cancel_all()
    shutil.rmtree(sharded.folder / "runs", ignore_errors=True)


def test_partitions_are_as_slurm_says(cluster: Cluster):
    found = partitions()
    assert sorted(found) == sorted(cluster.partitions)
    low, closed = found["low"], found["closed"]
    assert (low.is_default, low.num_nodes, low.gpus_per_node, low.limit_s) == (True, 3, 2, 172_800)
    assert (closed.num_nodes, closed.accounts, closed.limit_s) == (1, ("physics",), 600)


def test_what_is_well_is_said(login: Login):
    said = login.submit(nodes=2, gpus_per_node=2, partition="high", code=0)
    assert "takes the script (--test-only)" in said
    assert "8 rows = 4 ranks x 2 x 1" in said
    assert "error" not in said
    assert re.search(r"^job \d+  train$", said, re.MULTILINE)


def test_unknown_partition(login: Login):
    said = login.submit(partition="hihg")
    assert "partition: hihg (profile tests): no such partition; did you mean high?" in said
    assert "There are low (default), nograce, high and closed" in said
    assert "sbatch: error: invalid partition specified: hihg" in said  # its own words


def test_more_gpus_than_a_node_has(login: Login):
    said = login.submit(gpus_per_node=3)
    assert "GPUs: 3 per node are asked for; a node in low has 2" in said
    assert "GPUs per node are asked for, and a node has gpus_per_node=2 (profile tests)" in said
    assert "allocation failure: Requested node configuration is not available" in said


def test_an_account_without_rights(login: Login):
    """sbatch takes the job, and it would wait for ever."""
    said = login.submit(partition="closed", account="math", time="5")
    assert "account: math (profile tests) may not use closed: it is for physics alone" in said
    assert said.count("  - ") == 1
    login.submit(partition="closed", account="physics", time="5", code=0)


def test_more_nodes_and_time_than_there_are(login: Login):
    """sbatch takes both, and the job would wait for ever."""
    said = login.submit(nodes=4, time="3-0", ranks_per_node=2)
    assert "nodes: 4 are asked for; low has 3" in said
    assert "time limit: 3-0 is too long: low allows 2 d 0 h" in said


def test_an_unreadable_shard_folder(login: Login):
    folder = login.work.folder / "shards"
    folder.chmod(0)
    try:
        said = login.submit(prefix=UNPRIVILEGED)
    finally:
        folder.chmod(0o755)
    assert "shards: shards/manifest.json: cannot be read (Permission denied)" in said
    shard = next(folder.glob("heldout-*.arrow"))
    shard.chmod(0)
    try:
        said = login.submit(prefix=UNPRIVILEGED)
    finally:
        shard.chmod(0o644)
    assert f"{shard.name}: cannot be read (Permission denied)" in said


def test_a_run_folder_on_a_disk_of_one_node(login: Login):
    said = login.submit(f"run.dir={login.cluster.local_disk}", nodes=2)
    assert f"run folder: {login.cluster.local_disk}/run is not below what all nodes see by the profile" in said
    assert "run folder: /dev/shm/runs/run is on tmpfs, the memory of one machine" in login.submit(
        "run.dir=/dev/shm/runs", nodes=2, shared=[]
    )
    said = login.submit("run.dir=/var/tmp/runs", shared=[])  # also with one node: it may start again on another
    assert "run folder: /var/tmp/runs/run is below /var/tmp, which every machine has for itself" in said


def test_all_of_it_at_once_is_one_report(login: Login):
    (login.work.folder / "broken").mkdir()
    (login.work.folder / "broken/manifest.json").write_text("{}")
    said = login.submit(
        "run.dir=/dev/shm/runs", "data.dir=broken",
        partition="closed", account="math", time="30", nodes=2, gpus_per_node=3,
    )  # fmt: skip
    head, *problems = said.split("error: ")[1].split("\n  - ")
    assert head == "nothing was queued: 9 problems"
    assert [problem.split(":")[0] for problem in problems] == [
        "profile", "nodes", "GPUs", "time limit", "account", "sbatch", "shards", "batch", "run folder",
    ]  # fmt: skip


def test_nodes_that_are_down_only_make_the_job_wait(login: Login):
    login.cluster.call("scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=tests")
    try:
        said = login.submit(nodes=3)
        assert "sbatch:" not in said.split("error:")[1]
        assert "3 are asked for, and 2 of 3 in low are up: the job waits" in said
    finally:
        login.cluster.call("scontrol", "update", "NodeName=n3", "State=RESUME")


def test_a_service_job_that_cannot_be_queued_keeps_the_training_job_out_too(login: Login):
    said = login.submit(options=["--service-job"], service={"partition": "cpu"})
    assert "service: partition: cpu (profile tests): no such partition" in said
    assert "service: sbatch: sbatch: error: invalid partition specified: cpu" in said


def test_every_run_of_a_sweep_is_looked_at(login: Login):
    said = login.submit(options=["--sweep", "train.global_batch_size=8,7,6"], ranks_per_node=2)
    assert said.count("2 ranks do not divide it") == 1
    assert "train.global_batch_size=7" in said


def test_sharding_that_cannot_be_queued(login: Login):
    (login.work.folder / "profile.yaml").write_text("gpus_per_node: 0\nname: tests\nshard: {partition: cpu}\n")
    words = [str(login.work.config), "data.dir=new", "--submit", "--cluster", "profile.yaml", "train.device=cuda"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "shard", *words],
        cwd=login.work.folder, env=login.cluster.environment, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "partition: cpu (profile tests): no such partition" in done.stderr
    assert "shards: " in done.stderr  # below /tmp, which every machine has for itself
    assert "cuda" not in done.stderr
    assert login.cluster.call("squeue", "--noheader") == ""
