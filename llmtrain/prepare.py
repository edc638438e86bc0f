"""What rank 0 does before training while the others wait: shards, run folder, where to resume."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from llmtrain import checkpoint, files, ledger, log, manifest, recipe, retention, rundir, shards
from llmtrain.config.load import COMMAND_LINE, Origins, fixed_differences, load_config, resolved_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_REQUEUE, CheckpointError, ConfigError, DataMismatch, RunFolderError, disk_errors
from llmtrain.rundir import RunDir
from llmtrain.shards import ShardFolder
from llmtrain.stop import STOPS


def prepare_shards(config: RunConfig) -> ShardFolder:
    """Open the shards, verified; build them first (in a process of the launcher's) where there are none.

    Leaves with the launcher's exit code if it fails; it has said why.
    """
    folder = recipe.shard_folder(config)
    if not shards.exists(folder):
        log.info(f"no shards in {folder} yet: building them")
        with tempfile.TemporaryDirectory() as scratch, _stops_end_a_build():
            file = Path(scratch) / "config.yaml"
            file.write_text(resolved_yaml(config), encoding="utf-8")
            # A process border instead of an import: the core does not depend on the launcher.
            done = subprocess.run([sys.executable, "-m", "launcher", "shard", str(file)], check=False)
        if done.returncode:
            raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    opened = shards.open_folder(folder, config.data.verify)
    opened.check_recipe(recipe.recipe_of(config), recipe.tokenizer_file(config))
    if newer := recipe.newer_source(config, folder / shards.MANIFEST):
        log.warning(f"data       {recipe.told_newer(newer, folder)}")
    return opened


@contextlib.contextmanager
def _stops_end_a_build() -> Iterator[None]:
    """A stop would end this process alone, and leave the build at work for hours. What is finished of it is kept."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_REQUEUE)  # on its way out, subprocess.run kills the build

    before = {number: signal.signal(number, leave) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_run(run: RunDir, config: RunConfig, origins: Origins, data: ShardFolder) -> int | None:
    """Make the run folder ready; returns the step to resume from, None to start.

    Raises:
        RunFolderError: it holds checkpoints of another configuration.
        DataMismatch: it holds checkpoints of other data.
        CheckpointError: there is nothing to resume from although `run.resume=must`, or nothing verifies.
    """
    with disk_errors("run folder", run.path):
        run.create()
        files.remove_asides(run.path)
        checkpoint.remove_leftovers(run)
        retention.remove_leftovers(run)
        step = _resume_step(run, config, origins, data)
        if step is None and config.run.resume == "must":
            raise CheckpointError(
                f"{origins.describe(config, 'run.resume')}: {run.checkpoints} holds no checkpoint to resume from"
            )
        last = -1 if step is None else step
        for records in (run.metrics, run.heldout, run.samples):
            rundir.rewind_jsonl(records, last)
        rundir.mend_jsonl(run.events)
        if step is not None:
            for rejected in checkpoint.discard_after(run, step):
                note(run, "rejected", f"did not verify, moved to {run.quarantined(rejected)}", rejected)
            note(run, "resumed", f"from step {step:,}", step)
        else:
            for old in run.tensorboard.glob("events.*"):  # of a start that never saved
                old.unlink()
            note(run, "started", "from the beginning", 0)
        files.write_atomic(run.config, resolved_yaml(config))
    return step


def note(run: RunDir, kind: ledger.EventKind, message: str, step: int) -> None:
    """Write down what happened to training, for reports."""
    ledger.append(run.events, ledger.Event(kind=kind, message=message, step=step))


def check_same_base(run: RunDir, folder: Path, resuming: bool) -> None:
    """Note what the base's files are (about 1 GB/s), so that an adapter never goes on with another base.

    Files with the size and time that were noted are not read again.

    Raises:
        RunFolderError: a file of the base is not what the run was started with.
    """
    noted: dict[str, dict[str, Any]] = json.loads(run.base.read_text()) if resuming and run.base.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        info = path.stat()
        stamp = {"size_bytes": info.st_size, "modified_ns": info.st_mtime_ns}
        before = noted.get(path.name, {})
        known = all(before.get(key) == value for key, value in stamp.items())
        found[path.name] = {**stamp, "sha256": before["sha256"] if known else files.sha256(path)}
    changed = [name for name in {*noted, *found} if noted and _hash(noted, name) != _hash(found, name)]
    if changed:
        raise RunFolderError(
            f"{folder}: the base is not the one that {run.path} was trained on ({', '.join(sorted(changed))} changed). "
            "Bring the old one back, or start anew with run.resume=never"
        )
    files.write_atomic(run.base, json.dumps(found, indent=1) + "\n")


def _hash(noted: dict[str, dict[str, Any]], name: str) -> str | None:
    return noted.get(name, {}).get("sha256")


def _resume_step(run: RunDir, config: RunConfig, origins: Origins, data: ShardFolder) -> int | None:
    if not run.checkpoint_steps():
        _refuse_to_begin_again(run)
        return None
    _check_same_run(run, config, origins)
    step = checkpoint.newest_whole(run)
    if step is not None:
        described = manifest.read(run.checkpoint(step))
        if described.fingerprint != data.fingerprint:
            raise DataMismatch(
                f"{run.checkpoint(step)} was trained on other data (fingerprint {described.fingerprint[:12]}, the "
                f"shards in {data.path} have {data.fingerprint[:12]}): the source text has changed since. Give this "
                "run another run.name, or bring the old text back and run 'llmtrain shard CONFIG --force'"
            )
    return step


def _refuse_to_begin_again(run: RunDir) -> None:
    """A run that has saved and has no checkpoint left would begin anew in its old ledgers, with its old scores.

    Raises:
        CheckpointError: its checkpoints are in quarantine, or gone.
    """
    if quarantined := run.quarantined_steps():
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint verifies; {run.quarantined(quarantined[-1]).name} is the newest of "
            f"{len(quarantined)} in quarantine (the run's events say why). One that is whole after all (a disk that "
            "was away) can be renamed back; or start anew with run.resume=never (moves this folder aside)"
        )
    if any(rundir.read_jsonl(ledger_file) for ledger_file in (run.saves, run.scores, run.uploads)):
        raise CheckpointError(
            f"{run.checkpoints}: this run has saved checkpoints, and none of them is there any more. Bring one back "
            f"('llmtrain restore' takes it from the Hub, into another folder), give this run another run.name, or "
            "start anew with run.resume=never (this folder is moved aside, not deleted)"
        )


def _check_same_run(run: RunDir, config: RunConfig, origins: Origins) -> None:
    try:
        old, _ = load_config(run.config)
    except ConfigError as error:
        raise RunFolderError(
            f"{run.config}: not readable by this version, so nothing can be resumed: {error}"
        ) from None
    differences = fixed_differences(old, config)
    if not differences:
        return
    lines = [
        f"  - {key}: the run has {before}, now {after} ({origins.of(tuple(key.split('.')))})"
        for key, before, after in differences
    ]
    raise RunFolderError(
        f"{run.path} holds checkpoints of another configuration:\n" + "\n".join(lines) + "\nResume with the old "
        f"values, or give this run a name of its own (run.name=..., {COMMAND_LINE}), or start anew with "
        "run.resume=never (the old folder is moved aside)"
    )
