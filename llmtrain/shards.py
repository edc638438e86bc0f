"""Token shards: the file format between sharding and training. Only this module knows it.

A shard folder holds

    manifest.json                what is in it, with size and SHA-256 of every file; written last
    tokenizer/                   tokenizer.json and tokenizer_config.json, as transformers reads them
    train-00000.arrow ...        Arrow IPC streams, readable with `datasets.Dataset.from_file`
    heldout-00000.arrow ...  test-00000.arrow ...

Each shard is one record batch with one row per training sequence:

    input_ids   fixed_size_list<uint16 or uint32>[context + 1]   so that reading is a zero-copy map
    doc_lens    list<int32>    lengths of the documents in the row; what their sum leaves is padding
    loss_mask   fixed_size_list<uint8>[context + 1]   optional: 1 where the token is to be learned

A row holds one token more than the context because inputs are `ids[:-1]` and targets `ids[1:]`.
The SHA-256 of manifest.json is the data set's fingerprint, so it holds nothing that differs between
two builds of the same input (no dates, no machine's paths).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pydantic
from numpy.typing import NDArray

from llmtrain import files
from llmtrain.errors import DataMismatch, ShardError, VocabularyError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"

Tokens = NDArray[np.unsignedinteger[Any]]
SplitName = Literal["train", "heldout", "test"]


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ShardInfo(_Record):
    file: str
    size_bytes: int
    sha256: str
    rows: int
    tokens: int
    """Tokens without padding."""
    max_id: int


class SplitInfo(_Record):
    rows: int
    tokens: int
    """Tokens without padding, over all shards."""
    targets: int
    """Tokens that are predicted and count in the loss."""
    documents: int
    text_bytes: int
    """UTF-8 bytes of the text to be learned; for bits per byte."""
    text_tokens: int
    """Tokens of that text (end-of-text tokens included), before packing dropped or repeated any."""
    tokens_dropped: int
    """Tokens at the end that did not fill a row (contiguous training split only)."""
    shards: list[ShardInfo]


class TokenizerInfo(_Record):
    sha256: str
    """Of tokenizer.json."""
    vocab_size: int
    eos_id: int


class ShardManifest(_Record):
    format: Literal["llmtrain-shards-1"] = "llmtrain-shards-1"
    recipe: dict[str, Any]
    """What the shards were made from: `recipe_of` the configuration."""
    tokenizer: TokenizerInfo
    context: int
    packing: Literal["contiguous", "bestfit", "none"]
    splits: dict[SplitName, SplitInfo]
    skipped: dict[str, int] = {}
    """Documents left out, by reason."""
    cut: int = 0
    """Samples whose prompt lacks its beginning, to fit into the context."""

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()

    @property
    def tokens_per_row(self) -> float:
        """Tokens that a training row gives the model, padding left out; the average where rows hold whole documents."""
        if self.packing == "contiguous":
            return float(self.context)
        return self.splits["train"].tokens / self.splits["train"].rows


@dataclass(frozen=True)
class Rows:
    """Some rows of a split, as stored."""

    tokens: Tokens  # (rows, context + 1)
    doc_lens: list[NDArray[np.int32]]
    loss_mask: NDArray[np.uint8] | None  # (rows, context + 1)


def write_shard(path: Path, rows: Rows) -> None:
    """Write one shard file (not atomically: the manifest, written last, is what makes it count)."""
    width = rows.tokens.shape[1]
    doc_offsets = np.zeros(len(rows.doc_lens) + 1, np.int32)
    np.cumsum([len(lens) for lens in rows.doc_lens], out=doc_offsets[1:])
    doc_values = np.concatenate(rows.doc_lens) if rows.doc_lens else np.zeros(0, np.int32)
    columns: dict[str, pa.Array] = {
        "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(rows.tokens.reshape(-1)), width),
        "doc_lens": pa.ListArray.from_arrays(doc_offsets, pa.array(doc_values, pa.int32())),
    }
    if rows.loss_mask is not None:
        mask = pa.array(rows.loss_mask.reshape(-1), pa.uint8())
        columns["loss_mask"] = pa.FixedSizeListArray.from_arrays(mask, width)
    batch = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    files.sync(path)


class _Shard:
    """One memory-mapped shard."""

    def __init__(self, path: Path, context: int):
        batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
        self.tokens = _fixed_lists(batch.column("input_ids"), context + 1)
        doc_lens = batch.column("doc_lens")
        self.doc_offsets = _numbers(doc_lens.offsets)
        self.doc_values = _numbers(doc_lens.values)
        names = batch.schema.names
        self.loss_mask = _fixed_lists(batch.column("loss_mask"), context + 1) if "loss_mask" in names else None

    def doc_lens(self, row: int) -> NDArray[np.int32]:
        return self.doc_values[self.doc_offsets[row] : self.doc_offsets[row + 1]]


def _numbers(column: pa.Array) -> Any:
    """The same memory. `to_numpy` would import pandas, an eighth of the time that a rank takes to start."""
    return np.from_dlpack(column)


def _fixed_lists(column: pa.FixedSizeListArray, width: int) -> Any:
    if column.type.list_size != width:
        raise ValueError(f"rows of {column.type.list_size} tokens instead of {width}")
    return _numbers(column.values).reshape(-1, width)


class ShardSet:
    """One split, as one long table of rows, read through memory maps.

    Built by `ShardFolder.split`. Rows are numbered from 0 in the order of the shards.
    """

    def __init__(self, folder: Path, info: SplitInfo, context: int):
        self.info = info
        self.context = context
        self.num_rows = info.rows
        self._shards: list[_Shard] = []
        for shard in info.shards:
            try:
                self._shards.append(_Shard(folder / shard.file, context))
            except (OSError, StopIteration, pa.ArrowException, ValueError, KeyError) as error:
                raise ShardError(f"{folder / shard.file}: cannot be read as a shard ({error}); {REBUILD}") from error
        self._starts = np.cumsum([0, *(shard.rows for shard in info.shards)])

    def largest_id(self) -> int:
        """Of all tokens, padding included. Reads everything."""
        return max((int(shard.tokens.max(initial=0)) for shard in self._shards), default=0)

    def fullest_row(self) -> int:
        """The number of a row with the most documents. Looks at all rows, but reads a number of each alone."""
        counts = [np.diff(shard.doc_offsets) for shard in self._shards]
        number = max(range(len(counts)), key=lambda each: int(counts[each].max(initial=0)))
        return int(self._starts[number]) + int(counts[number].argmax())

    def rows(self, ids: NDArray[np.int64]) -> Rows:
        """Copies of the rows with these numbers, in this order."""
        shard_of = np.searchsorted(self._starts, ids, side="right") - 1
        first = self._shards[0]
        tokens: Tokens = np.empty((len(ids), self.context + 1), first.tokens.dtype)
        mask = None if first.loss_mask is None else np.empty(tokens.shape, np.uint8)
        doc_lens: list[NDArray[np.int32]] = []
        for i, (number, row) in enumerate(zip(shard_of, ids - self._starts[shard_of], strict=True)):
            shard = self._shards[number]
            tokens[i] = shard.tokens[row]
            doc_lens.append(shard.doc_lens(row))
            if mask is not None and shard.loss_mask is not None:
                mask[i] = shard.loss_mask[row]
        return Rows(tokens, doc_lens, mask)


REBUILD = "build the shards again with 'llmtrain shard CONFIG --force'"


@dataclass(frozen=True)
class ShardFolder:
    """An opened shard folder; `open_folder` verifies it."""

    path: Path
    manifest: ShardManifest
    fingerprint: str

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    def split(self, name: SplitName) -> ShardSet:
        return ShardSet(self.path, self.manifest.splits[name], self.manifest.context)


def exists(folder: Path) -> bool:
    """Whether a finished build stands there (its manifest is written last)."""
    return (folder / MANIFEST).exists()


def open_folder(folder: Path, verify: Literal["sha256", "size"] = "sha256") -> ShardFolder:
    """Open a shard folder and check it: sizes always; with `sha256` every byte and every token id.

    Raises:
        ShardError: a file is missing, truncated or altered.
        VocabularyError: a token id lies outside the tokenizer's vocabulary.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = ShardManifest.model_validate_json(content)
    except FileNotFoundError:
        raise ShardError(f"{folder / MANIFEST}: missing; run 'llmtrain shard CONFIG' first") from None
    except (OSError, pydantic.ValidationError) as error:
        raise ShardError(f"{folder / MANIFEST}: not a manifest of this version; {REBUILD}\n{error}") from error
    opened = ShardFolder(folder, manifest, hashlib.sha256(content).hexdigest())
    _check_tokenizer(opened)
    for name, split in manifest.splits.items():
        for shard in split.shards:
            _check_shard(folder / shard.file, shard, verify)
        largest = max((shard.max_id for shard in split.shards), default=0)
        if verify == "sha256":
            largest = max(largest, opened.split(name).largest_id())
        if largest >= manifest.tokenizer.vocab_size:
            raise VocabularyError(
                f"{folder}: the {name} split holds token id {largest}, but the tokenizer has only "
                f"{manifest.tokenizer.vocab_size} tokens (0 to {manifest.tokenizer.vocab_size - 1}); {REBUILD}"
            )
    return opened


def _check_tokenizer(opened: ShardFolder) -> None:
    path = opened.tokenizer / "tokenizer.json"
    if not path.is_file():
        raise ShardError(f"{path}: missing; {REBUILD}")
    if files.sha256(path) != opened.manifest.tokenizer.sha256:
        raise DataMismatch(f"{path}: not the tokenizer that these shards were built with; {REBUILD}")


def _check_shard(path: Path, info: ShardInfo, verify: Literal["sha256", "size"]) -> None:
    if not path.is_file():
        raise ShardError(f"{path}: missing; {REBUILD}")
    size = path.stat().st_size
    if size != info.size_bytes:
        raise ShardError(f"{path}: truncated or altered: {size} bytes instead of {info.size_bytes}; {REBUILD}")
    if verify == "sha256" and files.sha256(path) != info.sha256:
        raise ShardError(f"{path}: altered: its SHA-256 is not the manifest's; {REBUILD}")
