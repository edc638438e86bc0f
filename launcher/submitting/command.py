"""What `llmtrain submit` does with its options: check, then show the script or queue the job."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launcher import walltime
from launcher.cluster import load_profile
from launcher.slurm.limits import Request
from launcher.submitting import dependencies, submit
from launcher.submitting.submit import Order
from llmtrain.errors import ConfigError


@dataclass(frozen=True)
class Wishes:
    """The command line."""

    words: list[str]
    cluster: Path | None
    nodes: int
    gpus_per_node: int | None
    ranks_per_node: int | None
    time: str
    after: str
    sweep: list[str]
    service_job: bool
    max_restarts: int
    hang_s: float


def order_of(wishes: Wishes) -> Order:
    """Raises ConfigError where options contradict each other or the profile."""
    if wishes.cluster is None:
        raise ConfigError(
            ["--cluster is missing: the file that describes your cluster; 'llmtrain doctor --cluster' drafts one"]
        )
    _check_time(wishes.time)
    dependencies.parse(wishes.after)
    profile = load_profile(wishes.cluster)
    gpus = wishes.gpus_per_node
    if gpus is None:
        gpus = 0 if wishes.ranks_per_node is not None else profile.gpus_per_node
    if gpus and wishes.ranks_per_node is not None:
        raise ConfigError(["--ranks-per-node is for nodes without GPUs: else there is one rank per GPU; leave it out"])
    return Order(
        profile=profile,
        request=Request(wishes.nodes, gpus, gpus or wishes.ranks_per_node or 1, wishes.time or None),
        after=wishes.after,
        max_restarts=wishes.max_restarts,
        hang_s=wishes.hang_s,
    )


def _check_time(limit: str) -> None:
    try:
        walltime.seconds(limit or "0")
    except ValueError as error:
        raise ConfigError([f"--time {error} (minutes, hours:minutes:seconds, days-hours:minutes:seconds)"]) from None


def act(wishes: Wishes, dry_run: bool, plain: bool) -> None:
    """Show the script, or queue the job and say how to follow it."""
    if plain and not dry_run:
        raise ConfigError(["--plain: it goes with --dry-run, which submits nothing"])
    if dry_run and wishes.service_job:
        raise ConfigError(["--service-job: --dry-run shows the script of training alone; leave it out"])
    order = order_of(wishes)
    if dry_run:
        print(submit.preview(wishes.words, order, wishes.sweep, plain), end="")
        return
    records = submit.submit(wishes.words, order, wishes.sweep, wishes.service_job, Console())
    runs = submit.plan_runs(wishes.words, wishes.sweep)
    for record in records:
        print(f"job {record.job_id}  {record.kind}")
    folder = runs[0].run.path if not wishes.sweep else runs[0].run.path.parent
    print(f"follow it with: llmtrain status {shlex.quote(str(folder))}")
    if wishes.sweep:
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
