"""Causal attention (Vaswani et al. 2017, section 3.2): torch's, and for training on a CPU one of our own.

torch's fused kernel for CPUs is quick forward, but in bf16 its backward pass takes longer than plain batched products
do, and with dropout it is not used at all. Ours takes the queries in blocks, so that keys which no query of a block
may see are not computed, and keeps the probabilities, in the dtype of its inputs.

Shapes: B rows, H heads, T positions, K width of a head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.memory import attention_blocks, keeps_probabilities
from llmtrain.models.dropout import keep_, keep_mask


def attention(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """(B, H, T, K). `mask`, in place of `causal`: (B, 1, T, T), from `shared_mask`."""
    if trains_on_cpu(q_BHTK) and keeps_probabilities(q_BHTK.shape[2], q_BHTK.dtype == torch.bfloat16, dropout):
        return _Attention.apply(q_BHTK, k_BHTK, v_BHTK, mask, dropout)
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, mask, dropout, is_causal=causal)


def shared_mask(visible: Tensor | None, x: Tensor) -> Tensor | None:
    """`visible` (B, 1, T, T), True where a query may see a key, as all layers take it: on a GPU, added to scores.

    torch's attention would make that of `visible` in each layer anew, and keep it there for the backward pass.
    """
    if visible is None or x.device.type == "cpu":
        return visible
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return added_mask(visible, dtype)


def added_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may see a key, minus infinity where not."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def trains_on_cpu(x: Tensor) -> bool:
    """Whether paths of our own are taken: `x` will have a gradient, on a CPU, and torch's compiler is not looking."""
    return x.device.type == "cpu" and x.requires_grad and not torch.compiler.is_compiling()


class _Attention(torch.autograd.Function):
    """Of as many queries as keys; a given mask lets no query see a later key."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        batch, heads, length, width = q_BHTK.shape
        q, k, v = (x.reshape(batch * heads, length, width) for x in (q_BHTK, k_BHTK, v_BHTK))
        out = torch.empty_like(q)
        kept: list[Tensor] = []
        for start, end in attention_blocks(length):
            scores = torch.baddbmm(
                _bias(q, mask, heads, start, end), q[:, start:end], k[:, :end].transpose(1, 2), alpha=width**-0.5
            )
            probabilities = torch.softmax(scores, -1)
            kept.append(probabilities)
            if dropout:
                kept.append(keep_mask(probabilities.shape, dropout))
                probabilities = keep_(probabilities.clone(), kept[-1])
            torch.bmm(probabilities, v[:, :end], out=out[:, start:end])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.shape, ctx.dropout = q_BHTK.shape, dropout
        return out.mul_(1 / (1 - dropout)).view(q_BHTK.shape) if dropout else out.view(q_BHTK.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *kept = ctx.saved_tensors
        length, scale = q.shape[1], q.shape[2] ** -0.5
        grad = grad.reshape(q.shape)
        if ctx.dropout:
            grad = grad * (1 / (1 - ctx.dropout))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for start, end in reversed(attention_blocks(length)):
            mask = kept.pop() if ctx.dropout else None
            probabilities = kept.pop()
            grad_block = grad[:, start:end]
            grad_probabilities = torch.bmm(grad_block, v[:, :end].transpose(1, 2))
            dropped = probabilities
            if mask is not None:
                keep_(grad_probabilities, mask)
                dropped = keep_(probabilities.clone(), mask)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probabilities, probabilities, -1, q.dtype)
            # The last block comes first and sees all keys: it overwrites (beta 0), the others add.
            beta = 0 if end == length else 1
            _add_product(grad_v[:, :end], dropped.transpose(1, 2), grad_block, beta, 1.0)
            _add_product(grad_k[:, :end], grad_scores.transpose(1, 2), q[:, start:end], beta, scale)
            _add_product(grad_q[:, start:end], grad_scores, k[:, :end], 0, scale)
        return grad_q.view(ctx.shape), grad_k.view(ctx.shape), grad_v.view(ctx.shape), None, None


def _add_product(into: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float) -> None:
    torch.baddbmm(into, a, b, beta=beta, alpha=alpha, out=into)


def _bias(q: Tensor, mask: Tensor | None, heads: int, start: int, end: int) -> Tensor:
    """What is added to the scores of these queries: 0, or minus infinity where a key is hidden."""
    if mask is None:
        return torch.full((end - start, end), -math.inf, dtype=q.dtype).triu_(start + 1)
    bias = added_mask(mask[:, :, start:end, :end], q.dtype)
    return bias.expand(-1, heads, -1, -1).reshape(len(q), end - start, end)
