"""`llmtrain doctor --cluster` on a real SLURM."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cluster import load_profile
from launcher.slurm.batch import JobSpec
from launcher.slurm.limits import check_limits
from launcher.slurm.partitions import partitions
from tests.support.slurm_cluster import Cluster


@pytest.mark.parametrize("partition", [None, "high", "closed"])
def test_a_drafted_profile_loads_and_fits(cluster: Cluster, tmp_path: Path, partition: str | None):
    file = tmp_path / "drafted.yaml"
    named = [] if partition is None else ["--partition", partition]
    command = [sys.executable, "-m", "launcher", "doctor", "--cluster", "-o", str(file), *named]
    subprocess.run(command, env=cluster.environment, check=True, timeout=60)
    profile = load_profile(file)
    assert (profile.name, profile.partition) == ("tests", partition or "low")
    assert (profile.gpus_per_node, profile.cpus_per_gpu) == (2, 4)
    found = check_limits(JobSpec("run", tmp_path, profile, gpus_per_node=2), partitions())
    assert not [finding for finding in found if finding.severity == "error"]
