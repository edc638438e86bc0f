"""What a forward pass is under every strategy: mixed precision, and evaluation."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.data import Batch


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """bf16 arithmetic over fp32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def training_mode(module: nn.Module) -> None:
    """As `module.train()`, which visits every module in it; here only after something has evaluated the whole."""
    if not module.training:
        module.train()


@torch.no_grad()
def evaluation_loss(module: nn.Module, batch: Batch, device: torch.device, bf16: bool) -> Tensor:
    """Summed loss of a batch, without gradients and without dropout, on the device."""
    module.eval()
    batch = batch.to(device)
    with autocast(device, bf16):
        return module(batch.input_ids, batch.targets, batch.doc_ids, batch.positions)
