"""How often a run saves, what that takes on disk and on the way to the Hub, and how long the run takes."""

import math
from dataclasses import dataclass
from typing import Any

from llmtrain import jsonl, ledger, origin
from llmtrain.batches import ANY_ROWS, BatchPlan, plan_batches
from llmtrain.config.load import Origins, load_config, with_precision
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.memory import Sizes
from llmtrain.resume import settled_precision
from llmtrain.rundir import RunDir

_LISTED = 5_000_000
"""Saves by passes that are looked at one by one, for those that fall on a save by steps; some seconds."""


def count_saves(config: RunConfig, plan: BatchPlan, rows: int | None) -> int:
    """Checkpoints of a run that is not interrupted, its last one included.

    Args:
        rows: of the training split; None where that is not known yet (checkpoint.every_epochs then counts for nothing).
    """
    every, epochs, last = config.checkpoint.every_steps, config.checkpoint.every_epochs, plan.total_steps
    saves = 1 if every is None else (last - 1) // every + 1
    if epochs is None or rows is None:
        return saves
    apart = epochs * rows / plan.global_batch_size
    if apart <= 1:
        return last
    others = int(last / apart)
    if others <= _LISTED:
        after = (math.ceil(number * apart - 1e-9) for number in range(1, others + 1))
        others = sum(step < last and (every is None or step % every > 0) for step in after)
    return min(last, saves + others)


def most_on_disk(config: RunConfig, plan: BatchPlan, saves: int) -> int:
    """Checkpoints that lie in the run folder at the same time, the one that is being written included."""
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best
    if config.checkpoint.keep_every is not None:
        kept += plan.total_steps // config.checkpoint.keep_every
    return min(saves, kept + 1)


@dataclass(frozen=True)
class UploadVolume:
    """What goes to the Hub."""

    each_bytes: float
    """Of one checkpoint."""
    all_bytes: float
    """Of all, if none has a byte in common with another."""


def upload_volume(config: RunConfig, sizes: Sizes, saves: int) -> UploadVolume | None:
    """None where nothing is uploaded. The best weights on `main` are there already: they are not sent again."""
    if config.hub.repo is None:
        return None
    each = sizes.checkpoint_bytes(config) if config.hub.optimizer_state else sizes.model_bytes(config)
    return UploadVolume(each, each * saves)


@dataclass(frozen=True)
class Pace:
    tokens_per_s: float
    """With evaluations and saves where it was measured."""
    source: str
    """Where that is from."""


def find_pace(
    config: RunConfig, plan: BatchPlan, given: float | None, tokens_per_row: float, ranks: int, device: str
) -> Pace | str:
    """As given; else as the last start of the same run went, if that computed the same; else why it is not known.

    Args:
        tokens_per_row: counts padding or not, as the pace then does.
        device: cuda or cpu.
    """
    if given is not None:
        return Pace(given, "as you say")
    run = RunDir(config.run.folder)
    last = jsonl.last_record(run.metrics)
    start = ledger.last_event(run, ledger.STARTS)
    steps = 0 if last is None or start is None else int(last["step"]) - (start.step or 0)
    seconds = run.metrics.stat().st_mtime - start.time if start is not None and steps > 0 else 0.0
    if seconds <= 0:
        return "not known: give --tokens-per-s, or start the run: its pace is then taken"
    if (other := _other_than(run, config, plan, ranks, device)) is not None:
        return f"not known for these settings: {other}; give --tokens-per-s"
    # The same data and the same batch, so these are the tokens that its steps read.
    return Pace(steps * plan.global_batch_size * tokens_per_row / seconds, f"as in the last start of {run.path}")


def _other_than(run: RunDir, config: RunConfig, plan: BatchPlan, ranks: int, device: str) -> str | None:
    """What the run's last start had that these settings have not, of what decides how long a step takes."""
    started = origin.read(run)
    if started.ranks is None:
        return f"{run.path} does not say on how many ranks it was started last (an older version did not note it)"
    try:
        old, _ = load_config(run.config)
        old_plan = plan_batches(old, Origins(), started.ranks, ANY_ROWS)
    except UserError:
        return f"{run.config}, of its last start, cannot be read by this version"
    config = with_precision(config, settled_precision(config, old, is_bf16_fast=False))  # in which it would go on
    if device == "cpu" and config.train.device != "cpu" and started.device == "mps":
        device = "mps"  # a plan counts Apple's GPU as the CPU, whose memory it has
    before = {"ranks": started.ranks, "device": started.device, **_decisive(old, old_plan)}
    now = {"ranks": ranks, "device": device, **_decisive(config, plan)}
    others = [name if isinstance(had, dict) else f"{name}={had}" for name, had in before.items() if had != now[name]]
    return f"the last start of {run.path} had other settings ({', '.join(others)})" if others else None


def _decisive(config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    return {
        "model": config.model.model_dump(),
        "data": config.data.model_dump(exclude={"dir", "verify"}),
        "train.global_batch_size": plan.global_batch_size,
        "train.micro_batch_size": plan.micro_batch_size,
        "train.precision": config.train.precision,
        "train.compile": config.train.compile,
        "train.activation_checkpointing": config.train.activation_checkpointing,
        "optim.kind": config.optim.kind,
        "strategy": config.strategy.model_dump(exclude={"timeout_s"}),
    }


def num_jobs(seconds: float, job_s: float) -> int:
    """Jobs that a run is spread over, each of which trains so long."""
    return max(1, math.ceil(seconds / job_s))
