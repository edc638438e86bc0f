"""Safetensors files in one pass: the library's bytes, the right hash, on any file system."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain import tensorfile

BUFFER = tensorfile._BUFFER


def tensors_of(size: int) -> dict[str, torch.Tensor]:
    """`size` bytes and some more, in several types and layouts."""
    count = size // 4
    rows = 7 if count % 7 == 0 else 1
    return {
        "transposed": torch.arange(float(count)).view(rows, -1).t(),
        "half": torch.randn(5, 3).to(torch.bfloat16),
        "b\"ü\n": torch.arange(3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "strided": torch.arange(24.0).view(2, 3, 4)[:, :, ::2],
        "one of many": torch.arange(4.0)[1::2][:1],
        "flags": torch.tensor([True, False, True]),
    }  # fmt: skip


def assert_written(path: Path, tensors: dict[str, torch.Tensor], info: object) -> None:
    content = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt"})
    assert path.read_bytes() == content
    assert info == tensorfile.FileInfo(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("size", [0, 4, 4096, BUFFER, 3 * BUFFER + 28, 7 * BUFFER])
def test_the_bytes_are_the_librarys_and_the_hash_is_theirs(tmp_path: Path, size: int):
    tensors = tensors_of(size)
    info = tensorfile.write(tmp_path / "t.safetensors", tensors, {"format": "pt"})
    assert_written(tmp_path / "t.safetensors", tensors, info)


def test_without_metadata(tmp_path: Path):
    tensors = {"a": torch.arange(5.0)}
    tensorfile.write(tmp_path / "t", tensors)
    assert (tmp_path / "t").read_bytes() == safetensors.torch.save(tensors)


@given(lengths=st.lists(st.integers(0, 20), max_size=6))
def test_any_end_of_the_header_and_of_the_content(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]):
    tensors = {"x" * (i + 1): torch.full((length,), i, dtype=torch.uint8) for i, length in enumerate(lengths)}
    path = tmp_path_factory.mktemp("any") / "t"
    assert_written(path, tensors, tensorfile.write(path, tensors, {"format": "pt"}))


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refuses(path: Path, flags: int, mode: int = 0o777) -> int:
        file = really_open(path, flags & ~tensorfile._DIRECT, mode)  # some file systems create it all the same
        if flags & tensorfile._DIRECT:
            os.close(file)
            raise OSError(errno.EINVAL, "Invalid argument")
        return file

    monkeypatch.setattr(os, "open", refuses)


def refuse_at_write(monkeypatch: pytest.MonkeyPatch) -> None:
    really_write = os.write

    def refuses(file: int, content: memoryview) -> int:
        if os.get_blocking(file) and tensorfile.fcntl.fcntl(file, tensorfile.fcntl.F_GETFL) & tensorfile._DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_write(file, content)

    monkeypatch.setattr(os, "write", refuses)


def write_little(monkeypatch: pytest.MonkeyPatch) -> None:
    really_write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: really_write(file, content[: 3 * 4096 + 5]))


@pytest.mark.parametrize("hinder", [refuse_at_open, refuse_at_write, write_little])
def test_a_file_system_without_direct_writes_and_one_that_writes_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hinder
):
    tensors = tensors_of(BUFFER + 28)
    hinder(monkeypatch)
    info = tensorfile.write(tmp_path / "t", tensors, {"format": "pt"})
    monkeypatch.undo()
    assert_written(tmp_path / "t", tensors, info)


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(file: int, content: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        tensorfile.write(tmp_path / "t", {"a": torch.zeros(3)})


def test_a_file_is_never_written_over(tmp_path: Path):
    (tmp_path / "t").write_text("kept")
    with pytest.raises(FileExistsError):
        tensorfile.write(tmp_path / "t", {"a": torch.zeros(3)})
    assert (tmp_path / "t").read_text() == "kept"


def test_it_is_on_the_disk_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[tuple[int, int]] = []
    really_sync = os.fsync

    def sync(file: int) -> None:
        synced.append((os.fstat(file).st_ino, os.fstat(file).st_size))
        really_sync(file)

    monkeypatch.setattr(os, "fsync", sync)
    tensorfile.write(tmp_path / "t", {"a": torch.zeros(3)})
    assert synced == [((tmp_path / "t").stat().st_ino, (tmp_path / "t").stat().st_size)]
