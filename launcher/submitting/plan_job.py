"""What the command line of `llmtrain plan` means: this machine, nodes of some kind, or a job on a cluster."""

from dataclasses import dataclass
from pathlib import Path

from launcher import display
from launcher.keeper.rules import Rules
from launcher.planning.plan import GB, Machine, find_machine
from launcher.submitting.order import Order, order_of
from launcher.walltime import seconds
from llmtrain.errors import ConfigError
from llmtrain.wording import count


@dataclass(frozen=True)
class Wishes:
    """As given on the command line; None: not given."""

    gpus: int | None
    nodes: int | None
    gpus_per_node: int | None
    ranks_per_node: int | None
    cluster: Path | None
    time: str | None


def find_job(wishes: Wishes) -> Order | None:
    """What `llmtrain submit` would queue on the cluster that is named; None where none is.

    Raises:
        ConfigError: the profile is wrong, or the wishes contradict each other.
    """
    problems: list[str] = []
    others = (wishes.nodes, wishes.gpus_per_node, wishes.ranks_per_node, wishes.cluster)
    if wishes.gpus is not None and any(other is not None for other in others):
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
    return order_of(wishes.cluster, wishes.nodes or 1, wishes.gpus_per_node, wishes.ranks_per_node, wishes.time or "")


def machine_for(wishes: Wishes, job: Order | None, gpu_memory_gb: float | None, device: str) -> Machine:
    """What the run would have: of a job what its profile says, else GPUs like those here, or as they are described.

    Raises:
        ConfigError: there is no GPU here to go by, and none is described.
    """
    if job is not None:
        return find_nodes(job, gpu_memory_gb, device)
    each = wishes.gpus_per_node or wishes.ranks_per_node or 1
    on_cpu = wishes.gpus_per_node == 0 or wishes.ranks_per_node is not None
    return find_machine(wishes.gpus or (wishes.nodes or 1) * each, gpu_memory_gb, "cpu" if on_cpu else device)


def find_nodes(job: Order, gpu_memory_gb: float | None, device: str) -> Machine:
    """What a job gets of a cluster, which is not asked."""
    profile, ranks = job.profile, job.nodes * job.ranks_per_node
    nodes = count(job.nodes, "node")
    if not job.gpus_per_node or device == "cpu":
        size = None if profile.mem_bytes is None else profile.mem_bytes / job.ranks_per_node
        memory = "unknown memory" if profile.mem_bytes is None else display.size(profile.mem_bytes)
        return Machine("cpu", ranks, size, f"{nodes} with {memory}, {count(ranks, 'rank')}")
    gigabytes = gpu_memory_gb or profile.gpu_memory_gb
    gpus = count(job.gpus_per_node, "GPU")
    if gigabytes is None:
        return Machine("cuda", ranks, None, f"{nodes} with {gpus} of unknown size")
    return Machine("cuda", ranks, gigabytes * GB, f"{nodes} with {gpus} of {gigabytes:g} GB")


def train_seconds(wishes: Wishes, job: Order | None) -> float | None:
    """How long one job trains until it has to save; None without a limit."""
    time = wishes.time or (job.profile.time if job is not None else None)
    limit_s = None if time is None else seconds(time)
    lead_s = Rules.lead_s if job is None else job.profile.signal_s
    return None if limit_s is None else max(1.0, limit_s - lead_s)
