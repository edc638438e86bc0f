"""Cross-entropy of a linear output layer, without ever holding all logits.

Shapes: N positions, D width, V vocabulary.

The logits of one chunk of positions are made, turned into loss and gradient, and dropped: memory is
chunk x V instead of several times N x V, and the backward pass has nothing left to compute. The gradient
of the logits is softmax minus one-hot (Wijmans et al. 2024, "Cut Your Losses", is the same idea as a
GPU kernel). On CPUs this is also the fast path: docs/log.md has the figures for torch's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Head:
    """An output layer: logits = hidden @ weight.T + bias, and with a cap cap tanh(logits / cap) (Gemma Team 2024,
    "Gemma 2", section 2)."""

    weight: Tensor
    """(V, D)"""
    bias: Tensor | None = None
    """(V,), which is not trained."""
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V), all of them."""
        return self.capped(self.product(hidden))

    def product(self, hidden: Tensor) -> Tensor:
        if self.bias is None:
            return hidden @ self.weight.t()
        return torch.addmm(self.bias, hidden, self.weight.t())

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else (logits / self.cap).tanh_().mul_(self.cap)


def linear_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, ignore: int) -> Tensor:
    """Sum (not mean) over positions of -log softmax(head.logits(hidden))[target].

    In fp32; in float64 where no gradient is wanted.

    Args:
        hidden: (N, D); targets: (N,) int64, `ignore` where a position does not count.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, head.weight, head.bias, head.cap, targets, ignore)
    # Summed in float64, evaluation does not depend on how rows are batched (MPS has none).
    exact = torch.float32 if hidden.device.type == "mps" else torch.float64
    return token_losses(hidden, head, targets, ignore).sum(dtype=exact)


def batch_loss(hidden_BTD: Tensor, head: Head, targets_BT: Tensor, learned: Tensor | None, ignore: int) -> Tensor:
    """`linear_cross_entropy` of the positions that are listed (`data.Batch.learned`): the output layer need not see a
    prompt, nor padding.

    Of all in what torch compiles: one graph, where their number would change from batch to batch.
    """
    hidden, targets = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    if learned is not None and not torch.compiler.is_compiling():
        hidden, targets = hidden.index_select(0, learned), targets.index_select(0, learned)
    return linear_cross_entropy(hidden, head, targets, ignore)


@torch.no_grad()
def token_losses(hidden: Tensor, head: Head, targets: Tensor, ignore: int) -> Tensor:
    """(N,) -log softmax(head.logits(hidden))[target] in fp32, 0 where a position does not count; their sum is
    `linear_cross_entropy`'s. Arguments as there."""
    found: list[Tensor] = []
    hidden_c, head_c = _operands(hidden, head)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, chosen in _chunks(hidden_c, head.weight, targets):
            for logits, index, counts in _blocks(head_c.product(rows), len(head.weight), chosen, ignore):
                exact = head.capped(logits.float())
                found.append((exact.logsumexp(1) - exact.gather(1, index).squeeze(1)) * counts)
    return torch.cat(found)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float | None,
        targets: Tensor,
        ignore: int,
    ) -> Tensor:
        head, weight_too = Head(weight, bias, cap), ctx.needs_input_grad[1]
        loss, grad_hidden, grad_weight = _loss_and_gradients(hidden, head, targets, ignore, weight_too)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight.mul_(grad_loss)
        return grad_hidden.mul_(grad_loss), grad_weight, None, None, None, None


def _loss_and_gradients(
    hidden: Tensor, head: Head, targets: Tensor, ignore: int, weight_too: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, the gradient of `hidden`, and that of the output layer unless it is frozen."""
    hidden_c, head_c = _operands(hidden, head)
    loss = torch.zeros((), device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = None
    done = 0
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, chosen in _chunks(hidden_c, head.weight, targets):
            gradient = head_c.product(rows)  # the logits, for now
            loss = loss + _turn_into_gradient(gradient, head, chosen, ignore)
            grad_hidden[done : done + len(rows)] = gradient @ head_c.weight
            done += len(rows)
            if weight_too:
                grad_weight = _add_to_weight(grad_weight, gradient, rows, head.weight)
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


def _turn_into_gradient(logits: Tensor, head: Head, targets: Tensor, ignore: int) -> Tensor:
    """The fp32 sum of the losses of (n, V padded) products, which become its gradient."""
    losses: list[Tensor] = []
    vocab_size, cap = len(head.weight), head.cap
    for rows, index, counts in _blocks(logits, vocab_size, targets, ignore):
        exact = head.capped(rows.float())
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


def _operands(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Both as autocast would have them."""
    dtype = computed_in(hidden)
    if head.weight.dtype == dtype:
        return hidden.to(dtype), head
    bias = None if head.bias is None else _padded(head.bias, dtype)
    return hidden.to(dtype), Head(_padded(head.weight, dtype), bias, head.cap)


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, ...) in `dtype`, with zeros up to a multiple of 64 rows, which products like."""
    vocab_size = len(weight)
    padded = weight.new_empty((-(-vocab_size // _MULTIPLE) * _MULTIPLE, *weight.shape[1:]), dtype=dtype)
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
