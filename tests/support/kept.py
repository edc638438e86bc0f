"""What autograd keeps for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Kept:
    """Storages that were saved for the backward pass: each counts once, the model's own parameters do not."""

    def __init__(self, model: nn.Module):
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._alive: dict[int, Tensor] = {}  # so that no address is used twice

    def note(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._own:
            self._alive[place] = tensor
        return tensor

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._alive.values())

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._alive.values())


@contextmanager
def kept(model: nn.Module, bf16: bool) -> Iterator[Kept]:
    """What is saved within it, computed in bf16 (autocast) or as the model is."""
    found = Kept(model)
    hooks = torch.autograd.graph.saved_tensors_hooks(found.note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        yield found
