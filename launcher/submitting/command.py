"""What `llmtrain submit` does, and says."""

import shlex
from pathlib import Path

from rich.console import Console

from launcher.cluster import load_profile
from launcher.submitting import submit
from launcher.submitting.order import Order
from llmtrain.config import load_to_start
from llmtrain.config.load import split_settings
from llmtrain.errors import ConfigError


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
    for record in records:
        print(f"job {record.job_id}  {record.kind}")
    folder = shlex.quote(str(load_to_start(*split_settings(words))[0].run.folder))
    print(f"follow it with: llmtrain status {folder}")
    if sweep:
        num_runs = sum(record.kind == "train" for record in records)
        print(f"compare its {num_runs} runs with: llmtrain compare {folder}")


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
