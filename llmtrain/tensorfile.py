"""Safetensors files, written in one pass: hashed on the way, and past the page cache where the file system can.

A checkpoint's bytes that go through the page cache take as much fresh memory as it is large, and hashing what was
written reads all of it again; on a machine whose memory is its host's until first used, that costs more than the disk
(docs/log.md). Here one buffer is filled, hashed and handed to the disk (O_DIRECT) until all is there. The bytes are
those that safetensors' own `save_file` writes.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.errors import CheckpointError
from llmtrain.manifest import FileInfo

_BUFFER = 1 << 22
_SECTOR = 4096  # O_DIRECT takes multiples of the disk's block size, from memory that is as aligned
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> FileInfo:
    """Write CPU tensors of any layout to a new file, and wait for the disk; returns its size and SHA-256.

    Raises:
        FileExistsError: there is a file.
        OSError: the disk is full, or failed; what was written of the file is still there.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    with _Sink(path) as sink:
        sink.put(torch.frombuffer(bytearray(_header(ordered, metadata)), dtype=torch.uint8))
        for tensor in ordered.values():
            for piece in _contiguous_pieces(tensor):
                # Not view(-1): one element may have any stride, and bytes are seen through a stride of 1 alone.
                sink.put(piece.as_strided((piece.numel(),), (1,)).view(torch.uint8))
        return sink.finish()


def read(path: Path) -> dict[str, Tensor]:
    """A file's tensors, on the CPU.

    Raises:
        CheckpointError: it is missing or damaged.
        OSError: it cannot be read now, which says nothing about it.
    """
    with reading(path):
        return load_file(path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around what safetensors does with a file.

    Raises:
        CheckpointError: it is missing or damaged.
        OSError: it cannot be read now, which says nothing about it.
    """
    try:
        path.open("rb").close()  # safetensors says "no such file" whatever it is that keeps it from opening one
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _header(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    described: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        described[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    content = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def _contiguous_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """In order; of a transposed tensor a few rows at a time, so that it is never copied as a whole."""
    if tensor.is_contiguous():
        yield tensor
        return
    rows = max(1, _BUFFER * len(tensor) // tensor.nbytes)
    for some in tensor.split(rows):
        yield some.contiguous()


class _Sink:
    """A file to which bytes are added at its end."""

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems create it before they refuse
            self._file = os.open(path, flags, 0o666)
        self._buffer = mmap.mmap(-1, _BUFFER)  # aligned to a page
        self._bytes = torch.frombuffer(self._buffer, dtype=torch.uint8)
        self._filled = self._written = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def put(self, content: Tensor) -> None:
        """(n,) uint8."""
        done = 0
        while done < len(content):
            more = min(len(content) - done, _BUFFER - self._filled)
            self._bytes[self._filled : self._filled + more] = content[done : done + more]
            done, self._filled = done + more, self._filled + more
            if self._filled == _BUFFER:
                self._flush()

    def finish(self) -> FileInfo:
        """Write the rest, and wait for the disk."""
        if self._filled:
            self._flush()
            os.ftruncate(self._file, self._written)
        os.fsync(self._file)
        return FileInfo(size_bytes=self._written, sha256=self._digest.hexdigest())

    def _flush(self) -> None:
        """Hash what is in the buffer and write it, filled up to whole sectors."""
        filled = memoryview(self._buffer)[: self._filled]
        self._digest.update(filled)
        self._write(memoryview(self._buffer)[: -(-self._filled // _SECTOR) * _SECTOR])
        self._written, self._filled = self._written + self._filled, 0

    def _write(self, content: memoryview) -> None:
        while content:
            try:
                written = os.write(self._file, content)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct():
                    raise
                self._through_the_page_cache()  # the disk wants larger blocks, or the file system has no O_DIRECT
                continue
            if written % _SECTOR:  # a disk nearly full; O_DIRECT cannot go on from there
                self._through_the_page_cache()
            content = content[written:]

    def _is_direct(self) -> bool:
        return bool(_DIRECT and fcntl.fcntl(self._file, fcntl.F_GETFL) & _DIRECT)

    def _through_the_page_cache(self) -> None:
        fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT)
