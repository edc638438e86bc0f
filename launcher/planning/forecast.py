"""How often a run saves, what that takes on disk and on the way to the Hub, and how long the run takes."""

import math
from dataclasses import dataclass

from llmtrain import jsonl, ledger
from llmtrain.batches import BatchPlan
from llmtrain.config.schema import RunConfig
from llmtrain.memory import Sizes
from llmtrain.rundir import RunDir


def count_saves(config: RunConfig, plan: BatchPlan, rows: int | None) -> int:
    """Checkpoints of a run that is not interrupted, its last one included.

    Args:
        rows: of the training split; None where that is not known yet (checkpoint.every_epochs then counts for nothing).
    """
    every, epochs = config.checkpoint.every_steps, config.checkpoint.every_epochs
    steps = {plan.total_steps}
    if every is not None:
        steps.update(range(every, plan.total_steps, every))
    if epochs is not None and rows is not None:
        apart = epochs * rows / plan.global_batch_size
        passes = range(1, int(plan.total_steps / apart) + 1)
        steps.update(min(plan.total_steps, math.ceil(number * apart - 1e-9)) for number in passes)
    return len(steps)


def most_on_disk(config: RunConfig, plan: BatchPlan, saves: int) -> int:
    """Checkpoints that lie in the run folder at the same time, the one that is being written included."""
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best
    if config.checkpoint.keep_every is not None:
        kept += plan.total_steps // config.checkpoint.keep_every
    return min(saves, kept + 1)


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub."""

    each_bytes: float
    """Of one checkpoint."""
    all_bytes: float
    """Of all, if none has a byte in common with another."""


def upload_volume(config: RunConfig, sizes: Sizes, saves: int) -> Upload | None:
    """None where nothing is uploaded. The best weights on `main` are there already: they are not sent again."""
    if config.hub.repo is None:
        return None
    each = sizes.checkpoint_bytes(config) if config.hub.optimizer_state else sizes.model_bytes(config)
    return Upload(each, each * saves)


def tokens_of(config: RunConfig, plan: BatchPlan, steps: int | None = None) -> int:
    """That so many steps read (by default all), padding included."""
    return (plan.total_steps if steps is None else steps) * plan.global_batch_size * config.model.context


@dataclass(frozen=True)
class Pace:
    tokens_per_s: float
    """Padding included, with evaluations and saves where it was measured."""
    told: str
    """Where that is from."""


def find_pace(config: RunConfig, plan: BatchPlan, told: float | None) -> Pace | None:
    """As told; else as the last start of the same run went; None where it never started."""
    if told is not None:
        return Pace(told, "as you say")
    run = RunDir(config.run.folder)
    last = jsonl.last_record(run.metrics)
    starts = [event for event in ledger.events(run) if event.kind in ("started", "resumed") and event.step is not None]
    if last is None or not starts:
        return None
    steps = int(last["step"]) - (starts[-1].step or 0)
    seconds = run.metrics.stat().st_mtime - starts[-1].time
    if steps <= 0 or seconds <= 0:
        return None
    return Pace(tokens_of(config, plan, steps) / seconds, f"as in the last start of {run.path}")


def num_jobs(seconds: float, job_s: float) -> int:
    """Jobs that a run is spread over, each of which trains so long."""
    return max(1, math.ceil(seconds / job_s))
