"""From the global batch that the user sets to micro-batches and accumulation, and to a run's length."""

import math
from dataclasses import dataclass

from llmtrain.config.load import Origins
from llmtrain.config.schema import OptimSection, RunConfig
from llmtrain.errors import ConfigError, TooLittleData
from llmtrain.wording import count

_AUTO_MICRO_BATCH_TOKENS = 16_384
_DEFAULT_STEPS = 300
ANY_ROWS = 2**62
"""For `plan_batches` before the number of rows is known: enough for every batch."""


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step is cut up: global = micro x accumulation x ranks."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    total_steps: int


def plan_batches(config: RunConfig, origins: Origins, world_size: int, num_rows: int) -> BatchPlan:
    """The plan for `world_size` ranks and a training split of `num_rows` rows.

    Raises:
        ConfigError: the batch does not divide; says what would.
        TooLittleData: the split has fewer rows than one step takes.
    """
    batch = config.train.global_batch_size
    if batch % world_size:
        near = sorted({max(1, batch // world_size) * world_size, -(-batch // world_size) * world_size})
        raise ConfigError(
            [
                f"{origins.describe(config, 'train.global_batch_size')}: {world_size} ranks do not divide it; "
                f"use {' or '.join(map(str, near))}, or {_ranks(batch)} ranks"
            ]
        )
    per_rank = batch // world_size
    fitting = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
    micro = config.train.micro_batch_size
    if micro is None:
        most = max(1, _AUTO_MICRO_BATCH_TOKENS // config.model.context)
        micro = max(m for m in fitting if m <= most)
    if micro not in fitting:
        ranks = count(world_size, "rank")
        raise ConfigError(
            [
                f"{origins.describe(config, 'train.micro_batch_size')}: {ranks} x {micro} does not divide "
                f"global_batch_size={batch}; use one of {', '.join(map(str, fitting))}"
            ]
        )
    if num_rows < batch:
        raise TooLittleData(
            f"the training split has {num_rows} rows of {config.model.context} tokens, fewer than one optimizer step "
            f"takes ({origins.describe(config, 'train.global_batch_size')}); use a smaller batch, a shorter "
            "model.context, or more text"
        )
    return BatchPlan(batch, micro, per_rank // micro, _total_steps(config, num_rows))


def nodes_that_train(global_batch_size: int, ranks: int, num_nodes: int) -> int:
    """The most of `num_nodes` nodes, with `ranks` each, that the batch divides among; all where none does.

    After a crash a job may be requeued on any number of nodes from `nodes_at_least` on; every step must see the same
    samples all the same.
    """
    fitting = [number for number in range(1, num_nodes + 1) if global_batch_size % (number * ranks) == 0]
    return max(fitting, default=num_nodes)


def warmup_problem(optim: OptimSection, total_steps: int) -> str | None:
    """What the learning rate of a run of that length never comes to, in words; None where all is as set."""
    schedule, told = optim.schedule, f"{optim.schedule.warmup_steps:,} of {total_steps:,} steps"
    if schedule.warmup_steps > total_steps:
        return (
            f"{told}: the learning rate ends at {optim.lr * total_steps / schedule.warmup_steps:.3g} and never reaches "
            f"optim.lr={optim.lr:g}; set optim.schedule.warmup_steps={total_steps // 10}, say, or train for longer"
        )
    decay_begins = total_steps - max(1.0, schedule.decay_share * total_steps)
    if schedule.kind == "wsd" and schedule.min_lr_ratio < 1 and schedule.warmup_steps - 1 > decay_begins:
        return (
            f"{told}: the decay of optim.schedule.kind=wsd begins after step {int(decay_begins) + 1:,}, before the "
            f"learning rate has reached optim.lr={optim.lr:g}, and it falls suddenly after the warm-up; set a shorter "
            "optim.schedule.warmup_steps or optim.schedule.decay_share, or train for longer"
        )
    return None


def _total_steps(config: RunConfig, num_rows: int) -> int:
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return math.ceil(train.tokens / (train.global_batch_size * config.model.context))
    if train.epochs is not None:
        return max(1, math.ceil(train.epochs * num_rows / train.global_batch_size - 1e-9))
    return _DEFAULT_STEPS


def _ranks(batch: int) -> str:
    return ", ".join(str(r) for r in range(1, min(batch, 64) + 1) if batch % r == 0)
