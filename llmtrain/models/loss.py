"""Cross-entropy of a linear output layer, without ever holding all logits.

Shapes: N positions, D width, V vocabulary.

The logits of one chunk of positions are made, turned into loss and gradient, and dropped: memory is
chunk x V instead of several times N x V, and the backward pass has nothing left to compute. The gradient
of the logits is softmax minus one-hot (Wijmans et al. 2024, "Cut Your Losses", is the same idea as a
GPU kernel). On CPUs this is also the fast path: docs/log.md has the figures for torch's own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.memory import loss_chunk
from llmtrain.models.attention import computed_in

_MULTIPLE = 64
_CACHED = 2**20
"""Logits that a CPU turns into losses and gradients at a time: they stay in its cache from pass to pass."""
_WEIGHT_ROWS = 4096
"""Rows of the output layer's gradient that a CPU makes and adds at a time."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int, cap: float | None = None
) -> Tensor:
    """Sum (not mean) over positions of -log softmax(logits)[target], logits = hidden @ weight.T.

    In fp32; in float64 where no gradient is wanted.

    Args:
        hidden: (N, D); weight: (V, D); targets: (N,) int64, `ignore` where a position does not count.
        cap: logits are cap tanh(logits / cap) instead (Gemma Team 2024, "Gemma 2", section 2).
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, weight, targets, ignore, cap)
    # Summed in float64, evaluation does not depend on how rows are batched (MPS has none).
    exact = torch.float32 if hidden.device.type == "mps" else torch.float64
    return token_losses(hidden, weight, targets, ignore, cap).sum(dtype=exact)


def batch_loss(
    hidden_BTD: Tensor,
    weight: Tensor,
    targets_BT: Tensor,
    learned: Tensor | None,
    ignore: int,
    cap: float | None = None,
) -> Tensor:
    """`linear_cross_entropy` of the positions that are listed (`data.Batch.learned`): the output layer need not see a
    prompt, nor padding.

    Of all in what torch compiles: one graph, where their number would change from batch to batch.
    """
    hidden, targets = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    if learned is not None and not torch.compiler.is_compiling():
        hidden, targets = hidden.index_select(0, learned), targets.index_select(0, learned)
    return linear_cross_entropy(hidden, weight, targets, ignore, cap)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int, cap: float | None = None) -> Tensor:
    """(N,) -log softmax(logits)[target] in fp32, 0 where a position does not count; their sum is
    `linear_cross_entropy`'s. Arguments as there."""
    found: list[Tensor] = []
    hidden_c, weight_c = _operands(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, chosen in _chunks(hidden_c, weight, targets):
            for logits, index, counts in _blocks(rows @ weight_c.t(), len(weight), chosen, ignore):
                exact = soft_capped(logits.float(), cap)
                found.append((exact.logsumexp(1) - exact.gather(1, index).squeeze(1)) * counts)
    return torch.cat(found)


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """`linear_cross_entropy`'s logits with a cap, which are these without."""
    return logits if cap is None else (logits / cap).tanh_().mul_(cap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int, cap: float | None) -> Tensor:
        weight_too = ctx.needs_input_grad[1]
        loss, grad_hidden, grad_weight = _loss_and_gradients(hidden, weight, targets, ignore, cap, weight_too)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight.mul_(grad_loss)
        return grad_hidden.mul_(grad_loss), grad_weight, None, None, None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int, cap: float | None, weight_too: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, the gradient of `hidden`, and that of the output layer unless it is frozen."""
    hidden_c, weight_c = _operands(hidden, weight)
    loss = torch.zeros((), device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = None
    done = 0
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, chosen in _chunks(hidden_c, weight, targets):
            gradient = rows @ weight_c.t()  # the logits, for now
            loss = loss + _turn_into_gradient(gradient, len(weight), chosen, ignore, cap)
            grad_hidden[done : done + len(rows)] = gradient @ weight_c
            done += len(rows)
            if weight_too:
                grad_weight = _add_to_weight(grad_weight, gradient, rows, weight)
            del gradient  # before the next chunk's is made
    return loss, grad_hidden, grad_weight


def _add_to_weight(grad_weight: Tensor | None, gradient: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """The output layer's gradient with a chunk's share, gradient^T rows, added.

    In mixed precision CPUs make a few of its rows at a time. For GPT-2 the whole product takes 77 MB, and its copy in
    the weight's dtype, which adding makes, 154 MB more, at the peak of a step's memory.
    """
    if gradient.dtype == weight.dtype:  # the product adds, and has no padding
        return gradient.t() @ rows if grad_weight is None else grad_weight.addmm_(gradient.t(), rows)
    size = _WEIGHT_ROWS if weight.device.type == "cpu" else gradient.shape[1]
    total = torch.empty_like(weight) if grad_weight is None else grad_weight
    for into, of_rows in zip(total.split(size), gradient.split(size, 1), strict=True):
        part = (of_rows.t() @ rows)[: len(into)]  # the padding's rows are cut off
        if grad_weight is None:
            into.copy_(part)
        else:
            into.add_(part)
    return total


def _turn_into_gradient(logits: Tensor, vocab_size: int, targets: Tensor, ignore: int, cap: float | None) -> Tensor:
    """The fp32 sum of the losses of (n, V padded) logits, which become its gradient."""
    losses: list[Tensor] = []
    for rows, index, counts in _blocks(logits, vocab_size, targets, ignore):
        exact = soft_capped(rows.float(), cap)
        slopes = None if cap is None else (exact / cap).square_().neg_().add_(1)
        shifted = exact.sub_(exact.amax(1, keepdim=True))  # fp32 logits are changed in place
        chosen_logits = shifted.gather(1, index)
        exponentials = shifted.exp_()
        total = exponentials.sum(1, keepdim=True)
        losses.append((total.log() - chosen_logits).squeeze(1) * counts)
        exponentials.scatter_add_(1, index, -total)
        gradient = exponentials.mul_(counts.unsqueeze(1) / total)
        rows.copy_(gradient if slopes is None else gradient.mul_(slopes))
    logits[:, vocab_size:] = 0
    return torch.cat(losses).sum()


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both as autocast would have them."""
    dtype = computed_in(hidden)
    return hidden.to(dtype), _padded(weight, dtype)


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, D) in `dtype`; where that makes a copy, with rows of zeros up to a multiple of 64, which products like."""
    if weight.dtype == dtype:
        return weight
    vocab_size, width = weight.shape
    padded = weight.new_empty((-(-vocab_size // _MULTIPLE) * _MULTIPLE, width), dtype=dtype)
    padded[:vocab_size] = weight
    padded[vocab_size:] = 0
    return padded


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions whose logits exist at the same time, and their targets."""
    size = loss_chunk(hidden.device.type, len(weight))
    return zip(hidden.split(size), targets.split(size), strict=True)


def _blocks(logits: Tensor, vocab_size: int, targets: Tensor, ignore: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of the (n, V padded) logits without their padding: views of what fits into a CPU's cache, elsewhere of all.

    With each the targets as an index, (rows, 1), 0 where a position does not count, and whether it does, (rows,).
    """
    size = max(1, _CACHED // vocab_size) if logits.device.type == "cpu" else len(logits)
    for rows, chosen in zip(logits[:, :vocab_size].split(size), targets.split(size), strict=True):
        counts = chosen != ignore
        yield rows, chosen.where(counts, 0).unsqueeze(1), counts
