"""What a training job is to have: the options of `llmtrain submit`, of which `llmtrain plan` knows some too."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import walltime
from launcher.cluster import Profile, load_profile
from launcher.keeper.rules import Rules
from launcher.slurm.batch import JobSpec
from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError


@dataclass(frozen=True)
class Order:
    """What a training job is to have, and how it is kept going; the same for all runs of a sweep."""

    profile: Profile
    profile_file: Path
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    time: str
    """Limit; empty: the profile's."""
    after: str = ""
    """Dependency, as sbatch takes it."""
    at_once: int | None = None
    """How many runs of a sweep may train at the same time; None: all that SLURM has room for."""
    max_restarts: int = Rules.max_restarts
    hang_s: float = Rules.hang_s

    @property
    def rules(self) -> Rules:
        return Rules(self.max_restarts, self.hang_s, lead_s=self.profile.signal_s, may_requeue=self.profile.requeue)

    def device(self, config: RunConfig) -> str | None:
        """For the ranks: where GPUs are asked for, training must not go on in silence on a CPU."""
        return "cuda" if self.gpus_per_node and config.train.device == "auto" else None

    def spec(self, name: str, folder: Path) -> JobSpec:
        """The training job, as sbatch is told of it."""
        return JobSpec(
            name=name,
            folder=folder,
            profile=self.profile,
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            ranks_per_node=self.ranks_per_node,
            time=self.time,
            after=self.after,
            at_once=self.at_once,
        )

    def options(self) -> list[str]:
        """Of `llmtrain submit`, with which one run is asked for in the same way; `after` is over by then."""
        each = ["--gpus-per-node", str(self.gpus_per_node)]
        if not self.gpus_per_node:
            each = ["--ranks-per-node", str(self.ranks_per_node)]
        words = ["--cluster", str(self.profile_file.absolute()), "--nodes", str(self.nodes), *each]
        words += ["--time", self.time] if self.time else []
        if self.max_restarts != Rules.max_restarts:
            words += ["--max-restarts", str(self.max_restarts)]
        return [*words, *(["--hang-after", f"{self.hang_s:g}"] if self.hang_s != Rules.hang_s else [])]

    def on_node(self, words: Sequence[str], config: RunConfig) -> list[str]:
        """What trains on each node where there is no submitit: the words behind `python -m launcher`."""
        device = self.device(config)
        return [
            "node", "--ranks", str(self.ranks_per_node), *(["--device", device] if device else []),
            "--max-restarts", str(self.max_restarts), "--hang-after", f"{self.hang_s:g}",
            "--lead", str(self.profile.signal_s), *([] if self.profile.requeue else ["--no-requeue"]), *words,
        ]  # fmt: skip


def order_of(
    cluster: Path | None, nodes: int, gpus_per_node: int | None, ranks_per_node: int | None, time: str
) -> Order:
    """What a job has on that cluster.

    Args:
        gpus_per_node: None for all that the profile says, or none where ranks are asked for.
        ranks_per_node: of nodes without GPUs.
        time: limit; empty for the profile's.

    Raises:
        ConfigError: options contradict each other or the profile.
    """
    if cluster is None:
        raise ConfigError(
            ["--cluster is missing: the file that describes your cluster; 'llmtrain doctor --cluster' drafts one"]
        )
    _check_time(time)
    profile = load_profile(cluster)
    if gpus_per_node is None:
        gpus_per_node = 0 if ranks_per_node is not None else profile.gpus_per_node
    if gpus_per_node and ranks_per_node is not None:
        raise ConfigError(["--ranks-per-node is for nodes without GPUs: else there is one rank per GPU; leave it out"])
    return Order(profile, cluster, nodes, gpus_per_node, gpus_per_node or ranks_per_node or 1, time)


def _check_time(limit: str) -> None:
    try:
        walltime.seconds(limit or "0")
    except ValueError as error:
        raise ConfigError([f"--time {error} (minutes, hours:minutes:seconds, days-hours:minutes:seconds)"]) from None
