"""Checkpoints: written aside, hashed, synced, renamed; found again, verified.

    step-00000100/model/       weights and tokenizer, as transformers loads them
    step-00000100/state/       optimizer-RANK-of-RANKS.safetensors, each rank's share (fragments.py)
    step-00000100/manifest.json

`saver.py` says when these functions run, and on which rank.

Nothing random is saved: dropout's generator is seeded from (seed, step, rank) at every step
(`trainer.seed_step`), and the schedule is a pure function of the step.
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from llmtrain import files, fragments, log, manifest, retention
from llmtrain.errors import CheckpointError, DiskFull
from llmtrain.fragments import Fragment, FragmentReader
from llmtrain.manifest import FileInfo, Manifest
from llmtrain.rundir import RunDir
from llmtrain.strategies.interface import Strategy

_ASIDE = ".writing-"

ModelWriter = Callable[[Path, dict[str, Tensor]], dict[str, FileInfo]]
"""Writes `model/`; returns the files that it has hashed and synced to disk itself."""


class CheckpointUnreadable(CheckpointError):
    """The disk does not give a checkpoint's bytes now, which says nothing about them."""

    exit_code = 1
    """Not CheckpointError's, which is for a person: `llmtrain run` tries again, for it may pass."""


def aside(run: RunDir, step: int) -> Path:
    """The folder in which the checkpoint of a step is written before it is renamed."""
    return run.checkpoints / f"{_ASIDE}{run.checkpoint(step).name}"


def write_model(folder: Path, weights: dict[str, Tensor], write: ModelWriter) -> dict[str, FileInfo]:
    """Write `model/`; returns its files, synced to disk."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    synced = write(folder / "model", weights)
    rest = [path for path in sorted((folder / "model").iterdir()) if path.name not in synced]
    for path in rest:
        files.sync(path)
    return {f"model/{name}": info for name, info in synced.items()} | manifest.describe_files(folder, rest)


def write_share(folder: Path, share: list[Fragment], rank: int, size: int) -> dict[str, FileInfo]:
    """Write one rank's file in `state/`; returns it, synced to disk. Ranks write at the same time."""
    path = folder / "state" / fragments.file_name(rank, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    return {f"state/{path.name}": fragments.write(path, share)}


def publish(run: RunDir, folder: Path, whole: Manifest) -> Path:
    """Finish what all ranks have written: manifest last, then one rename."""
    manifest.write(folder, whole)
    for written in (folder / "model", folder / "state", folder):
        files.sync(written)
    final = run.checkpoint(whole.train_state.step)
    folder.rename(final)
    files.sync(run.checkpoints)
    return final


def load(folder: Path, strategy: Strategy) -> None:
    """Give the saved optimizer state to `strategy`. The weights are loaded by the model, before."""
    strategy.load_state(FragmentReader(folder / "state"))


def newest_whole(run: RunDir) -> int | None:
    """Step of the newest checkpoint that verifies; says which file made it reject a newer one.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
        CheckpointUnreadable: the disk failed; to go on from an older one would throw work away for what may pass.
    """
    rejected = []
    for step in reversed(run.checkpoint_steps()):
        try:
            manifest.verify(run.checkpoint(step))
        except CheckpointError as error:
            rejected.append(str(error))
            log.warning(f"checkpoint {run.checkpoint(step).name} rejected: {error}")
            continue
        except OSError as error:
            raise CheckpointUnreadable(
                f"{run.checkpoint(step)} cannot be read: {error}. Nothing was rejected or moved. When the disk answers "
                "again, the same command goes on from it; to go on from an older one, move this folder away"
            ) from error
        return step
    if rejected:
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint verifies; the last reason: {rejected[0]}. "
            "Start anew with run.resume=never (this folder is moved aside, not deleted)"
        )
    return None


def discard_after(run: RunDir, step: int) -> list[int]:
    """Move aside what a resumed run will write again: newer checkpoints, which were rejected. Returns their steps."""
    newer = [s for s in run.checkpoint_steps() if s > step]
    for rejected in newer:
        with contextlib.suppress(FileNotFoundError):  # the service has moved it at the same moment
            retention.quarantine(run, rejected)
    return newer


def remove_leftovers(run: RunDir) -> None:
    """Delete what a killed save left behind."""
    for path in run.checkpoints.glob(f"{_ASIDE}*"):
        shutil.rmtree(path)


def check_room(run: RunDir, needed: int) -> None:
    """Before anything is written.

    Raises:
        DiskFull: fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(run.checkpoints).free
    if needed > free:
        raise DiskFull(
            f"a checkpoint takes {needed / 1e6:,.0f} MB, but {run.checkpoints} has only {free / 1e6:,.0f} MB free; "
            "free some space or keep fewer (checkpoint.keep_last, checkpoint.keep_best), then run the same "
            "command again: it goes on from the last checkpoint"
        )
