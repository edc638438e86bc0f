"""What the command line of `llmtrain plan` means: this machine, nodes of some kind, or a job on a cluster."""

from dataclasses import dataclass
from pathlib import Path

from launcher.cluster import Profile, load_profile
from launcher.plan import Machine, find_machine, find_nodes
from launcher.slurm.client import seconds
from launcher.slurm.limits import Request
from llmtrain.errors import ConfigError

_SIGNAL_S = 120.0
"""Where no profile tells how long before its limit a job saves."""


@dataclass(frozen=True)
class Wishes:
    """As given on the command line; None: not given."""

    gpus: int | None
    nodes: int | None
    gpus_per_node: int | None
    cluster: Path | None
    time: str | None


@dataclass(frozen=True)
class Job:
    """What would be queued."""

    profile: Profile
    request: Request

    @property
    def train_s(self) -> float | None:
        """How long it trains until it has to save."""
        limit_s = seconds(self.request.time or self.profile.time)
        return None if limit_s is None else max(1.0, limit_s - self.profile.signal_s)


def find_job(wishes: Wishes) -> Job | None:
    """On the cluster that is named; None where none is.

    Raises:
        ConfigError: the profile is wrong, or the wishes contradict each other.
    """
    problems: list[str] = []
    if wishes.gpus is not None and (wishes.nodes is not None or wishes.gpus_per_node is not None or wishes.cluster):
        problems.append("--gpus is for one machine: for others give --nodes and --gpus-per-node")
    if wishes.time is not None:
        try:
            seconds(wishes.time)
        except ValueError as error:
            problems.append(f"--time {error}")
    if problems:
        raise ConfigError(problems)
    if wishes.cluster is None:
        return None
    profile = load_profile(wishes.cluster)
    gpus = profile.gpus_per_node if wishes.gpus_per_node is None else wishes.gpus_per_node
    return Job(profile, Request(wishes.nodes or 1, gpus, max(1, gpus), wishes.time))


def machine_for(wishes: Wishes, job: Job | None, gpu_memory_gb: float | None, device: str) -> Machine:
    """What the run would have: of a job what its profile says, else GPUs like those here, or as they are described.

    Raises:
        ConfigError: there is no GPU here to go by, and none is described.
    """
    if job is not None:
        return find_nodes(job.profile, job.request, gpu_memory_gb)
    ranks = wishes.gpus or (wishes.nodes or 1) * max(1, wishes.gpus_per_node or 1)
    return find_machine(ranks, gpu_memory_gb, "cpu" if wishes.gpus_per_node == 0 else device)


def train_seconds(wishes: Wishes, job: Job | None) -> float | None:
    """How long one job trains until it has to save; None without a limit."""
    if job is not None:
        return job.train_s
    limit_s = None if wishes.time is None else seconds(wishes.time)
    return None if limit_s is None else max(1.0, limit_s - _SIGNAL_S)
