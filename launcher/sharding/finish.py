"""The end of a build: pack the tokens of all tasks into shards, and move them into place.

The manifest appears last, so a folder with one is whole.
"""

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.sharding import pack, reasons, tasks, tokenize
from launcher.sharding.processes import RunAll
from launcher.sharding.progress import ShardProgress
from launcher.sharding.records import Found
from launcher.sharding.work import Plan, remove_work, take_manifest
from llmtrain import files, recipe, shards
from llmtrain.config.schema import RunConfig
from llmtrain.errors import TooLittleData
from llmtrain.shards import ShardManifest, SplitInfo, SplitName, TokenizerInfo

_SHARD_BYTES = 64_000_000


def write_shards(plan: Plan, found: Found, run_all: RunAll[Any], progress: ShardProgress) -> ShardManifest:
    """Write all shards into WORK/out; returns the manifest that describes them.

    Raises:
        TooLittleData: a split would have no row.
    """
    config, work, num_tasks = plan.config, plan.work, len(plan.tasks)
    encoder = tokenize.Encoder(plan.tokenizer, fast=False)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    streams = {name: _Stream.read(work, name, num_tasks) for name in tasks.SPLITS}
    progress.stage("pack", sum(stream.text_bytes for stream in streams.values()))
    splits: dict[SplitName, SplitInfo] = {}
    for name in tasks.SPLITS:
        if name == "test" and not config.data.has_test:
            continue
        stream = streams[name]
        jobs, dropped = _pack_jobs(config, name, stream, work, encoder)
        packed = list(run_all(tasks.write_packed, jobs))
        progress.advance(stream.text_bytes)
        if not any(each.info.rows for each in packed):
            raise TooLittleData(reasons.too_little(config, name, stream.tokens, len(stream.doc_lens), found))
        splits[name] = _describe(stream, packed, dropped)
    return ShardManifest(
        recipe=recipe.recipe_of(config),
        tokenizer=TokenizerInfo(
            sha256=files.sha256(plan.tokenizer / "tokenizer.json"), vocab_size=encoder.vocab_size, eos_id=encoder.eos_id
        ),
        context=config.model.context,
        packing=config.data.packing,
        splits=splits,
        skipped=dict(sorted(found.skipped.items())),
        cut=found.cut,
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
        return tasks.PackJob(
            path=work / "out" / f"{name}-{number:05d}.arrow",
            split=name,
            start=start,
            stop=stop,
            doc_lens=doc_lens,
            work=work,
            task_starts=stream.task_starts,
            context=context,
            padding_id=encoder.eos_id,
            together=config.data.packing == "bestfit",
            masked=stream.masked,
        )

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


def _describe(stream: _Stream, packed: list[tasks.Packed], dropped: int) -> SplitInfo:
    packed = sorted(packed, key=lambda p: p.info.file)
    return SplitInfo(
        rows=sum(p.info.rows for p in packed),
        tokens=sum(p.info.tokens for p in packed),
        targets=sum(p.targets for p in packed),
        documents=len(stream.doc_lens),
        text_bytes=stream.text_bytes,
        text_tokens=stream.text_tokens,
        tokens_dropped=dropped + sum(p.dropped for p in packed),
        shards=[p.info for p in packed],
    )


def publish(plan: Plan, manifest: ShardManifest) -> None:
    """Move the new shards into place, the manifest last; an older build is gone before.

    Raises:
        ConfigError: a tokenizer that no build has written stands in its way.
    """
    folder, work = plan.folder, plan.work
    take_manifest(plan)
    for split in tasks.SPLITS:
        for old in folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].arrow"):
            old.unlink()
    shutil.rmtree(folder / shards.TOKENIZER, ignore_errors=True)
    # A copy: killed before the manifest is written, the next try needs the tokenizer in its work folder.
    shutil.copytree(plan.tokenizer, work / "out" / shards.TOKENIZER)
    for new in sorted((work / "out").iterdir()):
        new.rename(folder / new.name)
    files.sync(folder)
    files.write_atomic(folder / shards.MANIFEST, manifest.to_bytes())
    remove_work(folder)
