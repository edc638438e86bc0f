"""What one process does: count a task's characters, tokenise a task, write a shard.

A task is a list of units (sources.group_units). Its tokens go into one .npz file per task, so that a
killed build goes on with the tasks that are missing. Everything here depends on its arguments alone,
never on which process runs it.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.sharding import pack
from launcher.sharding.sources import Unit, read_documents
from launcher.sharding.tokenize import Encoder
from llmtrain import files
from llmtrain.config import schema
from llmtrain.shards import ShardInfo, SplitName, Tokens, write_shard

SPLITS: tuple[SplitName, ...] = ("train", "heldout", "test")


@dataclass(frozen=True)
class Piece:
    """A document, or the part of one that lies in a split."""

    split: SplitName
    text: str
    ends: bool
    """Whether the document ends here: then an end-of-text token follows."""


def count_characters(sources: list[schema.Source], task: list[Unit]) -> int:
    return sum(len(text) for unit in task for text in read_documents(sources[unit.source], unit, Counter()))


def tail_bounds(total: int, split: schema.SplitSection) -> tuple[int, int]:
    """(end of train, end of held-out) in characters of the whole text."""
    train = int(total * (1 - split.heldout - split.test) + 1e-6)
    return train, total if split.test == 0 else int(total * (1 - split.test) + 1e-6)


def split_document(text: str, split: schema.SplitSection, start: int, bounds: tuple[int, int]) -> Iterator[Piece]:
    """The pieces of a document that begins `start` characters into the whole text (`tail` alone uses that)."""
    if split.by == "hash":
        fraction = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        name: SplitName = (
            "test" if fraction < split.test else "heldout" if fraction < split.test + split.heldout else "train"
        )
        yield Piece(name, text, ends=True)
        return
    end = start + len(text)
    for name, low, high in zip(SPLITS, (0, *bounds), (*bounds, max(end, bounds[1])), strict=True):
        piece = text[max(low, start) - start : max(min(high, end) - start, 0)]
        if piece and low < end and high > start:
            yield Piece(name, piece, ends=high >= end)


def read_pieces(
    sources: list[schema.Source],
    task: list[Unit],
    split: schema.SplitSection,
    start: int,
    bounds: tuple[int, int],
    skipped: Counter[str],
) -> Iterator[Piece]:
    """All pieces of a task whose text begins `start` characters into the whole."""
    for unit in task:
        for text in read_documents(sources[unit.source], unit, skipped):
            yield from split_document(text, split, start, bounds)
            start += len(text)


@dataclass(frozen=True)
class TokeniseJob:
    """Everything that the tokens of one task depend on."""

    number: int
    data: schema.DataSection
    task: list[Unit]
    start: int
    bounds: tuple[int, int]
    tokenizer: Path
    fast: bool
    work: Path

    @property
    def result(self) -> Path:
        return task_file(self.work, self.number)


def task_file(work: Path, number: int) -> Path:
    return work / f"tokens-{number:06d}.npz"


_encoders: dict[tuple[Path, bool], Encoder] = {}  # loading one takes longer than a small task


def tokenise(job: TokeniseJob) -> int:
    """Write the task's tokens; returns the bytes of text done.

    The file holds, per split, `tokens`, `lens` (tokens per document, end-of-text included) and `bytes`.
    """
    key = (job.tokenizer, job.fast)
    encoder = _encoders.get(key) or _encoders.setdefault(key, Encoder(*key))
    skipped: Counter[str] = Counter()
    dtype = token_dtype(encoder.vocab_size)
    end = np.array([encoder.eos_id], np.uint32)
    parts: dict[str, list[NDArray[np.uint32]]] = {name: [] for name in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    for piece in read_pieces(job.data.sources, job.task, job.data.split, job.start, job.bounds, skipped):
        ids = encoder.encode(piece.text)
        parts[piece.split].append(np.concatenate([ids, end]) if piece.ends else ids)
        text_bytes[piece.split] += len(piece.text.encode())
    arrays: dict[str, Any] = {
        "skipped_names": np.array(sorted(skipped), str),
        "skipped_counts": np.array([skipped[name] for name in sorted(skipped)], np.int64),
    }
    for name in SPLITS:
        documents = parts[name]
        arrays[f"{name}_tokens"] = np.concatenate([np.zeros(0, np.uint32), *documents]).astype(dtype)
        arrays[f"{name}_lens"] = np.array([len(ids) for ids in documents], np.int64)
        arrays[f"{name}_bytes"] = np.array([text_bytes[name]], np.int64)
    aside = job.result.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(aside, **arrays)
    files.sync(aside)
    aside.rename(job.result)
    return sum(unit.size_bytes for unit in job.task)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class PackJob:
    """One shard: tokens [start, stop) of a split's stream, which the tasks hold one after another."""

    path: Path
    split: SplitName
    start: int
    stop: int
    doc_lens: NDArray[np.int64] | None
    """Of the documents in the range, for best-fit packing; None for contiguous."""
    work: Path
    task_starts: NDArray[np.int64]
    """Where each task's tokens begin in the stream; one more entry for the end."""
    context: int
    padding_id: int


@dataclass(frozen=True)
class Packed:
    info: ShardInfo
    targets: int
    dropped: int


def write_packed(job: PackJob) -> Packed:
    """Write one shard and describe it."""
    stream = _read_stream(job)
    dropped = 0
    if job.doc_lens is None:
        rows = pack.pack_contiguous(stream, job.context, job.padding_id)
    else:
        rows, dropped = pack.pack_bestfit(stream, job.doc_lens, job.context, job.padding_id)
    write_shard(job.path, rows)
    lens = np.concatenate([np.zeros(0, np.int32), *rows.doc_lens])
    info = ShardInfo(
        file=job.path.name,
        size_bytes=job.path.stat().st_size,
        sha256=files.sha256(job.path),
        rows=len(rows.tokens),
        tokens=int(lens.sum()),
        max_id=int(rows.tokens.max(initial=0)),
    )
    return Packed(info, int((lens - 1).sum()), dropped)


def _read_stream(job: PackJob) -> Tokens:
    first = int(np.searchsorted(job.task_starts, job.start, side="right")) - 1
    parts = []
    for number in range(first, len(job.task_starts) - 1):
        begin = int(job.task_starts[number])
        if begin >= job.stop:
            break
        with np.load(task_file(job.work, number)) as arrays:
            parts.append(arrays[f"{job.split}_tokens"][max(0, job.start - begin) : job.stop - begin])
    return np.concatenate(parts)
