"""Build a shard folder: list, tokenise, pack, publish.

Work in progress lies in FOLDER/.work, one file per finished task, under a key made of the recipe and
of every source file's size and time: a killed build goes on, a changed source starts anew. The
manifest appears last, so a folder with one is whole. The same input gives the same bytes, for any
number of processes.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.sharding import pack, tasks, tokenize
from launcher.sharding.processes import RunAll, processes
from launcher.sharding.progress import ShardProgress
from launcher.sharding.records import Unit
from launcher.sharding.sources import default_workers, group_units, list_units
from llmtrain import files, recipe, shards
from llmtrain.config.data_sections import DataSection
from llmtrain.config.schema import RunConfig
from llmtrain.errors import SourceError, TooLittleData, disk_errors
from llmtrain.shards import ShardFolder, ShardManifest, SplitInfo, SplitName, TokenizerInfo

_SHARD_BYTES = 64_000_000
_SLICE = 16_384
"""Characters; what is taken into the sample that a tokenizer is trained on, or left out of it, as one."""
_PROOF_TASKS, _PROOF_TEXTS, _PROOF_CHARACTERS = 8, 8, 8192


@dataclass(frozen=True)
class Built:
    """What a build came to."""

    folder: ShardFolder
    seconds: float
    size_bytes: int
    fast: bool
    """Whether tiktoken did the work."""
    was_there: bool


def build(config: RunConfig, workers: int | None = None, force: bool = False) -> Built:
    """Build the shards of `config`, or find them finished.

    Raises:
        SourceError, EncodingError, TokenizerError, TooLittleData: the input cannot be used.
        DataMismatch: a finished folder of another recipe stands there (and not `force`).
        DiskFull: no room; what was finished is kept for the next try.
    """
    folder = recipe.shard_folder(config)
    with disk_errors("sharding", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusively(folder):
            if shards.exists(folder) and not force:
                opened = shards.open_folder(folder, "size")
                opened.check_recipe(recipe.recipe_of(config), recipe.tokenizer_file(config))
                shutil.rmtree(folder / ".work", ignore_errors=True)  # of a build killed just after its manifest
                return Built(opened, 0.0, 0, fast=False, was_there=True)
            return _build(config, folder, workers or default_workers(), force)


def _build(config: RunConfig, folder: Path, workers: int, force: bool) -> Built:
    started, work = time.perf_counter(), folder / ".work"
    units = list_units(config.data.sources, config.data.format)
    if not units:
        raise SourceError("the sources hold no text at all")
    todo = group_units(units)
    sizes = [sum(unit.size_bytes for unit in task) for task in todo]
    _open_work(work, config, units, force)
    with ShardProgress() as progress, processes(workers) as run_all:
        starts, bounds = _place_in_text(config, todo, sizes, run_all, progress)
        tokenizer = work / shards.TOKENIZER
        if not (work / "tokenizer-done").exists():
            progress.stage("tokenizer", _training_bytes(config, sum(sizes)))
            texts = _training_texts(config, todo, starts, bounds, sum(sizes), progress)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(tokenizer)
            tokenize.prepare(config.data, tokenizer, texts)
            fast = tokenize.same_ids(tokenizer, _proof_texts(config, todo, starts, bounds))
            files.write_atomic(work / "tokenizer-done", json.dumps(fast))
        fast = bool(json.loads((work / "tokenizer-done").read_text()))
        jobs = [
            tasks.TokeniseJob(
                number, config.data, task, starts[number], bounds, config.model.context, tokenizer, fast, work
            )
            for number, task in enumerate(todo)
        ]
        missing = [job for job in jobs if not job.result.exists()]
        progress.stage("tokenise", sum(sizes), sum(sizes) - sum(sizes[job.number] for job in missing))
        for size in run_all(tasks.tokenise, missing):
            progress.advance(size)
        manifest = _pack(config, work, len(todo), tokenizer, run_all, progress)
    _publish(folder, work, manifest)
    opened = shards.open_folder(folder, "size")
    return Built(opened, time.perf_counter() - started, sum(sizes), fast, was_there=False)


@contextlib.contextmanager
def _exclusively(folder: Path) -> Iterator[None]:
    """One build at a time; a second one waits, and then finds the folder finished."""
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open_work(work: Path, config: RunConfig, units: list[Unit], force: bool) -> None:
    """Keep the finished tasks of an earlier try if they are of the same input."""
    file = recipe.tokenizer_file(config)
    tokenizer = None if file is None else files.sha256(file)
    made_from = json.dumps([recipe.recipe_of(config), tokenizer, [asdict(unit) for unit in units]], sort_keys=True)
    key = hashlib.sha256(made_from.encode()).hexdigest()
    marker = work / "key"
    if work.exists() and (force or not marker.exists() or marker.read_text() != key):
        shutil.rmtree(work)
    if not work.exists():
        work.mkdir()
        files.write_atomic(marker, key)


def _count(data: DataSection, numbered: tuple[int, list[Unit]]) -> tuple[int, int]:
    return numbered[0], tasks.count_characters(data, numbered[1])


def _place_in_text(
    config: RunConfig, todo: list[list[Unit]], sizes: list[int], run_all: RunAll[Any], progress: ShardProgress
) -> tuple[list[int], tuple[int, int]]:
    """Where each task begins in the whole text, in characters, and the bounds of the splits (`tail` only)."""
    if config.data.split.by == "hash":
        return [0] * len(todo), (0, 0)
    progress.stage("measure", sum(sizes))
    counts = [0] * len(todo)
    for number, count in run_all(functools.partial(_count, config.data), list(enumerate(todo))):
        counts[number] = count
        progress.advance(sizes[number])
    starts = [0, *np.cumsum(counts).tolist()]
    return starts[:-1], tasks.tail_bounds(starts[-1], config.data.split)


def _training_bytes(config: RunConfig, size_bytes: int) -> int:
    chosen = config.data.tokenizer
    return min(chosen.train_bytes, size_bytes) if chosen.kind == "train" else 0


def _training_texts(
    config: RunConfig,
    todo: list[list[Unit]],
    starts: list[int],
    bounds: tuple[int, int],
    size_bytes: int,
    progress: ShardProgress,
) -> Iterator[str]:
    """Text of the training split, at most `train_bytes` of it, taken evenly from the whole.

    In slices, so that one long document is neither all of the sample nor none of it.
    """
    chosen = config.data.tokenizer
    left = chosen.train_bytes if chosen.kind == "train" else 0
    share = min(1.0, left / max(1, size_bytes))
    width, owed = max(256, min(_SLICE, left // 8)), 0.0
    for start, task in zip(starts, todo, strict=True):
        for piece in tasks.read_pieces(config.data, task, start, bounds, Counter()):
            for first in range(0, len(piece.text) if piece.split == "train" else 0, width):
                text = piece.text[first : first + width]
                size = len(text.encode())
                owed += size * share
                if owed >= size / 2 and size <= left:
                    owed, left = owed - size, left - size
                    progress.advance(size)
                    yield text


def _proof_texts(
    config: RunConfig, todo: list[list[Unit]], starts: list[int], bounds: tuple[int, int]
) -> Iterator[str]:
    """Some documents from all over the corpus, on which the fast tokenizer has to prove itself."""
    step = max(1, len(todo) // _PROOF_TASKS)
    for start, task in zip(starts[::step], todo[::step], strict=True):
        pieces = tasks.read_pieces(config.data, task, start, bounds, Counter())
        yield from (piece.text[:_PROOF_CHARACTERS] for piece in itertools.islice(pieces, _PROOF_TEXTS))


def _pack(
    config: RunConfig, work: Path, num_tasks: int, tokenizer: Path, run_all: RunAll[Any], progress: ShardProgress
) -> ShardManifest:
    """Write all shards into WORK/out; returns the manifest that describes them."""
    encoder = tokenize.Encoder(tokenizer, fast=False)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    streams = {name: _Stream.read(work, name, num_tasks) for name in tasks.SPLITS}
    skipped: Counter[str] = Counter()
    cut = 0
    for number in range(num_tasks):
        with np.load(tasks.task_file(work, number)) as arrays:
            cut += int(arrays["cut"][0])
            names = arrays["skipped_names"].tolist()
            skipped.update(dict(zip(names, arrays["skipped_counts"].tolist(), strict=True)))
    progress.stage("pack", sum(stream.text_bytes for stream in streams.values()))
    splits: dict[SplitName, SplitInfo] = {}
    for name in tasks.SPLITS:
        if name == "test" and config.data.split.test == 0:
            continue
        jobs, dropped = _pack_jobs(config, name, streams[name], work, encoder)
        packed = list(run_all(tasks.write_packed, jobs))
        progress.advance(streams[name].text_bytes)
        splits[name] = _describe(name, config, streams[name], packed, dropped)
    return ShardManifest(
        recipe=recipe.recipe_of(config),
        tokenizer=TokenizerInfo(
            sha256=files.sha256(tokenizer / "tokenizer.json"), vocab_size=encoder.vocab_size, eos_id=encoder.eos_id
        ),
        context=config.model.context,
        packing=config.data.packing,
        splits=splits,
        skipped=dict(sorted(skipped.items())),
        cut=cut,
    )


@dataclass(frozen=True)
class _Stream:
    """A split's tokens, as the tasks hold them."""

    task_starts: NDArray[np.int64]
    doc_lens: NDArray[np.int64]
    text_bytes: int
    text_tokens: int
    masked: bool

    @classmethod
    def read(cls, work: Path, split: SplitName, num_tasks: int) -> "_Stream":
        lens, text_bytes, text_tokens, masked = [], 0, 0, False
        for number in range(num_tasks):
            with np.load(tasks.task_file(work, number)) as arrays:
                lens.append(arrays[f"{split}_lens"])
                text_bytes += int(arrays[f"{split}_bytes"][0])
                text_tokens += int(arrays[f"{split}_text_tokens"][0])
                masked |= len(arrays[f"{split}_learned"]) > 0
        starts = np.cumsum([0, *(int(task_lens.sum()) for task_lens in lens)])
        return cls(starts, np.concatenate(lens), text_bytes, text_tokens, masked)

    @property
    def tokens(self) -> int:
        return int(self.task_starts[-1])


def _pack_jobs(
    config: RunConfig, name: SplitName, stream: _Stream, work: Path, encoder: tokenize.Encoder
) -> tuple[list[tasks.PackJob], int]:
    """One job per shard, and the tokens that no shard takes."""
    context = config.model.context
    itemsize = np.dtype(tasks.token_dtype(encoder.vocab_size)).itemsize
    shard_rows = max(1, _SHARD_BYTES // ((context + 1) * itemsize))

    def job(number: int, start: int, stop: int, doc_lens: NDArray[np.int64] | None) -> tasks.PackJob:
        path = work / "out" / f"{name}-{number:05d}.arrow"
        return tasks.PackJob(
            path, name, start, stop, doc_lens, work, stream.task_starts, context, encoder.eos_id,
            together=config.data.packing == "bestfit", masked=stream.masked,
        )  # fmt: skip

    if config.data.packing == "contiguous":
        rows, dropped = pack.contiguous_rows(stream.tokens, context, keep_rest=name != "train")
        firsts = range(0, rows, shard_rows)
        return [
            job(n, first * context, min(min(first + shard_rows, rows) * context + 1, stream.tokens), None)
            for n, first in enumerate(firsts)
        ], dropped
    # Each shard packs the documents of a fixed amount of tokens (or a fixed number), so shards are independent.
    doc_ends = np.cumsum(stream.doc_lens)
    if config.data.packing == "bestfit":
        cuts = np.searchsorted(doc_ends, np.arange(0, stream.tokens, shard_rows * (context + 1)))
    else:
        cuts = np.arange(0, len(doc_ends), shard_rows)
    edges = [*np.unique(cuts).tolist(), len(doc_ends)] if stream.tokens else [0]
    jobs = []
    for first, last in itertools.pairwise(edges):
        if last > first and (stream.doc_lens[first:last] > 1).any():
            start = int(doc_ends[first] - stream.doc_lens[first])
            jobs.append(job(len(jobs), start, int(doc_ends[last - 1]), stream.doc_lens[first:last]))
    return jobs, 0


def _describe(
    name: SplitName, config: RunConfig, stream: _Stream, packed: list[tasks.Packed], dropped: int
) -> SplitInfo:
    packed = sorted(packed, key=lambda p: p.info.file)
    rows = sum(p.info.rows for p in packed)
    if rows == 0:
        raise TooLittleData(
            f"the {name} split has {stream.tokens} tokens of {len(stream.doc_lens)} documents: not one row of "
            f"{config.model.context} tokens. Use more text, a shorter model.context, or "
            + (
                "data.split.by=tail (few documents cannot be split by their hash)"
                if config.data.split.by == "hash"
                else f"a larger data.split.{name if name != 'train' else 'heldout'}"
            )
        )
    return SplitInfo(
        rows=rows,
        tokens=sum(p.info.tokens for p in packed),
        targets=sum(p.targets for p in packed),
        documents=len(stream.doc_lens),
        text_bytes=stream.text_bytes,
        text_tokens=stream.text_tokens,
        tokens_dropped=dropped + sum(p.dropped for p in packed),
        shards=[p.info for p in packed],
    )


def _publish(folder: Path, work: Path, manifest: ShardManifest) -> None:
    """Move the new shards into place, the manifest last; an older build is gone before."""
    (folder / shards.MANIFEST).unlink(missing_ok=True)
    for split in tasks.SPLITS:
        for old in folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].arrow"):
            old.unlink()
    shutil.rmtree(folder / shards.TOKENIZER, ignore_errors=True)
    # A copy: killed before the manifest is written, the next try needs the tokenizer in its work folder.
    shutil.copytree(work / shards.TOKENIZER, work / "out" / shards.TOKENIZER)
    for new in sorted((work / "out").iterdir()):
        new.rename(folder / new.name)
    files.sync(folder)
    files.write_atomic(folder / shards.MANIFEST, manifest.to_bytes())
    shutil.rmtree(work)
