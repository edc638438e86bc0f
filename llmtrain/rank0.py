"""What rank 0 does alone, before there are process groups, while the other ranks wait for what it found."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from llmtrain import choose, devices, log, origin
from llmtrain.base_facts import check_place
from llmtrain.batches import ANY_ROWS, plan_batches
from llmtrain.config import RunConfig, load_config
from llmtrain.config.load import Origins, auto_is_fp32, with_precision
from llmtrain.errors import ConfigError, disk_errors
from llmtrain.hardware import is_bf16_fast
from llmtrain.prepare import check_resumable, check_same_base, failures_noted, prepare_run, prepare_shards
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
    check_base(config, None)
    plan_batches(config, origins, world.size, ANY_ROWS)
    data = prepare_shards(config)
    check_base(config, data.manifest.tokenizer.vocab_size)
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
            machines = math.ceil(world.size / world.local_size)
            origin.note(run_dir, world.device.type, world.local_size, machines, world.size)
    if config.service.start == "auto":
        companion.start()
    return Prepared(step, data.fingerprint, early_stop(run_dir, config), config.train.precision)


def check_device(config: RunConfig, origins: Origins, device: torch.device) -> None:
    """Raises ConfigError for what torch computes wrongly there, in silence; and where the service, which starts on
    this machine, is to score on a device that is not there."""
    if config.service.start == "auto" and config.service.score not in ("auto", "training"):
        devices.find(config.service.score, origins.describe(config, "service.score"))
    dropout = config.model.dropout if config.model.kind == "gpt" else config.model.lora.dropout
    if device.type == "mps" and dropout and config.train.activation_checkpointing:
        raise ConfigError(
            [
                "train.activation_checkpointing=true with dropout on Apple's MPS: torch does not restore its random "
                "numbers there, so that gradients would be wrong; switch one of them off, or set train.device=cpu"
            ]
        )


def early_stop(run_dir: RunDir, config: RunConfig) -> str | None:
    """Why the service has ended this run, if `service.patience` still says so."""
    asked = choose.early_stop(run_dir)
    if asked is None:
        return None
    if config.service.patience is None or asked.saves < config.service.patience:
        run_dir.early_stop.unlink()
        return None
    return asked.message


def check_base(config: RunConfig, tokenizer_size: int | None) -> None:
    """Raises ModelError for all that can be known of a base before its weights are loaded."""
    if config.model.kind == "qlora":
        from llmtrain.models import base, base_checks

        base_checks.check(config.model, base.describe(config.model), tokenizer_size)


def fetch_base(config: RunConfig) -> Path | None:
    """The base's folder, after a download if need be: once, not on every rank."""
    if config.model.kind != "qlora":
        return None
    from llmtrain.models import base

    return base.fetch(config.model)
