"""Which rows make up which step, and how rows become tensors.

Shapes: B rows, T = context positions.

The order is a pure function of (seed, number of rows, position): position q lies in epoch q // N, and
its row is permutation(seed, epoch)(q mod N). The permutation is a Feistel network with cycle walking
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): O(1) memory, no shuffle buffer,
nothing to save but one integer. Rank r of R takes the rows r, r + R, ... of each step, so the number of
ranks does not change what a step sees.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.batches import BatchPlan
from llmtrain.shards import Rows, ShardSet

IGNORE = -100
"""Target of a position that is not supervised."""

_COLUMN_MULTIPLE = 32
"""Row lengths are rounded up to this: few shapes, little padding."""
_STARTS_MULTIPLE, _LONGEST_MULTIPLE = 32, 128
"""`Documents`: its number of starts and its longest are rounded up to these."""
_ROUNDS = 6
_ORDER_BLOCK = 1024
"""Positions of the order that are computed at a time: for so many, numpy takes hardly longer than for one."""
_STEPS_AHEAD, _TOKENS_AHEAD = 8, 2**20
"""The loader prefetches at most so many steps and so many of its rank's tokens, but always two steps."""
_DIGEST_BITS = 40  # small enough that the sum over a batch of millions fits into 63 bits
_U64 = np.uint64


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection whose bits all depend on each other."""
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))


class SampleOrder:
    """The endless sequence of row numbers that a run sees."""

    def __init__(self, seed: int, num_rows: int):
        self.num_rows = num_rows
        self._seed = seed
        self._half_bits = _U64(max(1, ((num_rows - 1).bit_length() + 1) // 2))
        self._half_mask = (_U64(1) << self._half_bits) - _U64(1)
        self._known = (-1, -1, np.empty(0, np.int64), np.empty(0, np.int64))
        """Epoch, number and content of the block asked for last."""

    def rows(self, first: int, count: int) -> NDArray[np.int64]:
        """Row numbers at positions first ... first + count - 1; crosses epochs where they meet."""
        return self.rows_and_hashes(first, count)[0]

    def rows_and_hashes(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`rows`, and for each a hash of (position, row), of _DIGEST_BITS bits."""
        rows: list[NDArray[np.int64]] = []
        hashes: list[NDArray[np.int64]] = []
        while count:
            epoch, start = divmod(first, self.num_rows)
            number, start = divmod(start, _ORDER_BLOCK)
            block_rows, block_hashes = self._block(epoch, number)
            rows.append(block_rows[start : start + count])
            hashes.append(block_hashes[start : start + count])
            first, count = first + len(rows[-1]), count - len(rows[-1])
        return (rows[0], hashes[0]) if len(rows) == 1 else (np.concatenate(rows), np.concatenate(hashes))

    def _block(self, epoch: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._known[:2] != (epoch, number):
            start = number * _ORDER_BLOCK
            places = np.arange(start, min(start + _ORDER_BLOCK, self.num_rows), dtype=np.uint64)
            rows = self._permute(places, epoch)
            hashes = mix(mix(places + _U64(epoch * self.num_rows)) + rows.astype(np.uint64))
            self._known = (epoch, number, rows, (hashes >> _U64(64 - _DIGEST_BITS)).astype(np.int64))
        return self._known[2:]

    def _permute(self, values: NDArray[np.uint64], epoch: int) -> NDArray[np.int64]:
        keys = np.arange(_ROUNDS, dtype=np.uint64) + _U64((self._seed * 0x9E3779B97F4A7C15 + epoch) % 2**64)
        keys = mix(mix(keys) + _U64(epoch % 2**64))
        values = self._feistel(values, keys)
        while (outside := values >= _U64(self.num_rows)).any():  # cycle walking
            values[outside] = self._feistel(values[outside], keys)
        return values.astype(np.int64)

    def _feistel(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in keys:
            left, right = right, left ^ (mix(right + key) & self._half_mask)
        return (left << self._half_bits) | right


class Documents(NamedTuple):
    """Where documents begin in a batch that is flattened row by row; each row begins a document."""

    starts: Tensor
    """(D + 1,) int32 offsets into the flattened batch (cu_seqlens), 0 ... B*T; padded at the end by repeating B*T."""
    longest: int
    """Upper bound on a document's length (max_seqlen), rounded up so that torch.compile sees few values."""


@dataclass
class Batch:
    """Rows as the model takes them."""

    input_ids: Tensor  # (B, T) int64; T is at most the context
    targets: Tensor  # (B, T) int64, IGNORE where not supervised
    documents: Documents | None  # attention stays within each; None: each row is one
    positions: Tensor | None  # (B, T) int64, restarting at 0 with each document; None: 0 ... T - 1
    num_targets: int
    learned: Tensor | None = None  # (num_targets,) int64: the supervised ones of B*T; None: all, or not listed

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`, without waiting for the copy on a GPU."""
        if device.type == "cpu":
            return self
        pin = device.type == "cuda"

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)

        ids, targets = move(self.input_ids), move(self.targets)
        assert ids is not None
        assert targets is not None
        documents = None
        if self.documents is not None:
            starts = move(self.documents.starts)
            assert starts is not None
            documents = Documents(starts, self.documents.longest)
        return Batch(ids, targets, documents, move(self.positions), self.num_targets, move(self.learned))


def make_batch(rows: Rows, isolate_documents: bool) -> Batch:
    """Shift rows of up to context + 1 tokens into inputs and targets.

    A target is supervised if it lies in the same document as its input, is no padding, and its loss
    mask (where there is one) is 1. With `isolate_documents` attention and positions restart with
    each document; padding counts as one more document. Columns that are padding in every row are left
    out, up to a multiple of _COLUMN_MULTIPLE.
    """
    one_each = all(len(lens) == 1 for lens in rows.doc_lens)
    filled = np.concatenate(rows.doc_lens if one_each else [lens.sum(keepdims=True) for lens in rows.doc_lens])
    width = min(rows.tokens.shape[1], -(-(int(filled.max()) - 1) // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE + 1)
    num_rows, tokens = len(filled), torch.from_numpy(rows.tokens[:, :width].astype(np.int64))
    whole = one_each and bool((filled == width).all())
    if whole and rows.loss_mask is None and not isolate_documents:  # packed from end to end: nothing to leave out
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, None, num_rows * (width - 1))
    doc_of, starts = _documents(rows.doc_lens, filled, width)
    supervised = (doc_of[:, 1:] == doc_of[:, :-1]) & (np.arange(1, width) < filled[:, None])
    if rows.loss_mask is not None:
        supervised &= rows.loss_mask[:, 1:width].astype(bool)
    targets = tokens[:, 1:].clone()
    targets.masked_fill_(torch.from_numpy(~supervised), IGNORE)
    documents = positions = None
    if isolate_documents:
        places = np.arange(width - 1) - starts[:, :-1]
        documents, positions = _bounds(places), torch.from_numpy(places)
    learned = torch.from_numpy(np.flatnonzero(supervised))
    return Batch(tokens[:, :-1].contiguous(), targets, documents, positions, len(learned), learned)


def _bounds(places: NDArray[np.int64]) -> Documents:
    """Of (B, T) positions that restart with each document; their number and the longest rounded up, so that compiler
    and allocator see few sizes (a GPU's kernel takes memory for each start, and time for each length)."""
    starts = np.flatnonzero(places == 0)
    padded = np.full(-(-(len(starts) + 1) // _STARTS_MULTIPLE) * _STARTS_MULTIPLE, places.size, np.int32)
    padded[: len(starts)] = starts
    longest = -(-(int(places.max()) + 1) // _LONGEST_MULTIPLE) * _LONGEST_MULTIPLE
    return Documents(torch.from_numpy(padded), min(longest, places.shape[1]))


def _documents(
    doc_lens: list[NDArray[np.int32]], filled: NDArray[np.integer], width: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(B, width) each: of every token its document's number in the row, and where in the row that begins.

    The padding behind the last document is one more. Few numpy calls for all rows, and none for each: this thread
    holds the interpreter while the loop would launch the next operation.
    """
    num_rows = len(doc_lens)
    per_row = np.fromiter((len(lens) + 1 for lens in doc_lens), np.int64, num_rows)
    ends = per_row.cumsum()
    is_padding = np.zeros(ends[-1], bool)
    is_padding[ends - 1] = True
    lengths = np.empty(ends[-1], np.int64)
    lengths[is_padding], lengths[~is_padding] = width - filled, np.concatenate(doc_lens)
    number = np.arange(ends[-1]) - np.repeat(ends - per_row, per_row)
    begin = lengths.cumsum() - lengths - np.repeat(np.arange(num_rows) * width, per_row)
    shape = (num_rows, width)
    return np.repeat(number.astype(np.int32), lengths).reshape(shape), np.repeat(begin, lengths).reshape(shape)


@dataclass
class StepData:
    """One rank's share of one optimizer step."""

    batches: list[Batch]
    num_targets: int
    digest: int
    """Sum of hashes of (position, row number) over this rank's rows; summed over the ranks it tells
    whether a step saw the samples that it should have."""


class Loader:
    """Reads steps ahead of the loop, in one thread (workers cost more than they give: docs/data.md)."""

    def __init__(
        self,
        shards: ShardSet,
        plan: BatchPlan,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        isolate_documents: bool,
    ):
        self._shards, self._plan, self._device, self._isolate = shards, plan, device, isolate_documents
        self._rank, self._world_size = rank, world_size
        self._order = SampleOrder(seed, shards.num_rows)
        self._closed, self._low = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.wait_s = 0.0
        """Time that the loop has waited for data so far."""

    def close(self) -> None:
        """End the thread: one that is still inside torch when the interpreter ends can abort the process."""
        self._closed.set()
        self._low.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def read_step(self, samples: int) -> StepData:
        """This rank's part of the step that begins at position `samples`."""
        rows, hashes = self._order.rows_and_hashes(samples, self._plan.global_batch_size)
        mine = rows[self._rank :: self._world_size]
        micro = self._plan.micro_batch_size
        batches = [
            make_batch(self._shards.rows(mine[i : i + micro]), self._isolate) for i in range(0, len(mine), micro)
        ]
        return StepData(
            [batch.to(self._device) for batch in batches],
            sum(batch.num_targets for batch in batches),
            int(hashes[self._rank :: self._world_size].sum()),
        )

    def steps(self, first_sample: int, num_steps: int) -> Iterator[StepData]:
        """The steps from position `first_sample` on; an error while reading is raised here."""
        ready: queue.SimpleQueue[StepData | BaseException] = queue.SimpleQueue()
        closed, low = self._closed, self._low = threading.Event(), threading.Event()
        rows = self._plan.global_batch_size // self._world_size
        most = max(2, min(_STEPS_AHEAD, _TOKENS_AHEAD // (rows * self._shards.context)))

        def read_ahead() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # a new thread's is the first GPU
                for step in range(num_steps):
                    if ready.qsize() >= most:
                        low.clear()
                        if ready.qsize() > most // 2:
                            low.wait()  # several steps in a row: to wake up for each costs more than to read it
                    if closed.is_set():
                        return
                    ready.put(self.read_step(first_sample + step * self._plan.global_batch_size))
            except BaseException as error:  # noqa: BLE001  handed to the loop, which raises it
                ready.put(error)

        self._thread = threading.Thread(target=read_ahead, name="read-ahead", daemon=True)
        self._thread.start()
        try:
            for _ in range(num_steps):
                before = time.perf_counter()
                item = ready.get()
                self.wait_s += time.perf_counter() - before
                if ready.qsize() <= most // 2:
                    low.set()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            low.set()


def split_batches(
    shards: ShardSet,
    batch_size: int,
    rank: int,
    world_size: int,
    isolate_documents: bool,
    limit: int | None = None,
) -> Iterator[Batch]:
    """This rank's rows of a whole split, in order, for evaluation; with `limit` so many, evenly spread over it.

    The first ones alone would be other rows: the longest documents (`bestfit`), or one source of several.
    """
    count = min(shards.num_rows, limit or shards.num_rows)
    mine = np.arange(rank, count, world_size) * shards.num_rows // count
    for i in range(0, len(mine), batch_size):
        yield make_batch(shards.rows(mine[i : i + batch_size]), isolate_documents)
