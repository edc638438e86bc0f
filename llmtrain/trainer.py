"""The loop. Flat, no callbacks; each side effect is a line that you can see."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmtrain import heartbeat
from llmtrain.batches import BatchPlan
from llmtrain.config.schema import RunConfig
from llmtrain.data import Loader
from llmtrain.errors import NotFinite
from llmtrain.manifest import Manifest, TrainState
from llmtrain.metrics import Meter
from llmtrain.optim import learning_rate
from llmtrain.saver import Saver
from llmtrain.stop import StopFlag
from llmtrain.strategies.interface import Strategy
from llmtrain.world import World


@dataclass
class Parts:
    """What `train` drives; put together by `assemble.build`."""

    config: RunConfig
    plan: BatchPlan
    world: World
    strategy: Strategy
    loader: Loader
    meter: Meter
    stop: StopFlag
    rows_per_epoch: int
    fingerprint: str
    evaluate: Callable[[TrainState, bool], dict[str, float]]
    """Collective. (state, with_task) -> held-out scores by name; "loss" decides which checkpoint is best, `with_task`
    adds those of evaluate.task."""
    write_sample: Callable[[TrainState], None]
    """Generate text and write it down (rank 0)."""
    saver: Saver


def train(parts: Parts, state: TrainState) -> TrainState:
    """Train from `state` to the end of the plan, or until a stop is agreed; returns where it ended.

    Collective: every rank runs the same iterations. Each branch around a collective depends on the
    configuration, on the step, or on a sum over all ranks. Host syncs are in what logs, evaluates, samples and saves;
    a step without these has none (but under ZeRO-2: DeepSpeed's own, in `update`).

    Raises:
        NotFinite: nothing was published since the last good checkpoint.
        DiskFull: a checkpoint could not be written; the earlier ones are untouched.
    """
    config, strategy, meter = parts.config, parts.strategy, parts.meter
    if state.step == 0 and 0 in config.evaluate.also_at:
        evaluate(parts, state, with_task=True)
        meter.restart_clock()
    heartbeat.at("data", state.step)
    first_step = state.step
    for data in parts.loader.steps(state.samples, parts.plan.total_steps - state.step):
        # What all ranks agree on. Collective (control group): host integers only, the GPU is not waited for.
        heartbeat.at("counts")
        targets, digest, stop_requests, failed_saves, early_stops = parts.world.sum_counts(
            data.num_targets,
            data.digest,
            int(parts.stop.requested),
            int(parts.saver.has_failed),
            int(parts.stop.wants_early_stop()),
        )
        if failed_saves:
            parts.saver.wait()  # raises, on every rank
        stopping = stop_requests + early_stops > 0

        # Gradients, micro-batch by micro-batch. The compiler may take longer than any step may: a rank that compiles
        # does not hang.
        heartbeat.at("forward", watched=not (config.train.compile and state.step == first_step))
        seed_step(config.run.seed, state.step, parts.world)
        losses = [
            strategy.accumulate(batch, scale=1 / max(1, targets), last=number == len(data.batches))
            for number, batch in enumerate(data.batches, start=1)
        ]
        loss_sum = sum(losses[1:], start=losses[0])

        # The update.
        lr = learning_rate(state.step, parts.plan.total_steps, config.optim)
        note_save(parts, state)  # what is being saved is about to change
        grad_norm = strategy.update(lr)
        before, state = state, advanced(state, parts.plan.global_batch_size, targets)
        meter.observe(state, targets, digest, lr, loss_sum, grad_norm)

        # What follows it, where it is due.
        due = what_is_due(parts, before, state, stopping)
        if due.log:
            heartbeat.at("log")
            # Collective; host sync; raises if not finite.
            meter.flush(parts.loader.wait_s, at_once=due.evaluate or due.save)
        # Collective; answers, which take longer than the loss, are not generated in a hurry.
        heldout = evaluate(parts, state, with_task=due.save and not stop_requests)["loss"] if due.evaluate else None
        if due.sample and parts.world.is_main:
            heartbeat.at("sample")
            parts.write_sample(state)
        if due.save:
            # Copying and writing go on beside the next steps, where any follow.
            save(parts, state, heldout, beside=not (stopping or state.step == parts.plan.total_steps))
        if due.evaluate or due.save or due.sample:
            meter.restart_clock()
        if stopping:
            parts.stop.early_stop = bool(early_stops)
            break
        heartbeat.at("data", state.step)
    heartbeat.at("save", watched=False)
    parts.saver.wait()
    note_save(parts, state)
    return state


def seed_step(seed: int, step: int, world: World) -> None:
    """Dropout's random numbers are a function of (seed, step, rank): nothing to save, nothing to disturb.

    Not `torch.manual_seed`: without a GPU it notes a stack trace for the day when one appears, 1.7 ms at each
    step, and keeps them all.
    """
    number = (seed * 1_000_003 + step * 8_191 + world.rank * 2_654_435_761) % 2**63
    torch.default_generator.manual_seed(number)
    if world.device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif world.device.type == "mps":
        torch.mps.manual_seed(number)


def advanced(state: TrainState, rows: int, targets: int) -> TrainState:
    return TrainState(step=state.step + 1, samples=state.samples + rows, targets=state.targets + targets)


@dataclass(frozen=True)
class Due:
    log: bool
    evaluate: bool
    sample: bool
    save: bool


def what_is_due(parts: Parts, before: TrainState, state: TrainState, stopping: bool) -> Due:
    """What happens after this step. Depends on configuration, step and an agreed flag, so all ranks say the same."""
    config, step = parts.config, state.step
    last = step == parts.plan.total_steps

    def every(number: int | None) -> bool:
        return number is not None and step % number == 0

    def passed(epochs: float | None) -> bool:
        if epochs is None:
            return False
        rows = epochs * parts.rows_per_epoch
        return int(state.samples / rows + 1e-9) > int(before.samples / rows + 1e-9)

    scheduled_save = last or every(config.checkpoint.every_steps) or passed(config.checkpoint.every_epochs)
    # A save that a stop forces is not scored: the time until the process is killed may be short. The last one is all
    # the same: no later step would make up for it.
    evaluating = last or (
        not stopping and (scheduled_save or every(config.evaluate.every_steps) or step in config.evaluate.also_at)
    )
    sampling = passed(1.0) if config.evaluate.sample.every == "epoch" else evaluating
    save_now = scheduled_save or stopping
    return Due(
        log=every(config.log.every_steps) or evaluating or save_now,
        evaluate=evaluating,
        sample=sampling and not stopping and bool(config.evaluate.sample.prompt),
        save=save_now,
    )


def evaluate(parts: Parts, state: TrainState, with_task: bool) -> dict[str, float]:
    """Collective. Score the held-out split and write the scores down."""
    heartbeat.at("evaluate")
    scores = parts.evaluate(state, with_task)
    if not math.isfinite(scores["loss"]):
        raise NotFinite(f"step {state.step}: the held-out loss is {scores['loss']}; stopped")
    parts.meter.heldout(state, scores)
    return scores


def save(parts: Parts, state: TrainState, heldout_loss: float | None, beside: bool) -> None:
    """Begin a checkpoint; waits for the last one if it is still being written.

    `beside`: steps follow, which would change what is being written; without them nothing is copied.
    """
    heartbeat.at("save", watched=False)  # a file system may take its time, and a restart would not make it faster
    described = Manifest(
        train_state=state,
        seed=parts.config.run.seed,
        num_rows=parts.rows_per_epoch,
        global_batch_size=parts.plan.global_batch_size,
        fingerprint=parts.fingerprint,
        world_size=parts.world.size,
        strategy=parts.config.strategy.kind,
        heldout_loss=heldout_loss,
        files={},
    )
    parts.saver.save(described, beside)


def note_save(parts: Parts, state: TrainState) -> None:
    """After a save: until the state has been copied (host sync on CPUs). Then note how long training stood still."""
    if (waited_s := parts.saver.until_copied()) is not None:
        parts.meter.save_waited(state, waited_s)
