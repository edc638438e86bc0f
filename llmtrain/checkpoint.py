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
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from llmtrain import files, fragments, log, manifest, retention
from llmtrain.errors import CheckpointError, DiskFull
from llmtrain.fragments import Fragment, FragmentReader
from llmtrain.manifest import FileInfo, Manifest
from llmtrain.retention import Held
from llmtrain.rundir import RunDir
from llmtrain.strategies.interface import Strategy

_ASIDE = ".writing-"
_LOOK_S = 0.5
_SPARE_BYTES = 16_000_000
"""To be left by a save that may wait for more room: training goes on writing its records until the next one."""

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
    _make(folder / "model")
    synced = write(folder / "model", weights)
    rest = [path for path in sorted((folder / "model").iterdir()) if path.name not in synced]
    for path in rest:
        files.sync(path)
    return {f"model/{name}": info for name, info in synced.items()} | manifest.describe_files(folder, rest)


def write_share(folder: Path, share: list[Fragment], rank: int, size: int) -> dict[str, FileInfo]:
    """Write one rank's file in `state/`; returns it, synced to disk. Ranks write at the same time."""
    path = folder / "state" / fragments.file_name(rank, size)
    _make(path.parent)
    return {f"state/{path.name}": fragments.write(path, share)}


def _make(part: Path) -> None:
    """A part of a checkpoint that is being written; not where the run's folder has gone meanwhile."""
    part.parent.mkdir(exist_ok=True)
    part.mkdir(exist_ok=True)


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


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Around what reads a checkpoint.

    Raises:
        CheckpointUnreadable: the disk failed.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointUnreadable(
            f"{folder} cannot be read: {error}. Nothing was rejected or moved. When the disk answers "
            "again, the same command goes on from it; to go on from an older one, move this folder away"
        ) from error


def newest_whole(run: RunDir) -> int | None:
    """Step of the newest checkpoint that verifies; says which file made it reject a newer one.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
        CheckpointUnreadable: the disk failed; to go on from an older one would throw work away for what may pass.
    """
    rejected = []
    for step in reversed(run.checkpoint_steps()):
        try:
            with reading(run.checkpoint(step)):
                manifest.verify(run.checkpoint(step))
        except CheckpointUnreadable:
            raise
        except CheckpointError as error:
            rejected.append(str(error))
            log.warning(f"checkpoint {run.checkpoint(step).name} rejected: {error}")
            continue
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


def await_room(run: RunDir, needed: int, held: Callable[[], Held] = retention.nothing_held) -> None:
    """Before anything is written: until `needed` bytes are free, and some for the lines of the next steps, as long as
    what is `held` lets hope for it.

    Raises:
        DiskFull: fewer than `needed` are.
    """
    began, told, spare = time.monotonic(), False, min(needed, _SPARE_BYTES)
    while needed + spare > shutil.disk_usage(run.checkpoints).free:
        found = held()
        free = shutil.disk_usage(run.checkpoints).free  # after that: what has just gone is held no more
        if not found.why or time.monotonic() - began >= found.wait_s:
            if needed <= free:
                break
            raise DiskFull(
                f"a checkpoint takes {needed / 1e6:,.0f} MB, but {run.checkpoints} has only {free / 1e6:,.0f} MB free; "
                f"{_advice(found, time.monotonic() - began)}"
            )
        if not told:
            log.warning(
                f"saving     waits for room, up to {found.wait_s:,.0f} s: {needed / 1e6:,.0f} MB for a checkpoint and "
                f"{spare / 1e6:,.0f} to spare, {free / 1e6:,.0f} MB are free in {run.checkpoints}; {found.why}"
            )
            told = True
        time.sleep(_LOOK_S)
    if told:
        log.info(f"saving     goes on: there is room again, after {time.monotonic() - began:,.0f} s")


def _advice(found: Held, waited_s: float) -> str:
    again = "then run the same command again: it goes on from the last checkpoint"
    if not found.why:
        return f"free some space or keep fewer (checkpoint.keep_last, checkpoint.keep_best), {again}"
    waited = f" (waited {waited_s:,.0f} s)" if waited_s >= 1 else ""
    return (
        f"{found.why}{waited}. Free some space, save less often (checkpoint.every_steps, checkpoint.every_epochs) or "
        f"have them scored faster (service.score, service.nice), {again}"
    )
