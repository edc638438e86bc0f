"""Portable state: shares of any shape, read back by any division."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain import fragments
from llmtrain.errors import CheckpointError
from llmtrain.fragments import Fragment, FragmentReader, equal_share

TENSORS = {
    "exp_avg/a": torch.arange(35.0).reshape(5, 7),
    "exp_avg/b": torch.arange(3.0),
    "exp_avg/c": torch.arange(64.0),
}


def write(folder: Path, size: int) -> None:
    for rank in range(size):
        fragments.write(folder / fragments.file_name(rank, size), list(equal_share(TENSORS, rank, size)))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_any_part_is_read_back_whoever_wrote_it(tmp_path: Path, size: int):
    write(tmp_path, size)
    saved = FragmentReader(tmp_path)
    for key, tensor in TENSORS.items():
        flat = tensor.reshape(-1)
        for start in range(0, len(flat), 5):
            for stop in range(start + 1, len(flat) + 1, 4):
                assert torch.equal(saved.read(key, start, stop), flat[start:stop])


@given(size=st.integers(1, 200), lengths=st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_shares_are_equal_and_together_everything_once(size: int, lengths: list[int]):
    tensors = {f"k{i}": torch.arange(length) for i, length in enumerate(lengths)}
    shares = [list(equal_share(tensors, rank, size)) for rank in range(size)]
    counts = [sum(len(f.values) for f in share) for share in shares]
    assert max(counts) - min(counts) <= 1
    for key, tensor in tensors.items():
        mine = [f for share in shares for f in share if f.key == key]
        assert torch.equal(torch.cat([f.values for f in mine]) if mine else tensor[:0], tensor)


def test_what_is_missing_is_named(tmp_path: Path):
    write(tmp_path, 2)
    (tmp_path / fragments.file_name(1, 2)).unlink()
    saved = FragmentReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no exp_avg/c\[\d+:64\]"):
        saved.read("exp_avg/c", 0, 64)
    with pytest.raises(CheckpointError, match=r"has no exp_avg/unknown\[0:1\]"):
        saved.read("exp_avg/unknown", 0, 1)


def test_a_file_of_another_kind_is_an_error(tmp_path: Path):
    (tmp_path / "optimizer-00000-of-00001.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match="optimizer-00000-of-00001"):
        FragmentReader(tmp_path)


def test_fragments_are_named_by_what_they_hold():
    assert Fragment("exp_avg/a", 3, torch.zeros(4)).name == "exp_avg/a[3:7]"
