"""What `llmtrain submit` does with its options: check, then show the script or queue the job."""

import shlex
from pathlib import Path

from rich.console import Console

from launcher import walltime
from launcher.cluster import load_profile
from launcher.submitting import submit
from launcher.submitting.submit import Order
from llmtrain.errors import ConfigError


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
    return Order(profile, nodes, gpus_per_node, gpus_per_node or ranks_per_node or 1, time, profile_file=cluster)


def _check_time(limit: str) -> None:
    try:
        walltime.seconds(limit or "0")
    except ValueError as error:
        raise ConfigError([f"--time {error} (minutes, hours:minutes:seconds, days-hours:minutes:seconds)"]) from None


def act(words: list[str], order: Order, sweep: list[str], service_job: bool, dry_run: bool, plain: bool) -> None:
    """Show the script, or queue the job and say how to follow it."""
    if plain and not dry_run:
        raise ConfigError(["--plain: it goes with --dry-run, which submits nothing"])
    if dry_run and service_job:
        raise ConfigError(["--service-job: --dry-run shows the script of training alone; leave it out"])
    if order.at_once is not None and not sweep:
        raise ConfigError(["--at-once: it is for the runs of a sweep, and there is no --sweep; leave it out"])
    if dry_run:
        print(submit.preview(words, order, sweep, plain), end="")
        return
    records = submit.submit(words, order, sweep, service_job, Console())
    runs = submit.plan_runs(words, sweep)
    for record in records:
        print(f"job {record.job_id}  {record.kind}")
    folder = runs[0].run.path if not sweep else runs[0].run.path.parent
    print(f"follow it with: llmtrain status {shlex.quote(str(folder))}")
    if sweep:
        print(f"compare its {len(runs)} runs with: llmtrain compare {shlex.quote(str(folder))}")


def act_shards(words: list[str], cluster: Path | None, parts: int | None) -> None:
    """Queue sharding, and say how to train on it."""
    if cluster is None:
        raise ConfigError(["--submit needs --cluster: the file that describes your cluster"])
    records = submit.submit_shards(words, load_profile(cluster), parts, Console())
    first, *arrays, last = records
    print(f"job {first.job_id}  prepare: measure, train the tokenizer")
    print(f"job {arrays[0].job_id.split('_')[0]}  {len(arrays)} parts")
    print(f"job {last.job_id}  join the parts")
    print(f"train on it with: llmtrain submit ... --after {last.job_id}")
