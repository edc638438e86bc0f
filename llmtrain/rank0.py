"""What rank 0 does alone, before there are process groups, while the other ranks wait for what it found."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from llmtrain import choose, devices, log, origin, recipe
from llmtrain.base_facts import check_place
from llmtrain.batches import ANY_ROWS, plan_batches
from llmtrain.config import RunConfig, load_config
from llmtrain.config.load import Origins, auto_is_fp32, fixed_differences, with_precision
from llmtrain.errors import ConfigError, disk_errors
from llmtrain.hardware import is_bf16_fast
from llmtrain.prepare import check_resumable, check_same_base, failures_noted, note, prepare_run, prepare_shards
from llmtrain.rundir import RunDir
from llmtrain.service.beside import Companion
from llmtrain.world import World


@dataclass(frozen=True)
class Prepared:
    """What every rank has to know: plain data, that goes through the store as JSON."""

    resume_step: int | None
    """None: the run begins."""
    fingerprint: str
    """Of the data."""
    early_stop: str | None
    """Why the service has ended this run."""
    precision: str
    """`train.precision`, settled."""


def settle_precision(config: RunConfig, run_dir: RunDir, device: torch.device) -> RunConfig:
    """Replace `auto`: by what the run began in where it resumes, else by what this machine is fast at.

    A requeued job may get a node with another processor; and the run folder should say what was computed.
    """
    if config.train.precision != "auto":
        return config
    precision = "bf16" if is_bf16_fast(device) and not auto_is_fp32(config) else "fp32"
    if config.run.resume != "never" and run_dir.checkpoint_steps():
        with contextlib.suppress(ConfigError):  # which prepare_run will say
            began_in = load_config(run_dir.config)[0].train.precision
            if began_in != precision:
                log.warning(
                    f"precision  {began_in}, as this run began; on this machine a new one would take {precision}"
                )
            precision = began_in
    return with_precision(config, precision)


def prepare(
    config: RunConfig, origins: Origins, world: World, run_dir: RunDir, locks: list[IO[str]], companion: Companion
) -> Prepared:
    """On rank 0, before any process group: shards, lock, run folder, checkpoint.

    Raises:
        UserError: what is wrong with the configuration, the data, the base or the run folder.
    """
    config = settle_precision(config, run_dir, world.device)
    check_resumable(run_dir, config, origins)  # this and the next before hours of sharding
    check_device(config, origins, world.device)
    check_place(config, origins)
    check_base(config)
    plan_batches(config, origins, world.size, ANY_ROWS)
    data = prepare_shards(config)
    check_base(config)  # with what is known now of the tokenizer
    base_folder = fetch_base(config)
    plan = plan_batches(config, origins, world.size, data.manifest.splits["train"].rows)  # before touching the run
    with disk_errors("run folder", run_dir.path):
        locks.append(run_dir.lock())
        if config.run.resume == "never" and run_dir.config.exists():
            log.info(f"run.resume=never: the old run is now in {run_dir.move_aside()}")
            locks.append(run_dir.lock())  # the first one went with the old folder
        step = prepare_run(run_dir, config, origins, data, plan.total_steps)
        log.also_to_file(run_dir.log)
        with failures_noted(run_dir):
            if base_folder is not None:
                check_same_base(run_dir, base_folder, resuming=step is not None)
            if (source := origin.copied_from(run_dir)) is not None:
                note_branch(run_dir, config, source)
            machines = math.ceil(world.size / world.local_size)
            origin.note(run_dir, world.device.type, world.local_size, machines, world.size)
        ended = choose.asked_to_end(run_dir, config.service.patience)
        if ended is None:  # it was said of a smaller patience
            run_dir.early_stop.unlink(missing_ok=True)
    if config.service.start == "auto":
        companion.start()
    return Prepared(step, data.fingerprint, ended, config.train.precision)


def note_branch(run_dir: RunDir, config: RunConfig, source: RunDir) -> None:
    """This folder is a copy of a run that is still there: from here on it is one of its own, on the Hub too."""
    changed = ""
    with contextlib.suppress(ConfigError):  # of another version
        pairs = fixed_differences(load_config(source.config)[0], config)
        changed = "".join(f"; {key} {before} -> {after}" for key, before, after in pairs)
    message = f"off {source.path}, of which this folder was a copy{changed}"
    log.info(f"branched   {message}")
    note(run_dir, "branched", message, None)


def check_device(config: RunConfig, origins: Origins, device: torch.device) -> None:
    """Raises ConfigError for what torch cannot compute there, or computes wrongly in silence; and where the service,
    which starts on this machine, is to score on a device that is not there."""
    if config.service.start == "auto" and config.service.score not in ("auto", "training"):
        devices.find(config.service.score, origins.describe(config, "service.score"))
    devices.check_kernels(device, origins.describe(config, "train.device"))
    dropout = config.model.dropout if config.model.kind == "gpt" else config.model.lora.dropout
    if device.type == "mps" and dropout and config.train.activation_checkpointing:
        raise ConfigError(
            [
                "train.activation_checkpointing=true with dropout on Apple's MPS: torch does not restore its random "
                "numbers there, so that gradients would be wrong; switch one of them off, or set train.device=cpu"
            ]
        )


def check_base(config: RunConfig) -> None:
    """Raises ModelError for all that can be known of a base before its weights are loaded."""
    if config.model.kind == "qlora":
        from llmtrain.models import base, base_checks

        base_checks.check(config.model, base.describe(config.model), recipe.tokenizer_size(config))


def fetch_base(config: RunConfig) -> Path | None:
    """The base's folder, after a download if need be: once, not on every rank."""
    if config.model.kind != "qlora":
        return None
    from llmtrain.models import base

    return base.fetch(config.model)
