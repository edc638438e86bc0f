"""Training state that fits any number of ranks: every rank writes its share, any rank reads any part.

A state tensor belongs to a parameter and is addressed as `KIND/PARAMETER`, e.g.
`exp_avg/transformer.wte.weight`. It is stored flat, in fragments that say which elements they hold:

    state/optimizer-00001-of-00004.safetensors
        exp_avg/transformer.wte.weight[1024:2048]      (1024,) float32

Nothing depends on how a strategy divides its work, so what ZeRO-2 wrote on eight ranks is read by DDP
on one. Files are mapped into memory, and only what is asked for is read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmtrain import tensorfile
from llmtrain.errors import CheckpointError
from llmtrain.manifest import FileInfo

_NAME = re.compile(r"(?P<key>.*)\[(?P<start>\d+):(?P<stop>\d+)\]")


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + len(values)` of a flattened state tensor."""

    key: str
    start: int
    values: Tensor  # 1-D

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    @property
    def name(self) -> str:
        return f"{self.key}[{self.start}:{self.stop}]"


def equal_share(tensors: dict[str, Tensor], rank: int, size: int) -> Iterator[Fragment]:
    """Rank `rank`'s part of tensors that all ranks hold: consecutive elements, equal in number. Views, no copies."""
    total = sum(tensor.numel() for tensor in tensors.values())
    first, last = total * rank // size, total * (rank + 1) // size
    offset = 0
    for key, tensor in tensors.items():
        start, stop = max(first - offset, 0), min(last - offset, tensor.numel())
        if start < stop:
            yield Fragment(key, start, tensor.detach().reshape(-1)[start:stop])
        offset += tensor.numel()


def file_name(rank: int, size: int) -> str:
    return f"optimizer-{rank:05d}-of-{size:05d}.safetensors"


def write(path: Path, fragments: list[Fragment]) -> FileInfo:
    """Write one rank's share to disk."""
    return tensorfile.write(path, {fragment.name: fragment.values for fragment in fragments})


class FragmentReader:
    """The state in a checkpoint's `state/` folder, whichever ranks wrote it.

    Raises:
        CheckpointError: a file is damaged, or holds no fragments.
        OSError: one cannot be read now, which says nothing about it.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._fragments: dict[str, list[tuple[int, int, Any, str]]] = {}
        for path in sorted(folder.glob("optimizer-*.safetensors")):
            with tensorfile.reading(path):
                file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                match = _NAME.fullmatch(name)
                if match is None:
                    raise CheckpointError(f"{path}: {name} is not a fragment of a state tensor")
                found = (int(match["start"]), int(match["stop"]), file, name)
                self._fragments.setdefault(match["key"], []).append(found)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the state tensor `key`, on the CPU.

        Raises:
            CheckpointError: the checkpoint does not have all of them.
        """
        parts: list[Tensor] = []
        at = start
        for first, last, file, name in sorted(self._fragments.get(key, []), key=lambda found: found[:2]):
            if first <= at < min(last, stop):
                parts.append(file.get_slice(name)[at - first : min(last, stop) - first])
                at = min(last, stop)
        if at < stop:
            raise CheckpointError(f"{self._folder}: the optimizer state has no {key}[{at}:{stop}] for this model")
        return parts[0] if len(parts) == 1 else torch.cat(parts)
