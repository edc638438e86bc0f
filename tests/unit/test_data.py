"""The order of the samples, and how rows become batches."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.batches import BatchPlan
from llmtrain.data import IGNORE, Batch, Loader, SampleOrder, make_batch, split_batches
from llmtrain.shards import Rows, ShardInfo, ShardSet, SplitInfo, write_shard

CPU = torch.device("cpu")


@given(seed=st.integers(0, 2**63 - 1), rows=st.integers(1, 3000), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(seed: int, rows: int, epoch: int):
    seen = SampleOrder(seed, rows).rows(epoch * rows, rows)
    assert sorted(seen.tolist()) == list(range(rows))


@given(first=st.integers(0, 500), cuts=st.lists(st.integers(1, 90), min_size=1, max_size=6))
@settings(deadline=None)
def test_the_order_does_not_depend_on_how_it_is_read(first: int, cuts: list[int]):
    order = SampleOrder(7, 101)
    whole = order.rows(first, sum(cuts))
    at, parts = first, []
    for cut in cuts:
        parts.append(order.rows(at, cut))
        at += cut
    assert np.array_equal(whole, np.concatenate(parts))


def test_the_order_changes_with_seed_and_epoch_and_looks_random():
    order, other = SampleOrder(1, 10_000), SampleOrder(2, 10_000)
    first, second, foreign = order.rows(0, 10_000), order.rows(10_000, 10_000), other.rows(0, 10_000)
    for a, b in ((first, second), (first, foreign), (first, np.arange(10_000))):
        assert (a == b).sum() < 12  # 1 expected by chance
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


def test_a_billion_rows_take_no_memory_to_permute():
    order = SampleOrder(3, 10**9)
    ids = order.rows(999_999_900, 512)  # across an epoch
    assert len(np.unique(ids)) > 500
    assert ids.min() >= 0
    assert ids.max() < 10**9


def make_set(folder: Path, rows: list[list[int]], width: int, mask: np.ndarray | None = None, per_shard: int = 3):
    """A split of several shards; each row is a list of document lengths, tokens count up from 100 x row."""
    infos = []
    for number, start in enumerate(range(0, len(rows), per_shard)):
        chunk = rows[start : start + per_shard]
        tokens = (np.arange(width) + 100 * np.arange(start, start + len(chunk))[:, None]).astype(np.uint16)
        lens = [np.array(r, np.int32) for r in chunk]
        path = folder / f"train-{number:05d}.arrow"
        write_shard(path, Rows(tokens, lens, None if mask is None else mask[start : start + len(chunk)]))
        infos.append(ShardInfo(file=path.name, size_bytes=0, sha256="", rows=len(chunk), tokens=0, max_id=0))
    info = SplitInfo(
        rows=len(rows), tokens=0, targets=0, documents=0, text_bytes=1, text_tokens=1, tokens_dropped=0, shards=infos
    )
    return ShardSet(folder, info, width - 1)


def test_reading_rows_across_shards(tmp_path: Path):
    shards = make_set(tmp_path, [[9]] * 8, 9)
    rows = shards.rows(np.array([7, 0, 3, 3]))
    assert rows.tokens[:, 0].tolist() == [700, 0, 300, 300]


def test_targets_stay_within_documents_and_out_of_padding():
    tokens = np.arange(9, dtype=np.uint16)[None]
    batch = make_batch(Rows(tokens, [np.array([3, 4], np.int32)], None), isolate_documents=True)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.targets.tolist() == [[1, 2, IGNORE, 4, 5, 6, IGNORE, IGNORE]]
    assert batch.num_targets == 5
    assert batch.learned is not None
    assert batch.learned.tolist() == [0, 1, 3, 4, 5]
    assert batch.documents is not None
    assert batch.positions is not None
    assert batch.documents.starts.tolist() == [0, 3, 7] + [8] * 29
    assert batch.documents.longest == 8  # at most a row
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]


def test_columns_that_are_padding_in_every_row_are_left_out():
    tokens = np.arange(3 * 201, dtype=np.uint16).reshape(3, 201)
    lens = [np.array([20, 15], np.int32), np.array([66], np.int32), np.array([5], np.int32)]
    batch = make_batch(Rows(tokens, lens, np.ones_like(tokens, np.uint8)), isolate_documents=True)
    assert batch.input_ids.shape == batch.targets.shape == (3, 96)
    assert batch.num_targets == 19 + 14 + 65 + 4
    assert batch.learned is not None
    assert torch.equal(batch.learned, (batch.targets.flatten() != IGNORE).nonzero().flatten())
    alone = make_batch(Rows(tokens[2:], lens[2:], None), isolate_documents=False)
    assert alone.input_ids.shape == (1, 32)
    full = make_batch(Rows(tokens, [np.array([201], np.int32)] * 3, None), isolate_documents=False)
    assert full.input_ids.shape == (3, 200)
    assert full.learned is None


def test_the_loss_mask_chooses_targets():
    tokens = np.arange(6, dtype=np.uint16)[None]
    mask = np.array([[1, 0, 1, 1, 0, 1]], np.uint8)
    batch = make_batch(Rows(tokens, [np.array([6], np.int32)], mask), isolate_documents=False)
    assert batch.targets.tolist() == [[IGNORE, 2, 3, IGNORE, 5]]
    assert batch.documents is None


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_a_step_without_changing_it(tmp_path: Path, world_size: int):
    shards = make_set(tmp_path, [[5]] * 17, 5)
    plan = BatchPlan(12, 12 // world_size // 2, 2, 9)
    alone = Loader(shards, BatchPlan(12, 12, 1, 9), 5, 0, 1, CPU, False)
    for position in (0, 12, 24):  # the second crosses an epoch
        parts = [
            Loader(shards, plan, 5, rank, world_size, CPU, False).read_step(position) for rank in range(world_size)
        ]
        whole = alone.read_step(position)
        assert sum(part.digest for part in parts) == whole.digest
        rows = sorted(int(b) for part in parts for batch in part.batches for b in batch.input_ids[:, 0])
        assert rows == sorted(whole.batches[0].input_ids[:, 0].tolist())
        assert all(len(part.batches) == 2 for part in parts)


def test_digests_tell_steps_apart(tmp_path: Path):
    shards = make_set(tmp_path, [[5]] * 12, 5)
    loader = Loader(shards, BatchPlan(12, 12, 1, 9), 5, 0, 1, CPU, False)
    assert loader.read_step(0).digest != loader.read_step(12).digest  # the same rows, in another order


def test_an_error_while_reading_ahead_reaches_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loader = Loader(make_set(tmp_path, [[5]] * 6, 5), BatchPlan(2, 2, 1, 9), 5, 0, 1, CPU, False)

    def broken(samples: int):
        raise OSError("the disk is gone")

    monkeypatch.setattr(loader, "read_step", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader.steps(0, 3))


def test_the_loader_gives_every_step_in_order_and_ends_when_it_is_left(tmp_path: Path):
    loader = Loader(make_set(tmp_path, [[5]] * 30, 5), BatchPlan(2, 2, 1, 99), 5, 0, 1, CPU, False)
    wanted = [loader.read_step(2 * step).batches[0].input_ids for step in range(99)]
    found = [data.batches[0].input_ids for data in loader.steps(0, 99)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for _ in loader.steps(0, 10_000):  # left after the first: its thread is waiting until more is wanted
        break
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 5
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_some_rows_are_spread_over_the_split_however_many_ranks_read_them(tmp_path: Path, world_size: int):
    shards = make_set(tmp_path, [[5]] * 11, 5)
    seen = [
        int(first) // 100
        for rank in range(world_size)
        for batch in split_batches(shards, 3, rank, world_size, False, limit=4)
        for first in batch.input_ids[:, 0]
    ]
    assert sorted(seen) == [0, 2, 5, 8]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_each_row_once(tmp_path: Path, world_size: int):
    shards = make_set(tmp_path, [[5]] * 11, 5)
    seen = [
        int(first) // 100
        for rank in range(world_size)
        for batch in split_batches(shards, 3, rank, world_size, False)
        for first in batch.input_ids[:, 0]
    ]
    assert sorted(seen) == list(range(11))


def batch_of(doc_lens: list[int]) -> Batch:
    """One row of documents that are kept apart."""
    rows = Rows(np.zeros((1, sum(doc_lens)), np.uint16), [np.array(doc_lens, np.int32)], None)
    return make_batch(rows, isolate_documents=True)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64])
def test_the_last_document_has_an_end_however_many_there_are(count: int):
    """What lies between two starts is computed: without the end the last document would be left out."""
    documents = batch_of([3] * count).documents
    assert documents is not None
    starts = documents.starts.tolist()
    assert starts[:count] == list(range(0, 3 * count, 3))
    assert set(starts[count:]) == {3 * count - 1}
    assert len(starts) % 32 == 0


@pytest.mark.parametrize(("length", "longest"), [(127, 128), (128, 128), (129, 256)])
def test_no_document_is_longer_than_the_longest(length: int, longest: int):
    """A GPU's kernel computes so many positions of each, and no more."""
    documents = batch_of([length] * 4).documents
    assert documents is not None
    assert documents.longest == longest


def test_the_order_is_the_one_that_runs_have_begun_with():
    """A resumed run goes on in it, also after an upgrade: these numbers never change."""
    rows, hashes = SampleOrder(7, 1000).rows_and_hashes(995, 10)  # across an epoch
    assert rows.tolist() == [71, 515, 667, 68, 611, 758, 322, 776, 995, 432]
    assert hashes.tolist() == [
        87051677835, 271018004075, 658664051762, 972490775659, 406366759373,
        21962675911, 765173335420, 797841569124, 87463014689, 960693461390,
    ]  # fmt: skip
