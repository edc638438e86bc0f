"""Cross-entropy of a linear output layer, without ever holding all logits.

Shapes: N positions, D width, V vocabulary.

The logits of one chunk of positions are made, turned into loss and gradient, and dropped: memory is
chunk x V instead of several times N x V, and the backward pass has nothing left to compute. The gradient
of the logits is softmax minus one-hot (Wijmans et al. 2024, "Cut Your Losses", is the same idea as a
GPU kernel). On CPUs this is also the fast path: docs/log.md has the figures for torch's own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.memory import loss_chunk

_MULTIPLE = 64
_CACHED = 2**20
"""Logits that a CPU turns into losses and gradients at a time: they stay in its cache from pass to pass."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """Sum (not mean) over positions of -log softmax(hidden @ weight.T)[target].

    In fp32; in float64 where no gradient is wanted.

    Args:
        hidden: (N, D); weight: (V, D); targets: (N,) int64, `ignore` where a position does not count.
    """
    if not torch.is_grad_enabled():
        return _chunks(hidden, weight, targets, ignore, None)[0]
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """(N,) -log softmax(hidden @ weight.T)[target] in fp32, 0 where a position does not count; their sum is
    `linear_cross_entropy`'s. Shapes as there."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    size = loss_chunk(device, len(weight))
    with torch.autocast(device, enabled=False):
        weight_c, hidden_c = _padded(weight, dtype), hidden.to(dtype)
        return torch.cat(
            [
                _losses(rows @ weight_c.t(), len(weight), chunk_targets, ignore, overwrite=False)
                for rows, chunk_targets in zip(hidden_c.split(size), targets.split(size), strict=True)
            ]
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int) -> Tensor:
        wants = Wants(weight=ctx.needs_input_grad[1])
        loss, grad_hidden, grad_weight = _chunks(hidden, weight, targets, ignore, wants)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), None if grad_weight is None else grad_weight.mul_(grad_loss), None, None


@dataclass(frozen=True)
class Wants:
    """Gradients to compute: that of `hidden` always, that of a frozen output layer never."""

    weight: bool


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int, wants: Wants | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    size = loss_chunk(device, len(weight))
    with torch.autocast(device, enabled=False):
        weight_c, hidden_c = _padded(weight, dtype), hidden.to(dtype)
        # Evaluation sums in float64, so that it does not depend on how rows are batched (MPS has none).
        exact = torch.float32 if wants or device == "mps" else torch.float64
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants else None
        grad_weight = None
        done = 0
        for rows, chunk_targets in zip(hidden_c.split(size), targets.split(size), strict=True):
            logits = rows @ weight_c.t()
            loss = loss + _losses(logits, len(weight), chunk_targets, ignore, wants is not None).sum(dtype=exact)
            if wants is None or grad_hidden is None:
                continue
            gradient = logits  # by now
            grad_hidden[done : done + len(rows)] = gradient @ weight_c
            done += len(rows)
            if not wants.weight:
                continue
            part = (gradient.t() @ rows)[: len(weight)]
            grad_weight = part.to(weight.dtype) if grad_weight is None else grad_weight.add_(part)
    return loss, grad_hidden, grad_weight


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, D) in `dtype`; where that makes a copy, with rows of zeros up to a multiple of 64, which products like."""
    if weight.dtype == dtype:
        return weight
    vocab_size, width = weight.shape
    padded = weight.new_empty((-(-vocab_size // _MULTIPLE) * _MULTIPLE, width), dtype=dtype)
    padded[:vocab_size] = weight
    padded[vocab_size:] = 0
    return padded


def _losses(logits: Tensor, vocab_size: int, targets: Tensor, ignore: int, overwrite: bool) -> Tensor:
    """(n,) fp32 losses of (n, V padded) logits, 0 where a position does not count.

    `overwrite`: the logits become the gradient of the losses' sum.
    """
    size = max(1, _CACHED // vocab_size) if logits.device.type == "cpu" else len(logits)
    found: list[Tensor] = []
    for rows, chosen in zip(logits[:, :vocab_size].split(size), targets.split(size), strict=True):
        counts = chosen != ignore
        index = chosen.where(counts, 0).unsqueeze(1)
        if not overwrite:
            exact = rows.float()
            found.append((exact.logsumexp(1) - exact.gather(1, index).squeeze(1)) * counts)
            continue
        highest = rows.amax(1, keepdim=True).float()
        shifted = rows.float().sub_(highest)  # fp32 logits are changed in place
        chosen_logits = shifted.gather(1, index)
        exponentials = shifted.exp_()
        total = exponentials.sum(1, keepdim=True)
        found.append((total.log() - chosen_logits).squeeze(1) * counts)
        exponentials.scatter_add_(1, index, -total)
        rows.copy_(exponentials.mul_(counts.unsqueeze(1) / total))
    if overwrite:
        logits[:, vocab_size:] = 0
    return torch.cat(found)
