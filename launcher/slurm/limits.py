"""What is asked of a cluster against what its partitions have.

sbatch takes much that never starts: more nodes or time than a partition gives, and an account that may not use it,
leave a job waiting for ever. So these are compared before.
"""

import difflib

from launcher import display
from launcher.findings import Finding, doubtful, fine, wrong
from launcher.slurm.batch import JobSpec
from launcher.slurm.partitions import Partition
from llmtrain.wording import listed


def check_limits(spec: JobSpec, known: dict[str, Partition]) -> list[Finding]:
    """Of several partitions that are named one that fits is enough: SLURM takes the first that is free."""
    named = spec.partition
    default = next((name for name, partition in known.items() if partition.is_default), None)
    too_many: list[Finding] = []
    if spec.side is None and spec.gpus_per_node > spec.profile.gpus_per_node:
        has = f"gpus_per_node={spec.profile.gpus_per_node} (profile {spec.profile.name})"
        too_many = [wrong("profile", f"{spec.gpus_per_node} GPUs per node are asked for, and a node has {has}")]
    if named is None and default is None:
        return [*too_many, wrong("partition", f"none is named, and there is no default; use one of {_listed(known)}")]
    names = named.split(",") if named else [str(default)]
    unknown = [_unknown(name, known, spec.profile.name) for name in names if name not in known]
    each = [_check(spec, known[name]) for name in names if name in known]
    fitting = [found for found in each if not any(finding.severity == "error" for finding in found)]
    return [*too_many, *unknown, *(fitting[0] if fitting else [finding for found in each for finding in found])]


def _unknown(name: str, known: dict[str, Partition], profile: str) -> Finding:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    return wrong("partition", f"{name} (profile {profile}): no such partition; {meant}There are {_listed(known)}")


def _listed(known: dict[str, Partition]) -> str:
    return listed((f"{name} (default)" if each.is_default else name for name, each in known.items()), most=20)


def _check(spec: JobSpec, partition: Partition) -> list[Finding]:
    return [
        _check_state(partition),
        _check_nodes(spec, partition),
        *_check_gpus(spec, partition),
        _check_time(spec, partition),
        *_check_account(spec, partition),
    ]


def _check_state(partition: Partition) -> Finding:
    default = ", the default" if partition.is_default else ""
    match partition.state:
        case "UP":
            return fine("partition", f"{partition.name}{default}, nodes: {partition.num_nodes}")
        case "DOWN":
            return doubtful("partition", f"{partition.name} is down: the job waits until it is up again")
        case state:
            return wrong("partition", f"{partition.name} takes no jobs: its state is {state}")


def _check_nodes(spec: JobSpec, partition: Partition) -> Finding:
    most = min(partition.num_nodes, partition.max_nodes or partition.num_nodes)
    least = min(spec.nodes, spec.profile.nodes_at_least or spec.nodes)  # with fewer it can start as well
    if least > most:
        limit = "" if most == partition.num_nodes else f", of which a job may have {most}"
        return wrong("nodes", f"{spec.nodes} are asked for; {partition.name} has {partition.num_nodes}{limit}")
    ready = partition.num_nodes_with(min(spec.gpus, partition.gpus_per_node), up=True)
    if least > ready:
        up = f"{ready} of {partition.num_nodes} in {partition.name} are up"
        return doubtful("nodes", f"{spec.nodes} are asked for, and {up}: the job waits for the others")
    return fine("nodes", f"{spec.nodes} of {partition.num_nodes} in {partition.name}")


def _check_gpus(spec: JobSpec, partition: Partition) -> list[Finding]:
    asked, most = spec.gpus, partition.gpus_per_node
    if asked > most:
        have = f"a node in {partition.name} has {most}" if most else f"nodes in {partition.name} have none"
        return [wrong("GPUs", f"{asked} per node are asked for; {have}")]
    if not asked:
        return []
    having = partition.num_nodes_with(asked)
    if having < min(spec.nodes, spec.profile.nodes_at_least or spec.nodes):
        return [wrong("GPUs", f"{having} nodes in {partition.name} have {asked} GPUs, {spec.nodes} are asked for")]
    return [fine("GPUs", f"{asked} of {most} on each node")]


def _check_time(spec: JobSpec, partition: Partition) -> Finding:
    asked, limit_s, most_s = spec.limit, spec.minutes * 60, partition.limit_s
    most = "no limit" if most_s is None else f"{partition.name} allows {display.duration(most_s)}"
    if most_s is not None and limit_s > most_s:
        return wrong(
            "time limit", f"{asked} is too long: {most}; a run saves before its limit, queues again and goes on"
        )
    signal_s = spec.profile.signal_s
    if spec.side is None and limit_s <= signal_s:
        return wrong("time limit", f"{asked} is no longer than signal_s={signal_s}: the job would save at once")
    return fine("time limit", f"{asked} ({most})")


def _check_account(spec: JobSpec, partition: Partition) -> list[Finding]:
    profile, allowed, denied = spec.profile, partition.accounts, partition.denied_accounts
    if profile.account is None and not allowed:
        return []
    if profile.account is None:
        unnamed = f"none is named, and {partition.name} is for {listed(allowed)} alone"
        return [doubtful("account", f"{unnamed}: your default account must be one of them")]
    if (allowed and profile.account not in allowed) or profile.account in denied:
        who = f"it is for {listed(allowed)} alone" if allowed else "it is refused there"
        return [wrong("account", f"{profile.account} (profile {profile.name}) may not use {partition.name}: {who}")]
    return [fine("account", profile.account)]
