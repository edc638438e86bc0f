"""What rank 0 does alone, before there are process groups, while the other ranks wait for what it found."""

import contextlib
import fnmatch
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import torch

from llmtrain import devices, early_stop, files, ledger, log, model_files, origin, recipe, resume, shards
from llmtrain.base_facts import OTHER_FORMATS, check_place
from llmtrain.batches import ANY_ROWS, plan_batches
from llmtrain.config import RunConfig, load_config, resolved_yaml
from llmtrain.config.load import Origins, with_precision
from llmtrain.errors import EXIT_REQUEUE, ConfigError, RunFolderError, disk_errors
from llmtrain.failures import failures_noted
from llmtrain.hardware import is_bf16_fast
from llmtrain.ledger import Event
from llmtrain.resume import settled_precision
from llmtrain.run_start import prepare_run
from llmtrain.rundir import RunDir
from llmtrain.service.beside import Companion
from llmtrain.shards import ShardFolder
from llmtrain.stop import stops
from llmtrain.world import World


@dataclass(frozen=True)
class StartFacts:
    """What every rank has to know: plain data, that goes through the store as JSON."""

    resume_step: int | None
    """None: the run begins."""
    fingerprint: str
    """Of the data."""
    early_stop: str | None
    """Why the service has ended this run."""
    precision: str
    """`train.precision`, settled."""


def prepare(
    config: RunConfig, origins: Origins, world: World, run_dir: RunDir, locks: list[IO[str]], companion: Companion
) -> StartFacts:
    """On rank 0, before any process group: shards, lock, run folder, checkpoint.

    Raises:
        UserError: what is wrong with the configuration, the data, the base or the run folder.
    """
    before = resume.check(run_dir, config, origins)  # this and the next before hours of sharding
    config = settle_precision(config, before, world.device)
    check_device(config, origins, world.device)
    check_place(config, origins)
    check_base(config)
    if before is None:
        model_files.check_start(config, origins)
    plan_batches(config, origins, world.size, ANY_ROWS)
    data = prepare_shards(config)
    check_base(config)  # with what is known now of the tokenizer
    if before is None:
        model_files.check_vocabulary(config, origins, data.tokenizer / "tokenizer.json")
    base_folder = fetch_base(config)
    plan = plan_batches(config, origins, world.size, data.manifest.splits["train"].rows)  # before touching the run
    with disk_errors("run folder", run_dir.path):
        locks.append(run_dir.lock())
        if config.run.resume == "never" and (run_dir.config.exists() or run_dir.checkpoint_steps()):
            log.info(f"run.resume=never: the old run is now in {run_dir.move_aside()}")
            locks.append(run_dir.lock())  # the first one went with the old folder
        step = prepare_run(run_dir, config, origins, data, plan.total_steps)
        log.also_to_file(run_dir.log)
        with failures_noted(run_dir):
            if base_folder is not None:
                check_same_base(run_dir, base_folder, resuming=step is not None)
            if (source := origin.copied_from(run_dir)) is not None:
                note_branch(run_dir, config, source)
            origin.note(run_dir, world.device.type, world.local_size, world.size)
        ended = early_stop.asked_to_end(run_dir, config.service.patience)
        if ended is None:  # it was said of a smaller patience
            run_dir.early_stop.unlink(missing_ok=True)
    if config.service.start == "auto":
        companion.start()
    return StartFacts(step, data.fingerprint, ended, config.train.precision)


def settle_precision(config: RunConfig, before: RunConfig | None, device: torch.device) -> RunConfig:
    """Without `auto`: the run folder should say what was computed. `before`: what the run that resumes was configured
    as."""
    is_fast = is_bf16_fast(device)
    precision, of_new = settled_precision(config, before, is_fast), settled_precision(config, None, is_fast)
    if precision != of_new:
        log.warning(f"precision  {precision}, as this run began; on this machine a new one would take {of_new}")
    return with_precision(config, precision)


def prepare_shards(config: RunConfig) -> ShardFolder:
    """Open the shards, verified; build them first (in a process of the launcher's) where there are none.

    Leaves with the launcher's exit code if it fails; it has said why.
    """
    folder = recipe.shard_folder(config)
    if not shards.exists(folder):
        log.info(f"no shards in {folder} yet: building them")
        with tempfile.TemporaryDirectory() as scratch, _stops_end_a_build():
            file = Path(scratch) / "config.yaml"
            with disk_errors("temporary files", Path(scratch).parent):
                file.write_text(resolved_yaml(config), encoding="utf-8")
            # A process border instead of an import: the core does not depend on the launcher.
            done = subprocess.run([sys.executable, "-m", "launcher", "shard", str(file)], check=False)
        if done.returncode:
            raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    opened = recipe.open_shards(config, config.data.verify)
    if newer := recipe.newer_source(config, folder / shards.MANIFEST):
        log.warning(f"data       {recipe.describe_newer(newer, folder)}")
    return opened


@contextlib.contextmanager
def _stops_end_a_build() -> Iterator[None]:
    """A stop would end this process alone, and leave the build at work for hours. What is finished of it is kept."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_REQUEUE)  # on its way out, subprocess.run kills the build

    before = {number: signal.signal(number, leave) for number in stops()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note_branch(run_dir: RunDir, config: RunConfig, source: RunDir) -> None:
    """This folder is a copy of a run that is still there: from here on it is one of its own, on the Hub too."""
    changed = ""
    with contextlib.suppress(ConfigError):  # of another version
        pairs = resume.fixed_differences(load_config(source.config)[0], config)
        changed = "".join(f"; {key} {before} -> {after}" for key, before, after in pairs)
    message = f"off {source.path}, of which this folder was a copy{changed}"
    log.info(f"branched   {message}")
    ledger.append(run_dir.events, Event(kind="branched", message=message))


def check_device(config: RunConfig, origins: Origins, device: torch.device) -> None:
    """Raises ConfigError for what torch cannot compute there, or computes wrongly in silence; and where the service,
    which starts on this machine, is to score on a device that is not there."""
    if config.service.start == "auto" and config.service.score not in ("auto", "training"):
        devices.find(config.service.score, origins.describe(config, "service.score"))
    devices.check_kernels(device, origins.describe(config, "train.device"))
    if device.type == "mps" and config.model.has_dropout and config.train.activation_checkpointing:
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


def check_same_base(run: RunDir, folder: Path, resuming: bool) -> None:
    """Note what the base's files are (about 1 GB/s), so that an adapter never goes on with another base.

    Files with the size and time that were noted are not read again.

    Raises:
        RunFolderError: a file of the base is not what the run was started with.
    """
    noted = _noted_base(run) if resuming and run.base.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        if _is_unread(path.name):
            continue
        info = path.stat()
        stamp = {"size_bytes": info.st_size, "modified_ns": info.st_mtime_ns}
        before = noted.get(path.name, {})
        known = all(before.get(key) == value for key, value in stamp.items())
        found[path.name] = {**stamp, "sha256": before["sha256"] if known else files.sha256(path)}
    names = {name for name in {*noted, *found} if not _is_unread(name)}  # earlier versions noted these too
    changed = [name for name in names if noted and _hash(noted, name) != _hash(found, name)]
    if changed:
        raise RunFolderError(
            f"{folder}: the base is not the one that {run.path} was trained on ({', '.join(sorted(changed))} changed). "
            "Bring the old one back, or start anew with run.resume=never"
        )
    files.write_atomic(run.base, json.dumps(found, indent=1) + "\n")


def _is_unread(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in OTHER_FORMATS)


def _noted_base(run: RunDir) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(run.base.read_text())
    except ValueError as error:
        raise RunFolderError(
            f"{run.base}: damaged ({error}); it holds the hashes of the base's files. Delete it if the base is still "
            "the one that this run was started with: it is then written anew"
        ) from None


def _hash(noted: dict[str, dict[str, Any]], name: str) -> str | None:
    return noted.get(name, {}).get("sha256")
