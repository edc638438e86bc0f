"""What one process does: count a task's characters, tokenise a task, write a shard.

A task is a list of units (sources.group_units). Its tokens go into one .npz file per task, so that a
killed build resumes with the tasks that are missing. Everything here depends on its arguments alone,
never on which process runs it.
"""

import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.sharding import pack
from launcher.sharding.readers import Unit
from launcher.sharding.records import RECORD_ERRORS, Document, Found, read_documents
from launcher.sharding.samples import NotUsable, Sample, SampleMaker
from launcher.sharding.tokenize import Encoder
from launcher.sharding.unseen import SpecialText
from llmtrain import files
from llmtrain.config import data_sections as schema
from llmtrain.shards import ShardInfo, SplitName, write_shard

SPLITS: tuple[SplitName, ...] = ("train", "heldout", "test")
ASIDE = ".tmp.npz"
"""How the name of a task's file ends while it is being written; kills leave such files behind."""


@dataclass(frozen=True)
class Piece:
    """A document, or the part of one that lies in a split."""

    split: SplitName
    text: str
    begins: bool
    ends: bool
    """Whether the document ends here: then an end-of-text token follows."""
    document: Document


def count_characters(data: schema.DataSection, task: list[Unit]) -> int:
    """Of what is split by data.split; sources with a `use` lie outside of the text that is measured."""
    return sum(len(document.text) for use, document in _documents(data, task, Found()) if use is None)


def _documents(data: schema.DataSection, task: list[Unit], found: Found) -> Iterator[tuple[SplitName | None, Document]]:
    """Each with the `use` of its source."""
    for unit in task:
        source = data.sources[unit.source]
        for document in read_documents(source, unit, data.format, found):
            yield source.use, document
    found.problems.tell()


def tail_bounds(total: int, split: schema.SplitSection) -> tuple[int, int]:
    """(end of train, end of held-out) in characters of the whole text."""
    train = int(total * (1 - split.heldout - split.test) + 1e-6)
    return train, total if split.test == 0 else int(total * (1 - split.test) + 1e-6)


def split_document(
    document: Document, split: schema.SplitSection, start: int, bounds: tuple[int, int]
) -> Iterator[Piece]:
    """The pieces of a document that begins `start` characters into the whole text (`tail` alone uses that).

    A record stays whole: under `tail` it goes where its first character lies.
    """
    text = document.text
    if split.by == "hash":
        fraction = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        name: SplitName = (
            "test" if fraction < split.test else "heldout" if fraction < split.test + split.heldout else "train"
        )
        yield Piece(name, text, begins=True, ends=True, document=document)
        return
    if document.record is not None:
        name = SPLITS[sum(start >= bound for bound in bounds)]
        yield Piece(name, text, begins=True, ends=True, document=document)
        return
    end = start + len(text)
    for name, low, high in zip(SPLITS, (0, *bounds), (*bounds, max(end, bounds[1])), strict=True):
        piece = text[max(low, start) - start : max(min(high, end) - start, 0)]
        if piece and low < end and high > start:
            yield Piece(name, piece, begins=low <= start, ends=high >= end, document=document)


def read_pieces(
    data: schema.DataSection, task: list[Unit], start: int, bounds: tuple[int, int], found: Found
) -> Iterator[Piece]:
    """All pieces of a task whose text begins `start` characters into the whole."""
    split = data.rest_split
    for use, document in _documents(data, task, found):
        if use is not None:
            yield Piece(use, document.text, begins=True, ends=True, document=document)
            continue
        yield from split_document(document, split, start, bounds)
        start += len(document.text)


@dataclass(frozen=True)
class TokeniseJob:
    """Everything that the tokens of one task depend on."""

    number: int
    data: schema.DataSection
    task: list[Unit]
    start: int
    bounds: tuple[int, int]
    context: int
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

    The file holds, per split, `tokens`, `lens` (tokens per document, end-of-text included), `bytes` and
    `text_tokens` (what is learned, and the tokens that stand for it), and `learned`, a flag for each token, where
    not all are to be learned. And what was left out, and found, of the whole task (reasons.py).
    """
    key = (job.tokenizer, job.fast)
    encoder = _encoders.get(key) or _encoders.setdefault(key, Encoder(*key))
    prefix, found = encoder.prefix_ids, Found()
    tokens = {name: _Tokens() for name in SPLITS}
    format, maker = job.data.format, None
    if not isinstance(format, schema.TextFormat):
        maker = SampleMaker(format, encoder, job.tokenizer, limit=job.context + 1, noted=found.noted)
    special = SpecialText([] if isinstance(format, schema.ChatFormat) else encoder.special_tokens)
    special.note_template(format, found.noted)
    for piece in read_pieces(job.data, job.task, job.start, job.bounds, found):
        if piece.begins:
            special.note(piece.document.text, found.noted)
        if maker is None:
            before = prefix if piece.begins else []
            after = [encoder.eos_id] if piece.ends else []
            ids = np.concatenate([np.array(before, np.uint32), encoder.encode(piece.text), np.array(after, np.uint32)])
            # A document's first token is predicted only where rows go on across documents: that of a prefix would count
            # as text whose loss nothing measures.
            unmeasured = len(before[:1]) if job.data.packing != "contiguous" else 0
            tokens[piece.split].add(ids, piece.text, len(ids) - unmeasured)
            continue
        try:
            sample = maker.make(piece.document)
        except NotUsable as reason:
            found.skipped[str(reason)] += 1
            continue
        except RECORD_ERRORS as error:
            found.problems.add(error, piece.document.where)
            continue
        found.cut += sample.cut
        tokens[piece.split].add_sample(sample)
    arrays: dict[str, Any] = {
        "cut": np.array([found.cut]),
        "records": np.array([found.records]),
        "separators": np.array([found.separators[number] for number in range(len(job.data.sources))], np.int64),
    }
    for name, counter in (("skipped", found.skipped), ("field", found.fields), ("noted", found.noted)):
        arrays[f"{name}_names"] = np.array(sorted(counter), str)
        arrays[f"{name}_counts"] = np.array([counter[each] for each in sorted(counter)], np.int64)
    for name in SPLITS:
        arrays |= {f"{name}_{key}": array for key, array in tokens[name].arrays(encoder.vocab_size).items()}
    _write_whole(job.result, arrays)
    return sum(unit.size_bytes for unit in job.task)


def _write_whole(path: Path, arrays: dict[str, Any]) -> None:
    """Write an .npz file in one rename."""
    aside = path.with_suffix(f".{uuid.uuid4().hex}{ASIDE}")  # processes on two machines may have the same number
    try:
        np.savez(aside, **arrays)
        files.sync(aside)
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class _Tokens:
    """The tokens of a task that go into one split."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.uint32]] = []
        self._learned: list[NDArray[np.uint8]] = []
        self._bytes = self._text_tokens = 0

    def add(self, ids: NDArray[np.uint32], text: str, text_tokens: int) -> None:
        self._ids.append(ids)
        self._bytes += len(text.encode())
        self._text_tokens += text_tokens

    def add_sample(self, sample: Sample) -> None:
        self._ids.append(sample.ids)
        self._learned.append(sample.learned)
        self._bytes += sample.learned_bytes
        self._text_tokens += int(sample.learned.sum())

    def arrays(self, vocab_size: int) -> dict[str, NDArray[Any]]:
        """Flags are written where any were given."""
        nothing = np.zeros(0, np.uint32)
        return {
            "tokens": np.concatenate([nothing, *self._ids]).astype(token_dtype(vocab_size)),
            "lens": np.array([len(ids) for ids in self._ids], np.int64),
            "learned": np.concatenate([nothing, *self._learned]).astype(np.uint8),
            "bytes": np.array([self._bytes], np.int64),
            "text_tokens": np.array([self._text_tokens], np.int64),
        }


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
    """Of the documents in the range; None for contiguous packing."""
    work: Path
    task_starts: NDArray[np.int64]
    """Where each task's tokens begin in the stream; one more entry for the end."""
    context: int
    padding_id: int
    together: bool
    """Several documents a row."""
    masked: bool
    """Some tokens are not to be learned."""


@dataclass(frozen=True)
class Packed:
    info: ShardInfo
    targets: int
    dropped: int


def write_packed(job: PackJob) -> Packed:
    """Write one shard and describe it."""
    stream = _read_stream(job, "tokens")
    dropped = 0
    if job.doc_lens is None:
        rows = pack.pack_contiguous(stream, job.context, job.padding_id)
    else:
        learned = _read_stream(job, "learned") if job.masked else None
        rows, dropped = pack.pack_documents(
            stream, learned, job.doc_lens, job.context, job.padding_id, together=job.together
        )
    write_shard(job.path, rows)
    info = ShardInfo(
        file=job.path.name,
        size_bytes=job.path.stat().st_size,
        sha256=files.sha256(job.path),
        rows=len(rows.tokens),
        tokens=sum(int(lens.sum()) for lens in rows.doc_lens),
        max_id=int(rows.tokens.max(initial=0)),
    )
    return Packed(info, pack.count_targets(rows), dropped)


def _read_stream(job: PackJob, kind: str) -> NDArray[Any]:
    first = int(np.searchsorted(job.task_starts, job.start, side="right")) - 1
    parts = []
    for number in range(first, len(job.task_starts) - 1):
        begin = int(job.task_starts[number])
        if begin >= job.stop:
            break
        with np.load(task_file(job.work, number)) as arrays:
            parts.append(arrays[f"{job.split}_{kind}"][max(0, job.start - begin) : job.stop - begin])
    return np.concatenate(parts)
