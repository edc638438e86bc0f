"""A first profile of a cluster, from what SLURM says of it: a person fills in the rest."""

import json
import os
import re
import shlex
from pathlib import Path

from launcher import display, walltime
from launcher.checks.places import find_reach
from launcher.cluster import Profile
from launcher.slurm.client import call
from launcher.slurm.partitions import NodeGroup, Partition, partitions
from llmtrain.errors import ConfigError, SlurmError
from llmtrain.wording import count, listed

_DAY_S = 86_400.0
_QUICK_S = 5.0
_FOLDERS = ("SCRATCH", "WORK", "PROJECT", "HOME")
"""Variables that clusters give their large folders."""


def draft_profile(partition: str | None, file: Path | None) -> str:
    """YAML that `load_profile` reads, for the partition that is named; by default one with GPUs.

    Args:
        file: where it will lie, for its comments; None: not known.

    Raises:
        ConfigError: there is no such partition.
        SlurmError: SLURM is not here or does not answer.
    """
    known = partitions()
    chosen = _choose(partition, known)
    name, path = _cluster_name(), file or "configs/clusters/NAME.yaml"
    lines = [
        f"# Profile of the cluster {name}, drafted by `llmtrain doctor --cluster`.",
        "# FILL IN marks what SLURM does not say.",
        "#",
        "# Partitions:",
        *(f"#   {_describe(each)}" for each in known.values()),
        "#",
        f"# Look       llmtrain plan CONFIG --cluster {path} --nodes 2     (the batch script; submits nothing)",
        f"# Command    llmtrain submit CONFIG --cluster {path} --nodes 2",
        "",
        f"name: {_text(name)}",
        f"partition: {_text(chosen.name)}",
        *_account_lines(chosen),
        "",
        *_limit_lines(chosen),
        "",
        *_node_lines(chosen),
        "",
        *_shared_lines(),
        "",
        "# Before Python starts, on every node. By default the Python that submits runs there too.",
        f"modules: []                    # FILL IN what `module load` needs{_loaded_modules()}",
        "# venv: /path/that/all/nodes/see/.venv",
        "# container: /path/to/image.sqsh",
        "environment: {}                # no access tokens: run 'hf auth login' once, jobs find that login",
        "",
        "# mail_user: you@example.org",
        *_side_lines(known),
    ]
    return "\n".join(lines) + "\n"


def _choose(named: str | None, known: dict[str, Partition]) -> Partition:
    """As named; else the default, unless it has no GPUs and another has."""
    if named is not None:
        if named not in known:
            raise ConfigError([f"--partition {named}: no such partition; there are {listed(known, most=20)}"])
        return known[named]
    if not known:
        raise ConfigError(["SLURM shows you no partition here"])
    open_ones = [each for each in known.values() if each.state == "UP" and each.num_nodes] or list(known.values())
    return max(open_ones, key=lambda each: (each.gpus_per_node > 0, each.is_default, each.num_nodes))


def _describe(partition: Partition) -> str:
    limit = "no time limit" if partition.limit_s is None else f"up to {display.duration(partition.limit_s)}"
    alike: dict[tuple[int, int, int, str], int] = {}
    for group in partition.nodes:
        key = (group.gpus, group.cpus, group.memory_mb, group.features)
        alike[key] = alike.get(key, 0) + group.count
    nodes = "; ".join(_describe_nodes(number, *key) for key, number in alike.items()) or "no nodes"
    default = " (default)" if partition.is_default else ""
    state = "" if partition.state == "UP" else f", {partition.state}"
    accounts = f", for {listed(partition.accounts)} alone" if partition.accounts else ""
    return f"{partition.name}{default}: {nodes}; {limit}{state}{accounts}"


def _describe_nodes(number: int, gpus: int, cpus: int, memory_mb: int, features: str) -> str:
    having = f"{gpus} GPUs, {cpus} CPUs, {memory_mb / 1024:.0f} GB"
    return f"{count(number, 'node')} with {having}{f' [{features}]' if features else ''}"


def _account_lines(partition: Partition) -> list[str]:
    mine = [name for name in _own_accounts() if not partition.accounts or name in partition.accounts]
    if len(mine) == 1:
        return [f"account: {_text(mine[0])}"]
    known = mine or list(partition.accounts)
    hint = f"one of {', '.join(known)}" if known else "who pays, if your cluster asks"
    return [f"# account: FILL IN               # {hint}"]


def _own_accounts() -> list[str]:
    """As sacctmgr knows them, where accounts are kept."""
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={os.environ.get('USER', '')}"]
    try:
        said = call([*command, "format=account"], _QUICK_S)
    except SlurmError:
        return []  # many clusters keep none
    return sorted({line.strip() for line in said.splitlines() if re.fullmatch(r"[\w.-]+", line.strip())})


def _limit_lines(partition: Partition) -> list[str]:
    limit_s = min(_DAY_S, partition.limit_s or _DAY_S)
    most = "" if partition.limit_s is None else f"at most {display.duration(partition.limit_s)}; "
    lines = [f"time: {walltime.clock(limit_s)}     # {most}longer runs save, queue again and go on"]
    if limit_s <= 2 * Profile(gpus_per_node=0).signal_s:  # it would leave little to train in
        lines.append(f"signal_s: {max(30, int(limit_s / 4))}")
    return lines


def _node_lines(partition: Partition) -> list[str]:
    gpus = partition.gpus_per_node
    group = max(partition.nodes, key=lambda each: (each.gpus == gpus, each.count), default=NodeGroup("", 0, 1, 0, 0))
    cpus = f"cpus_per_gpu: {max(1, group.cpus // gpus)}" if gpus else f"cpus_per_node: {group.cpus}"
    others = sorted({each.gpus for each in partition.nodes} - {gpus})
    lines = [f"gpus_per_node: {gpus}" + (f"     # other nodes have {listed(others)}" if others else "")]
    if gpus:
        lines.append("# gpu_memory_gb: FILL IN     # of one GPU, for `llmtrain plan`")
    lines.append(cpus)
    lines.append(f"# mem: {group.memory_mb}M     # all that a node has; without it the cluster's own rule counts")
    if features := sorted({name for each in partition.nodes for name in each.features.split(",") if name}):
        lines.append(f"# constraint: {features[0]}     # to choose among nodes: {', '.join(features)}")
    return [
        *lines,
        "# exclusive: true     # whole nodes",
        "# nodes_at_least: 1     # go on with as few after a failure",
    ]


def _shared_lines() -> list[str]:
    """Large folders that this cluster names and whose file system all nodes see."""
    values = {name: os.environ.get(name, "") for name in _FOLDERS}
    found = [name for name, value in values.items() if value and find_reach(Path(value), [])[0] == "shared"]
    if found:
        head = "shared:     # what all nodes see: run folders and shards must lie there"
        return [head, *(f"  - ${name}" for name in found)]
    return ["shared: []     # FILL IN what all nodes see, e.g. [/scratch/$USER]: run folders and shards must lie there"]


def _loaded_modules() -> str:
    loaded = [name for name in os.environ.get("LOADEDMODULES", "").split(":") if name]
    return f"; loaded here: {shlex.join(loaded)}" if loaded else ""


def _side_lines(known: dict[str, Partition]) -> list[str]:
    """Where jobs without GPUs go, if there is such a place."""
    for partition in known.values():
        if partition.num_nodes and not partition.gpus_per_node and partition.state == "UP":
            where = f"  partition: {_text(partition.name)}"
            return ["", "service:     # submit --service-job", where, "shard:     # shard --submit", where]
    return []


def _text(name: str) -> str:
    """As YAML, in quotes where it would be read as a number or a truth value."""
    plain = re.fullmatch(r"[A-Za-z][\w.-]*", name) and name.lower() not in ("true", "false", "null")
    return name if plain else json.dumps(name)


def _cluster_name() -> str:
    found = re.search(r"^ClusterName\s*=\s*([\w.-]+)", call(["scontrol", "show", "config"]), re.MULTILINE)
    return found[1] if found else "cluster"
