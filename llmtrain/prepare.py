"""What rank 0 does before training while the others wait: shards, run folder, where to resume."""

import contextlib
import fnmatch
import json
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from llmtrain import checkpoint, files, jsonl, ledger, log, manifest, recipe, retention, shards, summary, unsaved
from llmtrain.base_facts import OTHER_FORMATS
from llmtrain.config.load import COMMAND_LINE, Origins, fixed_differences, load_config, resolved_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.errors import (
    EXIT_REQUEUE,
    CheckpointError,
    ConfigError,
    DataMismatch,
    RunFolderError,
    UserError,
    disk_errors,
)
from llmtrain.rundir import RunDir
from llmtrain.shards import ShardFolder
from llmtrain.stop import stops


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

    before = {number: signal.signal(number, leave) for number in stops()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_resumable(run: RunDir, config: RunConfig, origins: Origins) -> None:
    """What `prepare_run` would refuse and needs no shards to know, which may take hours to build; makes nothing.

    Raises:
        RunFolderError: it holds checkpoints of another configuration.
        CheckpointError: there is nothing to resume from although there has to be.
    """
    if config.run.resume == "never":
        return
    if not _can_resume(run, config, origins) and config.run.resume == "must":
        raise _nothing_to_resume(run, config, origins)


def _can_resume(run: RunDir, config: RunConfig, origins: Origins) -> bool:
    """Whether there are checkpoints of this configuration; raises if only others are there, or none any more."""
    if (why := retention.why_none_left(run)) is not None:
        raise CheckpointError(why)
    if not run.checkpoint_steps():
        return False
    _check_same_run(run, config, origins)
    return True


def _nothing_to_resume(run: RunDir, config: RunConfig, origins: Origins) -> CheckpointError:
    return CheckpointError(
        f"{origins.describe(config, 'run.resume')}: {run.checkpoints} holds no checkpoint to resume from"
    )


def prepare_run(
    run: RunDir, config: RunConfig, origins: Origins, data: ShardFolder, total_steps: int | None = None
) -> int | None:
    """Make the run folder ready; returns the step to resume from, None to start.

    Args:
        total_steps: what `config` plans. A run that has come further keeps the length that it had: nothing is left
            to do for this one, and reports should not say 200 of 80 steps.

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
            raise _nothing_to_resume(run, config, origins)
        last = -1 if step is None else step
        if total_steps is None or last < total_steps:
            summary.discard(run)
        again = _note_unsaved(run, last)
        for records in (run.metrics, run.heldout, run.samples):
            jsonl.rewind(records, last)
        _warn_of_lost_records(run, last)
        if step is not None:
            for rejected in checkpoint.discard_after(run, step):
                note(run, "rejected", f"did not verify, moved to {run.quarantined(rejected)}", rejected)
            note(run, "resumed", f"from step {step:,}{again}", step)
        else:
            for old in run.tensorboard.glob("events.*"):  # of a start that never saved
                old.unlink()
            note(run, "started", f"from the beginning{again}", 0)
        if step is not None and total_steps is not None and step > total_steps:
            config = _with_length_of(config, load_config(run.config)[0])
        files.write_atomic(run.config, resolved_yaml(config))
    return step


def _note_unsaved(run: RunDir, last: int) -> str:
    """Before records are rewound to `last`: note that the process before was killed, if so; returns, for the event
    that follows, which steps are done again."""
    jsonl.mend(run.events)
    with contextlib.suppress(RunFolderError, ValueError):  # a damaged line of a ledger keeps no run from going on
        if (lost := unsaved.find(run)) is not None:
            note(run, "unsaved", lost.describe(), lost.reached)
            log.warning(f"unsaved    the start before {lost.describe()}; {lost.steps} are done again")
    reached = jsonl.last_record(run.metrics)
    first = max(last, 0) + 1
    if reached is None or reached["step"] < first:
        return ""
    return f"; {unsaved.name_range(first, int(reached['step']))} again"


def _with_length_of(config: RunConfig, old: RunConfig) -> RunConfig:
    length = {name: getattr(old.train, name) for name in ("steps", "epochs", "tokens")}
    return config.model_copy(update={"train": config.train.model_copy(update=length)})


def _warn_of_lost_records(run: RunDir, step: int) -> None:
    last = jsonl.last_record(run.metrics)
    written = 0 if last is None else int(last["step"])
    if written < step:
        log.warning(
            f"records    {run.metrics} ends at step {written:,}, before the checkpoint of step {step:,} that the run "
            "goes on from: curves and the report lack what was between (after a power loss, or a restore)"
        )


@contextlib.contextmanager
def failures_noted(run: RunDir) -> Iterator[None]:
    """Around what rank 0 does with a run that is its own: how that fails goes into the run's log and its events too.

    Whoever starts a run overnight may have no terminal to look at any more.

    Raises:
        RunFolderError: it failed because the run folder is gone.
    """
    try:
        with _gone_is_told(run):
            yield
    except Exception as error:
        known = isinstance(error, UserError)
        code, message = (error.exit_code, str(error)) if known else (1, f"{type(error).__name__}: {error}")
        log.to_file_alone(f"error: {message}" if known else traceback.format_exc().rstrip())
        with contextlib.suppress(OSError):  # such as the full disk that this is about
            if run.config.exists():  # else what is there is an empty mount point
                note(run, "failed", f"exit code {code}: {message}", None)
        raise


@contextlib.contextmanager
def _gone_is_told(run: RunDir) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if run.config.exists():
            raise
        raise RunFolderError(
            f"{run.path}: the run folder is gone: was it moved or deleted, or its disk unmounted? Bring it back, then "
            "run the same command again: it goes on from the last checkpoint"
        ) from error


def note(run: RunDir, kind: ledger.EventKind, message: str, step: int | None) -> None:
    """Write down what happened to training, for reports."""
    ledger.append(run.events, ledger.Event(kind=kind, message=message, step=step))


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


def _resume_step(run: RunDir, config: RunConfig, origins: Origins, data: ShardFolder) -> int | None:
    if not _can_resume(run, config, origins):
        return None
    step = checkpoint.newest_whole(run)
    if step is not None:
        described = manifest.read(run.checkpoint(step))
        if described.fingerprint != data.fingerprint:
            raise DataMismatch(
                f"{run.checkpoint(step)} was trained on other data (fingerprint {described.fingerprint[:12]}, the "
                f"shards in {data.path} have {data.fingerprint[:12]}): the source text has changed since, or these "
                "shards were made by another version of llmtrain, which cuts samples or counts their text differently. "
                "Bring the old shards back, or make them again ('llmtrain shard CONFIG --force') of the old text with "
                "the version that made them; this one goes on with them. Or give this run another run.name"
            )
        if not any(name.startswith("state/optimizer-") for name in described.files):
            raise CheckpointError(
                f"{run.checkpoint(step)}: its optimizer state was written by an older version of llmtrain, in a form "
                "that this one does not read: go on with that version. This one scores, exports and generates with it"
            )
    return step


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
