"""Causal attention (Vaswani et al. 2017, section 3.2), within documents where several share a row.

On a CPU in training it is our own: torch's fused kernel is quick forward, but in bf16 its backward pass takes longer
than plain batched products do, and with dropout it is not used at all. Ours takes the queries in blocks, so that keys
which no query of a block may see are not computed, and keeps the probabilities, in the dtype of its inputs. Documents
are computed one after the other, so that a row of many costs what they cost, not the square of its length; on a GPU
FlashAttention's kernel for rows of different lengths does the same (`torch.nn.attention.varlen`).

Shapes: B rows, H heads, T positions, K width of a head, D documents.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.data import Documents
from llmtrain.memory import attention_blocks, keeps_probabilities
from llmtrain.models.dropout import keep_, keep_mask

FLASH_DTYPES = (torch.bfloat16, torch.float16)
_WIDE = ((8, 0), (9, 0), (10, 0))
"""GPUs (A100, H100 and H200, B200) on which FlashAttention has a backward pass for heads of 200 to 224 too."""


def attention(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    apart: Documents | Tensor | None,
    causal: bool,
    dropout: float,
    scale: float | None = None,
) -> Tensor:
    """(B, H, T, K); keys and values may have fewer heads, each for several of the queries' (Ainslie et al. 2023).

    `apart`, from `kept_apart`, says who sees whom in place of `causal`; `scale`: 1/sqrt(K) if None.
    Where documents begin is read on CPUs alone: on a GPU that would be a host sync.
    """
    groups = q_BHTK.shape[1] // k_BHTK.shape[1]
    is_flash = isinstance(apart, Documents) and q_BHTK.device.type != "cpu"  # which takes them as they are
    if groups > 1 and not is_flash:
        k_BHTK, v_BHTK = k_BHTK.repeat_interleave(groups, 1), v_BHTK.repeat_interleave(groups, 1)
    bf16 = q_BHTK.dtype == torch.bfloat16
    if isinstance(apart, Documents):
        if is_flash:
            return _flash(q_BHTK, k_BHTK, v_BHTK, apart, scale)
        bounds: list[int] = apart.starts.tolist()
        longest = max(end - start for start, end in pairwise(bounds))
        if trains_on_cpu(q_BHTK) and keeps_probabilities(longest, bf16, dropout):
            return _Attention.apply(q_BHTK, k_BHTK, v_BHTK, bounds, dropout, scale)
        return _one_by_one(q_BHTK, k_BHTK, v_BHTK, bounds, dropout, scale)
    if apart is None and trains_on_cpu(q_BHTK) and keeps_probabilities(q_BHTK.shape[2], bf16, dropout):
        return _Attention.apply(q_BHTK, k_BHTK, v_BHTK, None, dropout, scale)
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, apart, dropout, is_causal=causal, scale=scale)


def kept_apart(documents: Documents | None, x: Tensor, flash: bool) -> Documents | Tensor | None:
    """How the layers are to keep documents apart: made once for a batch, whose embeddings are `x` (B, T, ...).

    Args:
        documents: None if each row is one.
        flash: `has_flash`, and no dropout.

    Returns:
        `documents` where they are computed one by one, else a mask that is added to the scores, (B, 1, T, T): on GPUs
        without the kernel, in fp32 there, and in what torch compiles for a CPU.
    """
    if documents is None:
        return None
    dtype = computed_in(x)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    alone = on_cpu or (flash and dtype in FLASH_DTYPES)
    return documents if alone else added_mask(visible(documents, *x.shape[:2]), dtype)


def computed_in(x: Tensor) -> torch.dtype:
    """What autocast makes of `x` in what it computes in low precision: torch's attention, products."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def has_flash(device: torch.device, width: int) -> bool:
    """Whether this is a GPU with FlashAttention's kernel for documents, with a backward pass for heads of this width.

    The kernel takes FLASH_DTYPES, and has no dropout. Not to be asked in what torch compiles.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    narrow = width <= 192 or (width <= 256 and (width > 224 or capability in _WIDE))
    return capability >= (8, 0) and width % 8 == 0 and narrow


def visible(documents: Documents, num_rows: int, length: int) -> Tensor:
    """(B, 1, T, T): True where a query may see a key: not later, and in the same document."""
    places = torch.arange(num_rows * length, device=documents.starts.device)
    number = (places.unsqueeze(1) >= documents.starts).sum(1).view(num_rows, length)
    return (number.unsqueeze(1) == number.unsqueeze(2)).tril().unsqueeze(1)


def added_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may see a key, minus infinity where not."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def trains_on_cpu(x: Tensor) -> bool:
    """Whether paths of our own are taken: `x` will have a gradient, on a CPU, and torch's compiler is not looking."""
    return x.device.type == "cpu" and x.requires_grad and not torch.compiler.is_compiling()


def _flash(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, documents: Documents, scale: float | None) -> Tensor:
    """On a GPU; k and v may have fewer heads. `to` does what autocast does for torch's own attention, and not here."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, width = q_BHTK.shape
    dtype = computed_in(q_BHTK)
    given = (x.to(dtype).transpose(1, 2) for x in (q_BHTK, k_BHTK, v_BHTK))
    q, k, v = (x.reshape(batch * length, x.shape[2], width) for x in given)
    out = varlen_attn(
        q, k, v, documents.starts, documents.starts, documents.longest, documents.longest,
        scale=scale, window_size=(-1, 0), enable_gqa=k.shape[1] != heads,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.view(batch, length, heads, width).transpose(1, 2)


def _one_by_one(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, bounds: list[int], dropout: float, scale: float | None
) -> Tensor:
    """torch's attention, document by document. Split and joined once: a slice's gradient is as large as the whole."""
    batch, heads, length, _ = q_BHTK.shape
    lengths = [end - start for start, end in pairwise(bounds) if end > start]
    parts = (x.transpose(1, 2).reshape(batch * length, heads, -1).split(lengths) for x in (q_BHTK, k_BHTK, v_BHTK))
    out = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1).unsqueeze(0) for x in one), dropout_p=dropout, is_causal=True, scale=scale
        )
        for one in zip(*parts, strict=True)
    ]
    return torch.cat([x.squeeze(0).transpose(0, 1) for x in out]).view(batch, length, heads, -1).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """As many queries as keys, and as many heads of each. `bounds`: of the documents; None if each row is one."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHTK: Tensor,
        k_BHTK: Tensor,
        v_BHTK: Tensor,
        bounds: list[int] | None,
        dropout: float,
        scale: float | None,
    ) -> Tensor:
        batch, heads, length, width = q_BHTK.shape
        q, k, v = (x.reshape(batch * heads, length, width) for x in (q_BHTK, k_BHTK, v_BHTK))
        out = torch.empty_like(q)
        kept: list[Tensor] = []
        ctx.blocks, ctx.scale = list(_blocks(bounds, batch, heads, length)), width**-0.5 if scale is None else scale
        for rows, keys, queries in ctx.blocks:
            late = torch.full((queries.stop - queries.start, keys.stop - keys.start), -math.inf, dtype=q.dtype)
            late.triu_(queries.start - keys.start + 1)
            scores = torch.baddbmm(late, q[rows, queries], k[rows, keys].transpose(1, 2), alpha=ctx.scale)
            probabilities = torch.softmax(scores, -1)
            kept.append(probabilities)
            if dropout:
                kept.append(keep_mask(probabilities.shape, dropout))
                probabilities = keep_(probabilities.clone(), kept[-1])
            torch.bmm(probabilities, v[rows, keys], out=out[rows, queries])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.shape, ctx.dropout = q_BHTK.shape, dropout
        return out.mul_(1 / (1 - dropout)).view(q_BHTK.shape) if dropout else out.view(q_BHTK.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *kept = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        if ctx.dropout:
            grad = grad * (1 / (1 - ctx.dropout))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        last = (-1, -1)  # rows and first key of the document that the block before belonged to
        for rows, keys, queries in reversed(ctx.blocks):
            mask = kept.pop() if ctx.dropout else None
            probabilities = kept.pop()
            grad_block = grad[rows, queries]
            grad_probabilities = torch.bmm(grad_block, v[rows, keys].transpose(1, 2))
            dropped = probabilities
            if mask is not None:
                keep_(grad_probabilities, mask)
                dropped = keep_(probabilities.clone(), mask)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probabilities, probabilities, -1, q.dtype)
            # A document's last block comes first and sees all its keys: it overwrites (beta 0), the others add.
            beta = 0 if (rows.start, keys.start) != last else 1
            last = (rows.start, keys.start)
            _add_product(grad_v[rows, keys], dropped.transpose(1, 2), grad_block, beta, 1.0)
            _add_product(grad_k[rows, keys], grad_scores.transpose(1, 2), q[rows, queries], beta, ctx.scale)
            _add_product(grad_q[rows, queries], grad_scores, k[rows, keys], 0, ctx.scale)
        return grad_q.view(ctx.shape), grad_k.view(ctx.shape), grad_v.view(ctx.shape), None, None, None


def _blocks(bounds: list[int] | None, batch: int, heads: int, length: int) -> Iterator[tuple[slice, slice, slice]]:
    """What is computed together: rows (of heads), the keys that are seen, the queries, which end with them.

    The blocks of a document follow each other; all rows are taken at once where each is a document.
    """
    if bounds is None:
        documents = [(slice(0, batch * heads), 0, length)]
    else:
        found = [(start // length, start % length, end - start) for start, end in pairwise(bounds) if end > start]
        documents = [(slice(row * heads, (row + 1) * heads), start, count) for row, start, count in found]
    for rows, first, count in documents:
        for start, end in attention_blocks(count):
            yield rows, slice(first, first + end), slice(first + start, first + end)


def _add_product(into: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float) -> None:
    torch.baddbmm(into, a, b, beta=beta, alpha=alpha, out=into)
