"""The weights of a model that is trained from scratch: drawn, or filled from a file."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmtrain import tensorfile
from llmtrain.errors import CheckpointError
from llmtrain.model_files import weight_files


class _DrawNothing(TorchFunctionMode):
    """Modules are made without torch's initialisation (a meta device would do, but imports torch's compiler: 1.1 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") != "torch.nn.init":
            return func(*args, **(kwargs or {}))
        return None  # torch's modules do not look at it


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Numbers drawn in here depend on the seed alone, and leave torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        yield


def undrawn() -> contextlib.AbstractContextManager[Any]:
    """Modules made in here have weights that hold nothing (to draw a billion takes 6 s)."""
    return _DrawNothing()


def draw(model: nn.Module, residual: tuple[str, ...], num_layers: int) -> None:
    """N(0, 0.02), biases zero, a norm's scale one; `residual`, ends of the names of what adds to the residual stream,
    scaled by 1/sqrt(2 layers) (GPT-2: Radford et al. 2019, section 2.3)."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers) if name.endswith(residual) else 0.02)


def read(folder: Path) -> dict[str, Tensor]:
    """A folder's weights by name.

    Raises:
        CheckpointError: a file is missing or damaged.
        OSError: it cannot be read now, which says nothing about it.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= tensorfile.read(file)
    return tensors


def fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    folder: Path,
    transposed: tuple[str, ...] = (),
    zeros: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> None:
    """Fill the parameters from what `read` found in a folder, by their names.

    Args:
        transposed: ends of the names of those that lie there transposed.
        zeros: of tensors that the model does not have, and that may be there if they are zero.
        unused: of tensors that the model does not have, and that may be there.

    Raises:
        CheckpointError: the tensors are not this model's.
    """
    left = dict(tensors)
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                tensor = left.pop(name)
                parameter.copy_(tensor.t() if name.endswith(transposed) else tensor)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: not the weights of this model: {error}") from error
    known = [name for name, tensor in left.items() if name.endswith(zeros) and not tensor.any()]
    known += [name for name in left if name.endswith(unused)]
    if unknown := sorted(set(left) - set(known)):
        raise CheckpointError(f"{folder}: tensors that this model does not have: {unknown}")
