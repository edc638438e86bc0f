"""Attention and dropout in training on a CPU, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.model_sections import GPTModel
from llmtrain.models import GPT, gpt
from llmtrain.models import attention as module
from llmtrain.models.attention import added_mask, attention, shared_mask
from llmtrain.models.dropout import dropout, keep_, keep_mask


def inputs(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(3, B, H, T, K) as the model makes them: views of one (B, T, 3, H, K)."""
    qkv = torch.randn(2, length, 3, 4, 16, generator=torch.Generator().manual_seed(length)).to(dtype)
    return qkv.permute(2, 0, 3, 1, 4).detach().requires_grad_()


def documents(length: int) -> Tensor:
    """(2, 1, T, T): the first row is one document, the second has three."""
    ids = torch.zeros(2, length, dtype=torch.int64)
    ids[1, length // 3 :] += 1
    ids[1, length // 2 :] += 1
    return (ids.unsqueeze(1) == ids.unsqueeze(2)).tril().unsqueeze(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
def test_our_path_is_torchs_attention_forward_and_backward(length: int, masked: bool):
    mask = documents(length) if masked else None
    upstream = torch.randn(2, 4, length, 16)
    found: list[tuple[Tensor, Tensor]] = []
    for ours in (True, False):
        qkv = inputs(length)
        out = (
            module._Attention.apply(*qkv, mask, 0.0)
            if ours
            else F.scaled_dot_product_attention(*qkv, mask, is_causal=not masked)
        )
        out.backward(upstream)
        assert qkv.grad is not None
        found.append((out.detach(), qkv.grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_in_bf16_it_is_as_close_to_the_truth_as_torchs_is():
    errors: list[tuple[float, float]] = []
    reference = inputs(300)
    truth = F.scaled_dot_product_attention(*reference, is_causal=True)
    truth.square().sum().backward()
    for ours in (True, False):
        qkv = inputs(300, torch.bfloat16)
        out = (
            attention(*qkv, None, True, 0.0) if ours else F.scaled_dot_product_attention(*qkv, is_causal=True)
        ).float()
        out.square().sum().backward()
        assert qkv.grad is not None
        assert reference.grad is not None
        errors.append(((out - truth).norm().item(), (qkv.grad.float() - reference.grad).norm().item()))
    assert errors[0][0] < 1.5 * errors[1][0]
    assert errors[0][1] < 1.5 * errors[1][1]


def test_with_dropout_gradients_are_those_of_what_was_computed():
    qkv = inputs(140, torch.float64)

    def again(*parts: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same masks at each call
        return attention(*parts, None, True, 0.3)

    assert torch.autograd.gradcheck(
        again, tuple(part.detach()[:1, :1].requires_grad_() for part in qkv), fast_mode=True
    )


def test_attention_with_dropout_is_without_bias():
    qkv = inputs(64)
    with torch.no_grad():
        plain = F.scaled_dot_product_attention(*qkv, is_causal=True)
    mean = sum(attention(*qkv, None, True, 0.2).detach() for _ in range(400)) / 400
    assert (mean - plain).abs().mean() < 0.03 * plain.abs().mean() + 0.02


def test_dropout_keeps_the_share_it_should_and_scales_it():
    torch.manual_seed(0)
    x = torch.ones(1_000_001, requires_grad=True)
    y = dropout(x, 0.1, training=True)
    y.sum().backward()
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(0.9, abs=0.0015)
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.9))
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(dropout(x, 0.1, training=False), x)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_masks_look_random(probability: float):
    torch.manual_seed(1)
    masks = torch.stack([keep_mask((250_000,), probability) for _ in range(4)])
    assert set(masks.unique().tolist()) == {-1, 0}
    drops = (masks == 0).double()
    assert (drops.mean(1) - probability).abs().max() < 0.005
    centred = drops - drops.mean(1, keepdim=True)
    variance = probability * (1 - probability)
    for distance in (1, 2, 3, 4, 5, 64, 1000):  # neighbours, in a word and beyond, know nothing of each other
        assert abs((centred[:, distance:] * centred[:, :-distance]).mean() / variance) < 0.01
    assert abs((centred[0] * centred[1]).mean() / variance) < 0.01  # nor do two masks


def test_masks_follow_torchs_generator():
    torch.manual_seed(5)
    first, second = keep_mask((1000,), 0.5), keep_mask((1000,), 0.5)
    torch.manual_seed(5)
    assert torch.equal(keep_mask((1000,), 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_writes_zeros_and_leaves_the_rest(dtype: torch.dtype):
    x = torch.randn(33, 5).to(dtype)
    mask = keep_mask((33, 5), 0.4)
    assert torch.equal(keep_(x.clone(), mask), torch.where(mask != 0, x, 0))


def test_a_mask_that_is_added_is_the_mask():
    """What GPUs are given: torch's attention computes with it what it computes with the other."""
    mask = documents(32)
    qkv = inputs(32).detach()
    expected = F.scaled_dot_product_attention(*qkv, mask)
    assert torch.equal(F.scaled_dot_product_attention(*qkv, added_mask(mask, torch.float32)), expected)


def test_with_a_mask_that_is_added_documents_have_the_same_losses(monkeypatch: pytest.MonkeyPatch):
    """The whole model, as on a GPU: all layers take the one mask that is made for the batch."""
    model = GPT(GPTModel(num_layers=2, num_heads=2, width=16, context=24), 50).eval()
    ids = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    doc_ids = torch.zeros(2, 24, dtype=torch.int32)
    doc_ids[1, 9:] = 1
    expected = model.token_losses(ids, ids, doc_ids)
    made: list[Tensor] = []

    def as_on_a_gpu(visible: Tensor, x: Tensor) -> Tensor:
        assert shared_mask(visible, x) is visible  # on a CPU ours takes it as it is
        made.append(added_mask(visible, x.dtype))
        return made[-1]

    monkeypatch.setattr(gpt, "shared_mask", as_on_a_gpu)
    assert torch.equal(model.token_losses(ids, ids, doc_ids), expected)
    assert len(made) == 1
    assert not torch.equal(model.token_losses(ids, ids, torch.zeros_like(doc_ids)), expected)
