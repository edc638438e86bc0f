"""What a GPU has kernels for and a CPU has none: FlashAttention for rows of different lengths, integers' histograms."""

from itertools import pairwise

import torch


def _documents(q, starts, longest, causal, window):
    """The kernel's own conditions; then where each document lies."""
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[-1] % 8 == 0
    assert starts.dtype == torch.int32
    assert (causal, list(window)) == (True, [-1, 0])
    bounds = starts.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(q)
    found = [(start, end) for start, end in pairwise(bounds) if end > start]
    assert max(end - start for start, end in found) <= longest
    return found


def _probabilities(q_HTK, k_HTK, scale):
    later = torch.ones(q_HTK.shape[1], k_HTK.shape[1], dtype=torch.bool).triu(1)
    return (q_HTK @ k_HTK.mT * scale).masked_fill(later, float("-inf")).softmax(-1)


def _heads(x_NHK, document, groups=1):
    start, end = document
    return x_NHK[start:end].transpose(0, 1).float().repeat_interleave(groups, 0)


def attention(
    q, k, v, starts, starts_k, longest, longest_k, causal, scale, window, gqa=False, used=None, table=None, splits=None
):
    """`torch_attn::_varlen_attn`: (N, H, K) each; k and v may have fewer heads."""
    assert q.dtype == k.dtype == v.dtype
    assert torch.equal(starts, starts_k)
    assert longest == longest_k
    assert used is table is splits is None
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    assert gqa == (groups > 1)
    out = torch.zeros_like(q)
    for document in _documents(q, starts, longest, causal, window):
        p = _probabilities(_heads(q, document), _heads(k, document, groups), scale)
        out[slice(*document)] = (p @ _heads(v, document, groups)).transpose(0, 1).to(q.dtype)
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def attention_backward(grad, q, k, v, out, lse, starts, starts_k, longest, longest_k, causal, rng, scale, window):
    """`torch_attn::_varlen_attn_backward`."""
    assert grad.dtype == q.dtype
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    for document in _documents(q, starts, longest, causal, window):
        queries, upstream = _heads(q, document), _heads(grad, document)
        keys, values = _heads(k, document, groups), _heads(v, document, groups)
        p = _probabilities(queries, keys, scale)
        grad_p = upstream @ values.mT
        grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * scale
        for into, part, shared in (
            (grad_q, grad_scores @ keys, 1),
            (grad_k, grad_scores.mT @ queries, groups),
            (grad_v, p.mT @ upstream, groups),
        ):
            summed = part.view(-1, shared, *part.shape[1:]).sum(1)
            into[slice(*document)] = summed.transpose(0, 1).to(into.dtype)
    return grad_q, grad_k, grad_v


def histogram(x, bins=100, min=0, max=0):
    """`aten::histc`: how many tokens go to each expert."""
    return torch.histc(x.float(), bins, min, max).to(x.dtype)


KERNELS = {
    "torch_attn::_varlen_attn": attention, "torch_attn::_varlen_attn_backward": attention_backward,
    "aten::histc": histogram,
}  # fmt: skip
