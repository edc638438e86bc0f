"""How large tasks and shards are, and in which order they are done, changes nothing of what is learned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.sharding import finish, sources
from launcher.sharding.build import build
from llmtrain.shards import ShardFolder, SplitName
from tests.unit.test_shard_parts import CASES, configure


def documents(folder: ShardFolder, split: SplitName) -> list[tuple[bytes, bytes]]:
    """Tokens and mask of each; what a row is filled up with is left out."""
    found = folder.split(split)
    rows, documents = found.rows(np.arange(found.num_rows)), list[tuple[bytes, bytes]]()
    for number, lens in enumerate(rows.doc_lens):
        at = 0
        for length in lens.tolist():
            mask = b"" if rows.loss_mask is None else rows.loss_mask[number, at : at + length].tobytes()
            documents.append((rows.tokens[number, at : at + length].tobytes(), mask))
            at += length
    return documents


@pytest.mark.parametrize("case", CASES)
def test_many_tasks_and_shards_hold_the_documents_of_one(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    one = build(configure(tmp_path, case, "one"), workers=1).folder
    monkeypatch.setattr(sources, "UNIT_BYTES", 40_000)
    monkeypatch.setattr(finish, "_SHARD_BYTES", 60_000)
    many = build(configure(tmp_path, case, "many"), workers=1).folder
    assert len(one.manifest.splits["train"].shards) == 1
    assert len(many.manifest.splits["train"].shards) > 2
    for split in many.manifest.splits:
        expected, found = documents(one, split), documents(many, split)
        assert len(found) == len(expected)
        # Only rows that hold one stretch of the text have an order: others are filled shard by shard.
        ordered = "contiguous" in case
        assert (found == expected) if ordered else (sorted(found) == sorted(expected)), split


def test_the_order_in_which_shards_are_finished_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Several processes finish them as it comes; the fingerprint is what a run's data are known by."""
    monkeypatch.setattr(finish, "_SHARD_BYTES", 60_000)
    one_by_one = build(configure(tmp_path, name="one"), workers=1).folder
    original = finish.write_shards

    def backwards(function: Callable[[Any], Any], jobs: list[Any]) -> list[Any]:
        return [function(job) for job in jobs][::-1]

    monkeypatch.setattr(
        "launcher.sharding.build.write_shards",
        lambda plan, read, _, progress: original(plan, read, backwards, progress),
    )
    found = build(configure(tmp_path, name="another"), workers=1).folder
    assert len(found.manifest.splits["train"].shards) > 2
    assert found.fingerprint == one_by_one.fingerprint
