"""The partitions of a cluster, as scontrol and sinfo tell of them."""

import re
from dataclasses import dataclass

from launcher.slurm.client import call
from launcher.walltime import seconds

_BACK_SOON = ("allocated", "completing", "idle", "mixed", "planned", "reserved", "blocked", "rebooting")


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition that are alike."""

    state: str
    count: int
    cpus: int
    memory_mb: int
    gpus: int
    features: str = ""

    @property
    def is_up(self) -> bool:
        """Not down, drained or failed; it may be busy."""
        return self.state.strip("*~#!%$@^-").startswith(_BACK_SOON)


@dataclass(frozen=True)
class Partition:
    name: str
    is_default: bool
    state: str
    """UP, DOWN (jobs wait), DRAIN or INACTIVE (jobs are refused)."""
    limit_s: float | None
    """Longest time limit of a job; None: there is none."""
    max_nodes: int | None
    accounts: tuple[str, ...]
    """The only ones that may use it; empty: all may."""
    denied_accounts: tuple[str, ...]
    nodes: tuple[NodeGroup, ...]

    @property
    def num_nodes(self) -> int:
        return sum(group.count for group in self.nodes)

    @property
    def gpus_per_node(self) -> int:
        """Of the nodes that have most."""
        return max((group.gpus for group in self.nodes), default=0)

    def num_nodes_with(self, gpus: int, up: bool = False) -> int:
        """Nodes with at least so many GPUs, and of those the ones that are up."""
        return sum(group.count for group in self.nodes if group.gpus >= gpus and (group.is_up or not up))


def partitions() -> dict[str, Partition]:
    """All that this user can see, by name.

    Raises:
        SlurmError: SLURM is not here or does not answer.
    """
    groups: dict[str, list[NodeGroup]] = {}
    form = "%R|%T|%D|%c|%m|%G|%f"
    for line in call(["sinfo", "--noheader", "--all", "--exact", f"--format={form}"]).splitlines():
        if line.count("|") < form.count("|"):
            continue  # a notice of the site's
        name, state, count, cpus, memory, gres, features = line.split("|", 6)
        if int(count):  # a partition without nodes is listed with none
            group = NodeGroup(state, int(count), int(cpus), int(memory), _gpus(gres), features.replace("(null)", ""))
            groups.setdefault(name, []).append(group)
    found: dict[str, Partition] = {}
    for line in call(["scontrol", "--oneliner", "--all", "show", "partition"]).splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if name := fields.get("PartitionName"):
            found[name] = Partition(
                name=name,
                is_default=fields["Default"] == "YES",
                state=fields["State"],
                limit_s=seconds(fields["MaxTime"]),
                max_nodes=None if fields["MaxNodes"] == "UNLIMITED" else int(fields["MaxNodes"]),
                accounts=_names(fields.get("AllowAccounts", "ALL")),
                denied_accounts=_names(fields.get("DenyAccounts", "ALL")),
                nodes=tuple(groups.get(name, ())),
            )
    return found


def _gpus(gres: str) -> int:
    """Of "gpu:4", "gpu:a100:4" or "gpu:a100:4(S:0-1)"; of several kinds, with commas between them, all together."""
    total = 0
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *rest = entry.split(":")
        if kind == "gpu":
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def _names(listed: str) -> tuple[str, ...]:
    return () if listed in ("ALL", "(null)", "N/A") else tuple(listed.split(","))
