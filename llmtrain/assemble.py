"""Puts a run together: configuration -> parts -> `trainer.train`. The only module that knows all others."""

import contextlib
import gc
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from llmtrain import checkpoint, heartbeat, launched, ledger, log, manifest, prompts, recipe, shards, transformers_ids
from llmtrain.batches import BatchPlan, plan_batches, warmup_problem
from llmtrain.config import RunConfig, load_to_start, resolved_yaml
from llmtrain.config.data_sections import Format
from llmtrain.config.load import Origins, with_precision
from llmtrain.data import Loader, make_batch
from llmtrain.early_stop import asked_to_end
from llmtrain.errors import EXIT_REQUEUE, NotFinite, disk_errors
from llmtrain.evaluation import make_evaluate, make_sampler, make_task
from llmtrain.failures import failures_noted, memory_explained
from llmtrain.files import write_atomic
from llmtrain.finish import become_finish
from llmtrain.ledger import Event
from llmtrain.manifest import FileInfo, TrainState
from llmtrain.metrics import Meter
from llmtrain.models import FromScratch, Trainable, build_model
from llmtrain.progress import Progress
from llmtrain.rank0 import StartFacts, prepare
from llmtrain.rundir import RunDir
from llmtrain.saver import Saver
from llmtrain.service.beside import Companion
from llmtrain.shards import ShardFolder, ShardSet
from llmtrain.stop import StopFlag
from llmtrain.strategies import build_strategy, deepspeed_config
from llmtrain.tensorboard import TensorBoard
from llmtrain.trainer import Parts, train
from llmtrain.wording import count
from llmtrain.world import World, find_world


def run(file: str | None, overrides: list[str]) -> int:
    """Train as configured. Returns the exit code: 0 at the end of the plan, EXIT_REQUEUE after a stop.

    An error leaves the process groups as they are: NCCL would wait for the other ranks, which may never come, before
    anybody has said what was wrong. The process is about to end.
    """
    log.set_up(launched.rank())
    heartbeat.at("preparing", watched=False)
    config, origins = load_to_start(file, overrides)
    world = find_world(config.train.device, origins.of(("train", "device")))
    run_dir = RunDir(config.run.folder)
    locks: list[IO[str]] = []  # held until the process ends
    companion = Companion(run_dir, config)
    found = world.rank0_first("prepare", lambda: asdict(prepare(config, origins, world, run_dir, locks, companion)))
    prepared = StartFacts(**found)
    config = with_precision(config, prepared.precision)
    with failures_noted(run_dir) if world.is_main else contextlib.nullcontext():
        return go_on(config, origins, world, run_dir, prepared, companion)


def go_on(
    config: RunConfig, origins: Origins, world: World, run_dir: RunDir, prepared: StartFacts, companion: Companion
) -> int:
    """Collective. Train what rank 0 has prepared."""
    patience = config.service.patience
    looks = world.is_main and patience is not None
    stop = StopFlag((lambda: asked_to_end(run_dir, patience) is not None) if looks else None)
    stop.listen()
    world.start_groups(config.strategy.timeout_s, even_alone=config.strategy.kind == "zero2")
    with memory_explained(config, origins, world):
        parts, state = build(config, origins, world, run_dir, stop, prepared, companion)
    gc.freeze()  # what is there now stays: no search for garbage has to go through it
    gc.enable()  # __main__ has switched it off
    with disk_errors("run folder", run_dir.path):
        try:
            if prepared.early_stop is None:
                with memory_explained(config, origins, world, lambda: parts.meter.has_observed):
                    state = train(parts, state)
        except NotFinite as error:
            parts.saver.wait()  # what is being written is of an earlier, finite step
            saved = run_dir.checkpoint_steps()
            what = f"the checkpoints up to step {saved[-1]:,} are finite" if saved else "no checkpoint was saved before"
            raise NotFinite(f"{error}; {what}") from None
        finally:
            parts.loader.close()
            parts.meter.close()
    finished = state.step >= parts.plan.total_steps or stop.early_stop or prepared.early_stop is not None
    if world.is_main and not finished:
        say_stopped(parts, state, run_dir)
    heartbeat.at("ending", watched=False)
    world.sum_counts(0)  # collective: rank 0 may hold the store, so it leaves after the others have used it
    world.close()
    if world.is_main and finished:
        heartbeat.stop(world.rank)
        become_finish(run_dir)
    return 0 if finished else EXIT_REQUEUE


def build(
    config: RunConfig,
    origins: Origins,
    world: World,
    run_dir: RunDir,
    stop: StopFlag,
    prepared: StartFacts,
    companion: Companion,
) -> tuple[Parts, TrainState]:
    """Collective. All parts of the run, and the state that it starts from."""
    data = shards.open_folder(recipe.shard_folder(config), "size")  # rank 0 has verified every byte
    training = data.split("train")
    plan = plan_batches(config, origins, world.size, training.num_rows)
    state, resume_step = TrainState(), prepared.resume_step
    begun_from = None if config.model.kind == "qlora" else config.model.start_from
    is_loaded_next = resume_step is not None or begun_from is not None
    model = build_model(config, data.manifest.tokenizer.vocab_size, world.device, is_loaded_next)
    prove_isolation(config, model, training)
    if resume_step is not None:
        state = manifest.read(run_dir.checkpoint(resume_step)).train_state
        with checkpoint.reading(run_dir.checkpoint(resume_step)):
            model.load(run_dir.checkpoint(resume_step) / "model")
    elif begun_from is not None:
        model.load(Path(begun_from))
    strategy = build_strategy(config, model, world, bf16=config.train.precision == "bf16")
    if resume_step is not None:
        with checkpoint.reading(run_dir.checkpoint(resume_step)):
            checkpoint.load(run_dir.checkpoint(resume_step), strategy)
    if world.is_main:
        if config.strategy.kind == "zero2":
            settings = deepspeed_config(config, strategy.weights().values(), world.device)
            with disk_errors("run folder", run_dir.path):
                write_atomic(run_dir.deepspeed, json.dumps(settings, indent=2) + "\n")
        announce(config, world, data, plan, model, state)
    meter = Meter(
        run_dir,
        world,
        open_tensorboard(config, world, run_dir, state),
        Progress(plan.total_steps, state.step, enabled=world.is_main),
        plan,
        rows_per_epoch=training.num_rows,
        tokens_per_row=data.manifest.tokens_per_row,
        flops_per_token=model.flops_per_token(),
        bf16=config.train.precision == "bf16",
    )
    isolate = config.data.isolates_documents
    writer = make_model_writer(data, model, config.data.format if world.is_main else None)
    parts = Parts(
        config=config,
        plan=plan,
        world=world,
        strategy=strategy,
        loader=Loader(training, plan, config.run.seed, world.rank, world.size, world.device, isolate),
        meter=meter,
        stop=stop,
        rows_per_epoch=training.num_rows,
        fingerprint=prepared.fingerprint,
        evaluate=make_evaluate(config, data, plan, strategy, world, make_task(config, data, model, world, meter)),
        write_sample=make_sampler(config, data, model, world, meter),
        saver=Saver(
            run_dir,
            world,
            strategy,
            writer,
            config.checkpoint,
            companion.after_save,
            held=lambda: companion.held(hurry=stop.requested),
        ),
    )
    if world.is_main and config.service.start == "auto":
        companion.say_hub()
    return parts, state


def prove_isolation(config: RunConfig, model: Trainable, training: ShardSet) -> None:
    """On every rank, with the same outcome: what a base does with packed documents is not ours, so it is looked at.

    Raises:
        ModelError: documents that share a row see each other.
    """
    if config.model.kind != "qlora":
        return
    from llmtrain.models import isolation
    from llmtrain.models.qlora import QLoRA

    assert isinstance(model, QLoRA)
    fullest = training.rows(np.array([training.fullest_row()]))  # the first rows may hold one document each
    isolates = config.data.isolates_documents
    # contiguous: what is in a row is meant to be read as one
    doc_lens = fullest.doc_lens[0].tolist() if isolates else [int(fullest.doc_lens[0].sum())]
    batch = make_batch(fullest, isolate_documents=isolates)
    found = isolation.check(model, batch, doc_lens, autocast=config.train.precision == "bf16")
    documents = len(fullest.doc_lens[0])
    kept = "keep apart" if isolates else "read as one text"
    what = "one sample a row" if documents == 1 else f"{documents} samples in a row {kept}"
    log.info(f"packing    {what}; logits differ from those of each alone by {found:.1e}")


def announce(
    config: RunConfig, world: World, data: ShardFolder, plan: BatchPlan, model: Trainable, state: TrainState
) -> None:
    """Say what is about to happen."""
    split, ranks = data.manifest.splits["train"], count(world.size, "rank")
    log.info(
        f"run        {config.run.name} in {config.run.dir}/, {ranks} on {world.device.type}, {config.train.precision}"
        + (", ZeRO-2" if config.strategy.kind == "zero2" else "")
    )
    log.info(f"data       {split.rows:,} rows, {split.tokens:,} tokens in {data.path} ({data.fingerprint[:12]})")
    log.info(f"model      {model.title()}")
    if config.model.kind != "qlora" and config.model.start_from is not None and not state.step:
        log.info(f"weights    those of {config.model.start_from}")
    log.info(
        f"batch      {plan.global_batch_size} rows = {ranks} x {plan.micro_batch_size} x {plan.accumulation} micro; "
        f"{plan.total_steps:,} steps, {plan.total_steps * plan.global_batch_size / split.rows:.2f} epochs"
    )
    if state.step < plan.total_steps and (problem := warmup_problem(config.optim, plan.total_steps)) is not None:
        log.warning(f"warm-up    {problem}")
    if state.step:
        log.info(f"resuming   from step {state.step:,}")
    if state.step >= plan.total_steps:
        past = f", past the {plan.total_steps:,} asked for" if state.step > plan.total_steps else ""
        log.info(f"finished   nothing left to do{past}; a larger train.steps, train.epochs or train.tokens goes on")


def open_tensorboard(config: RunConfig, world: World, run_dir: RunDir, state: TrainState) -> TensorBoard | None:
    """The event writer, on rank 0, with the configuration as text and hparams."""
    if not (world.is_main and config.log.tensorboard):
        return None
    with disk_errors("run folder", run_dir.path):
        board = TensorBoard(run_dir.tensorboard, first_step=state.step + 1 if state.step else 0)
        if not state.step:
            board.text(0, "configuration", "\n".join("    " + line for line in resolved_yaml(config).splitlines()))
            board.hparams(flat_settings(config), ["heldout/loss", "heldout/bits_per_byte", "train/loss"])
    return board


def flat_settings(config: RunConfig) -> dict[str, float | int | str | bool]:
    """`section.key` -> value, for the settings that describe an experiment."""
    result: dict[str, float | int | str | bool] = {}

    def walk(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif value is not None:
                result[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)

    walk(config.model_dump(mode="json", include={"model", "train", "optim", "strategy", "data"}), "")
    return result


def make_model_writer(data: ShardFolder, model: Trainable, format: Format | None) -> checkpoint.ModelWriter:
    """Writes `model/`: weights, configuration and tokenizer, as transformers loads them. Of an adapter no tokenizer.

    The template of chats is read now: its file may be gone when the first checkpoint is written. Ranks that write no
    model, on machines that may not have that file, give no format.
    """
    template = prompts.shipped_template(format, data.tokenizer) if format and format.kind == "chat" else None
    needed: dict[str, Any] = {}
    if format and isinstance(model, FromScratch):
        needed = transformers_ids.settings_needed(data.tokenizer, model.config.model_type)
    eos_id = data.manifest.tokenizer.eos_id

    def write_model(folder: Path, weights: dict[str, Any]) -> dict[str, FileInfo]:
        if isinstance(model, FromScratch):
            for file in prompts.files_of(data.tokenizer):
                shutil.copyfile(file, folder / file.name)
            if template is not None or needed:
                prompts.write_settings(folder, eos_id, template, needed)
        elif template is not None:
            (folder / prompts.TEMPLATE).write_text(template, encoding="utf-8")
        return model.save(folder, weights, eos_id)

    return write_model


def say_stopped(parts: Parts, state: TrainState, run_dir: RunDir) -> None:
    """On rank 0, where the run is not at its end; also for those who ask later whether it was killed."""
    reason = parts.stop.signal_name or "another rank's signal"
    with contextlib.suppress(OSError):  # it is saved, whatever becomes of this line
        ledger.append(run_dir.events, Event(kind="stopped", message=f"by {reason}, saved", step=state.step))
    log.info(f"stopped by {reason} at step {state.step:,}, saved; the same command goes on from there")
