"""A SLURM of our own, one for all tests of a process; skipped, saying so, where it cannot be had."""

from collections.abc import Iterator

import pytest

from tests.support import slurm_cluster
from tests.support.slurm_cluster import Cluster, NotPossible


@pytest.fixture(scope="session")
def started_cluster() -> Iterator[Cluster]:
    """Each of pytest's worker processes starts one: nothing in them is shared."""
    try:
        cluster = slurm_cluster.start()
    except NotPossible as reason:
        pytest.skip(f"no SLURM here: {reason}")
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(started_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Without jobs, with all nodes up; this process is one of its clients too."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, started_cluster.environment[name])
    yield started_cluster
    started_cluster.heal()
