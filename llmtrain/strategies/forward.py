"""What a forward pass is under every strategy: mixed precision, and evaluation."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.data import Batch

_MOST_GRAPHS = 64


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """bf16 arithmetic over fp32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def allow_graphs() -> None:
    """Before compiling: by default torch silently stops compiling a function after 8 graphs. There is one for each
    number of pieces that the loss of a batch is made in (models/loss.py)."""
    import torch._dynamo.config  # the compiler: 0.9 s, for those who use it

    torch._dynamo.config.recompile_limit = _MOST_GRAPHS


def training_mode(module: nn.Module) -> None:
    """As `module.train()`, which visits every module in it; here only after something has evaluated the whole."""
    if not module.training:
        module.train()


@torch.no_grad()
def evaluation_loss(module: nn.Module, batch: Batch, device: torch.device, bf16: bool) -> Tensor:
    """Summed loss of a batch, without gradients and without dropout, on the device.

    Not compiled, also where the module is: without gradients it would be a graph of its own, whose making would pass
    for a rank that hangs.
    """
    module.eval()
    batch = batch.to(device)
    with autocast(device, bf16):
        # DeepSpeed compiles in place: calling the module would call the compiled one.
        return module._call_impl(  # pyright: ignore[reportPrivateUsage, reportReturnType]
            batch.input_ids, batch.targets, batch.documents, batch.positions, batch.learned
        )
