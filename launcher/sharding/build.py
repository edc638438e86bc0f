"""Build a shard folder: list, measure, train a tokenizer, tokenise, pack, publish; in one job or in several.

Work in progress lies in FOLDER/.work, one file per finished task, under a key made of the recipe and
of every source file's size and time: a killed build resumes, a changed source starts over. The same
input gives the same bytes, for any number of processes, and of jobs: `prepare_build`, then any number
of `build_part` on several machines at once, then `build`, which does what is missing.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.sharding import reasons, tasks
from launcher.sharding.finish import publish, write_shards
from launcher.sharding.lock import locked, may_lock
from launcher.sharding.parts import Part, choose_tasks
from launcher.sharding.prepare import Prepared, prepare, read_prepared
from launcher.sharding.processes import RunAll, processes
from launcher.sharding.progress import ShardProgress
from launcher.sharding.work import (
    WORK,
    Plan,
    check_folder,
    check_unchanged,
    make_plan,
    open_work,
    remove_work,
    take_manifest,
)
from llmtrain import cpu, recipe, shards
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EncodingError, SourceError, TooLittleData, disk_errors
from llmtrain.shards import ShardFolder


@dataclass(frozen=True)
class Built:
    """What a build came to."""

    folder: ShardFolder
    seconds: float
    size_bytes: int
    """Of the text that was tokenised now, not by a job before."""
    fast: bool
    """Whether tiktoken did the work."""
    was_there: bool
    newer_source: Path | None = None
    """Of shards that were there: a file of the sources that was written after them."""
    notes: tuple[str, ...] = ()
    """Of shards that were built now: what to know about the input, in lines."""


@dataclass(frozen=True)
class PreparedBuild:
    """What a job came to that prepared a build."""

    plan: Plan
    missing: int
    """Tasks that are not tokenised yet."""


@dataclass(frozen=True)
class BuiltPart:
    """What a job came to that was a part of a build."""

    plan: Plan
    part: Part
    chosen: list[int]
    """Numbers of its tasks."""
    seconds: float
    size_bytes: int
    """Of the text that was tokenised now."""


def build(config: RunConfig, workers: int | None = None, force: bool = False) -> Built:
    """Build the shards of `config`, or what other jobs have left to do, or find them finished.

    Raises:
        ConfigError: the tokenizer's copy would replace files that no build has written.
        SourceError, EncodingError, TokenizerError, TooLittleData: the input cannot be used.
        DataMismatch: a finished folder of another recipe stands there (and not `force`), or a source has changed
            while it was being read.
        DiskFull: no room; what was finished is kept for the next try.
    """
    folder = recipe.shard_folder(config)
    early = _plan_early(config)
    if not force and (found := _find_read_only(config)):
        return found
    with _disk_errors(folder), locked(folder):
        if not force and (found := _find_finished(config)):
            remove_work(folder)  # of a build killed just after its manifest
            return found
        check_folder(config)
        started = time.perf_counter()
        plan = early or make_plan(config)
        open_work(plan, anew=force)
        with ShardProgress() as progress, processes(workers or cpu.usable_cores()) as run_all, _unchanged(plan):
            prepared = prepare(plan, run_all, progress)
            size_bytes = _tokenise(plan, prepared, list(range(len(plan.tasks))), "tokenise", run_all, progress)
            found = reasons.read_found(plan.work, len(plan.tasks))
            try:
                manifest = write_shards(plan, found, run_all, progress)
            except TooLittleData:
                _forget(plan)
                raise
        publish(plan, manifest)
        opened = shards.open_folder(folder, "size")
        notes = tuple(reasons.describe_found(config.data, found))
        return Built(
            folder=opened,
            seconds=time.perf_counter() - started,
            size_bytes=size_bytes,
            fast=prepared.fast,
            was_there=False,
            notes=notes,
        )


def prepare_build(config: RunConfig, workers: int | None = None, force: bool = False) -> PreparedBuild | Built:
    """Leave in the work folder what parts need: measures and the tokenizer.

    Raises:
        What `build` raises.
    """
    folder = recipe.shard_folder(config)
    early = _plan_early(config)
    if not force and (found := _find_read_only(config)):
        return found
    with _disk_errors(folder), locked(folder):
        if not force and (found := _find_finished(config)):
            return found
        check_folder(config)
        plan = early or make_plan(config)
        open_work(plan, anew=force)
        with ShardProgress() as progress, processes(workers or cpu.usable_cores()) as run_all:
            prepare(plan, run_all, progress)
        # With `force`: what stood there is finished no more, or parts would find nothing to do.
        if shards.exists(folder):
            take_manifest(plan)
        return PreparedBuild(plan, len(plan.missing()))


def build_part(config: RunConfig, part: Part, workers: int | None = None) -> BuiltPart | Built:
    """Tokenise a part's tasks, as far as they are missing, while other parts do the same with theirs.

    Raises:
        UserError: the build was not prepared.
        DataMismatch: it was prepared for other sources, or a finished folder of another recipe stands there.
        SourceError, EncodingError, DiskFull: as `build`.
    """
    folder = recipe.shard_folder(config)
    early = _plan_early(config)
    if found := _find_read_only(config):
        return found
    with _disk_errors(folder), locked(folder, shared=True):
        if found := _find_finished(config):
            return found
        started = time.perf_counter()
        plan = early or make_plan(config)
        prepared, chosen = read_prepared(plan), choose_tasks(plan.sizes, part)
        with ShardProgress() as progress, processes(workers or cpu.usable_cores()) as run_all:
            size_bytes = _tokenise(plan, prepared, chosen, f"tokenise part {part}", run_all, progress)
        return BuiltPart(plan, part, chosen, time.perf_counter() - started, size_bytes)


def _disk_errors(folder: Path) -> contextlib.AbstractContextManager[None]:
    return disk_errors("sharding", folder, then=f"what is finished is kept in {folder / WORK}")


def _plan_early(config: RunConfig) -> Plan | None:
    """The plan where no folder is yet: sources that cannot be read leave none behind."""
    folder = recipe.shard_folder(config)
    with _disk_errors(folder):
        return None if folder.exists() else make_plan(config)


def _forget(plan: Plan) -> None:
    """Remove what is of no use to the corrected configuration, which is another recipe."""
    shutil.rmtree(plan.work, ignore_errors=True)
    with contextlib.suppress(OSError):  # something else may be there: data.dir is anybody's folder
        plan.folder.rmdir()


@contextlib.contextmanager
def _unchanged(plan: Plan) -> Iterator[None]:
    """Raises DataMismatch where a source was changed meanwhile, in place of what reading half of it came to."""
    try:
        yield
    except (OSError, SourceError, EncodingError):
        check_unchanged(plan)
        raise
    check_unchanged(plan)


def _find_finished(config: RunConfig) -> Built | None:
    """The finished folder, if one stands there.

    Raises:
        DataMismatch: it is of another recipe.
    """
    folder = recipe.shard_folder(config)
    if not shards.exists(folder):
        return None
    opened = recipe.open_shards(config, "size")
    newer = recipe.newer_source(config, folder / shards.MANIFEST)
    return Built(folder=opened, seconds=0.0, size_bytes=0, fast=False, was_there=True, newer_source=newer)


def _find_read_only(config: RunConfig) -> Built | None:
    """The finished folder where the lock's file cannot be written, as training takes it."""
    folder = recipe.shard_folder(config)
    with _disk_errors(folder):
        return None if may_lock(folder) else _find_finished(config)


def _tokenise(
    plan: Plan, prepared: Prepared, chosen: list[int], stage: str, run_all: RunAll[Any], progress: ShardProgress
) -> int:
    """Tokenise those of the chosen tasks that are missing; returns their bytes."""
    data, context = plan.config.data, plan.config.model.context
    missing = set(plan.missing())
    jobs = [
        tasks.TokeniseJob(
            number=number,
            data=data,
            task=plan.tasks[number],
            start=prepared.starts[number],
            bounds=prepared.bounds,
            context=context,
            tokenizer=plan.tokenizer,
            fast=prepared.fast,
            work=plan.work,
        )
        for number in chosen
        if number in missing
    ]
    total, to_do = sum(plan.sizes[number] for number in chosen), sum(plan.sizes[job.number] for job in jobs)
    progress.stage(stage, total, total - to_do)
    for size in run_all(tasks.tokenise, jobs):
        progress.advance(size)
    return to_do
