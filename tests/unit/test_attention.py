"""Attention and dropout in training on a CPU, against torch's own."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtrain.config.model_sections import GPTModel
from llmtrain.data import Documents
from llmtrain.models import GPT
from llmtrain.models import attention as module
from llmtrain.models.attention import added_mask, attention, kept_apart, visible
from llmtrain.models.dropout import dropout, keep_, keep_mask


def inputs(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(3, B, H, T, K) as the model makes them: views of one (B, T, 3, H, K)."""
    qkv = torch.randn(2, length, 3, 4, 16, generator=torch.Generator().manual_seed(length)).to(dtype)
    return qkv.permute(2, 0, 3, 1, 4).detach().requires_grad_()


def documents(length: int) -> Documents:
    """Of two rows: the first is one document, the second has up to three; the end stands there more than once."""
    starts = {0, length, length + length // 3, length + length // 2}
    return Documents(torch.tensor([*sorted(starts), 2 * length, 2 * length], dtype=torch.int32), length)


def reference(qkv: Tensor, apart: Documents | None, scale: float | None = None) -> Tensor:
    """torch's attention, with a mask."""
    if apart is None:
        return F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scale)
    mask = visible(apart, qkv.shape[1], qkv.shape[3])
    return F.scaled_dot_product_attention(*qkv, mask, scale=scale)


def test_a_mask_shows_what_came_before_in_the_document():
    mask = visible(Documents(torch.tensor([0, 4, 5, 8, 8]), 4), 2, 4)
    assert mask.int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
        [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]],
    ]


@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("ours", ["all at once", "one by one"])
def test_our_paths_are_torchs_attention_forward_and_backward(ours: str, length: int, packed: bool, scale: float | None):
    apart = documents(length) if packed else None
    bounds = [0, length, 2 * length] if apart is None else apart.starts.tolist()
    upstream = torch.randn(2, 4, length, 16)
    qkv, expected = inputs(length), inputs(length)
    if ours == "one by one":
        out = module._one_by_one(*qkv, bounds, 0.0, scale)
    else:
        out = module._Attention.apply(*qkv, bounds if packed else None, 0.0, scale)
    out.backward(upstream)
    truth = reference(expected, apart, scale)
    truth.backward(upstream)
    assert qkv.grad is not None
    assert expected.grad is not None
    assert torch.allclose(out, truth, atol=1e-5)
    assert torch.allclose(qkv.grad, expected.grad, atol=1e-5)


def kernel(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch says of `varlen_attn`."""
    assert starts_q is starts_k
    assert starts_q.dtype == torch.int32
    assert window_size == (-1, 0)  # causal
    assert enable_gqa == (q_NHK.shape[1] != k_NHK.shape[1])
    out = torch.zeros_like(q_NHK)
    for start, end in pairwise(starts_q.tolist()):
        assert end - start <= longest_q == longest_k
        if end > start:
            one = [x[start:end].transpose(0, 1).unsqueeze(0) for x in (q_NHK, k_NHK, v_NHK)]
            alone = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=enable_gqa)
            out[start:end] = alone[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_a_gpus_kernel_is_given_means_the_same(kv_heads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    q, k, v = inputs(90).detach()
    shared_k, shared_v = k[:, :kv_heads], v[:, :kv_heads]
    apart = documents(90)
    found = module._flash(q, shared_k, shared_v, apart, 0.3)
    repeated = [x.repeat_interleave(4 // kv_heads, 1) for x in (shared_k, shared_v)]
    assert torch.allclose(found, reference(torch.stack([q, *repeated]), apart, 0.3), atol=1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_torchs_kernel_takes_what_it_is_given(kv_heads: int):
    """Shapes alone, which torch checks without a GPU."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, h, 64, 32, device="cuda", dtype=torch.bfloat16) for h in (4, kv_heads, kv_heads))
        out = module._flash(q, k, v, Documents(torch.empty(8, dtype=torch.int32, device="cuda"), 64), None)
    assert out.shape == q.shape
    assert out.dtype == q.dtype


def test_torchs_kernel_is_given_what_autocast_would_make(monkeypatch: pytest.MonkeyPatch):
    """Base models compute queries in fp32 in places (layer norms on GPUs, DoRA), and the kernel takes none."""
    given: list[torch.dtype] = []

    def note(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        given.extend((q.dtype, k.dtype, v.dtype))
        return q

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", note)
    q, k, v = inputs(12).detach()
    with torch.autocast("cpu", torch.bfloat16):
        module._flash(q, k, v.bfloat16(), documents(12), None)
    assert given == [torch.bfloat16] * 3


@pytest.mark.gpu
def test_a_gpus_kernel_gives_what_a_mask_gives():
    device = torch.device("cuda")
    if not module.has_flash(device, 16):
        pytest.skip("a GPU older than Ampere")
    apart = Documents(documents(300).starts.to(device), 300)
    upstream = torch.randn(2, 4, 300, 16, device=device, dtype=torch.bfloat16)
    found: list[tuple[Tensor, Tensor]] = []
    for kernel in (True, False):
        qkv = inputs(300, torch.bfloat16).detach().to(device).requires_grad_()
        out = attention(*qkv, apart, False, 0.0) if kernel else reference(qkv, apart)
        out.backward(upstream)
        assert qkv.grad is not None
        found.append((out.detach(), qkv.grad))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found[0][1], found[1][1], atol=5e-2, rtol=5e-2)


def test_in_bf16_it_is_as_close_to_the_truth_as_torchs_is():
    errors: list[tuple[float, float]] = []
    exact = inputs(300)
    truth = F.scaled_dot_product_attention(*exact, is_causal=True)
    truth.square().sum().backward()
    for ours in (True, False):
        qkv = inputs(300, torch.bfloat16)
        out = (
            attention(*qkv, None, True, 0.0) if ours else F.scaled_dot_product_attention(*qkv, is_causal=True)
        ).float()
        out.square().sum().backward()
        assert qkv.grad is not None
        assert exact.grad is not None
        errors.append(((out - truth).norm().item(), (qkv.grad.float() - exact.grad).norm().item()))
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


def test_documents_one_by_one_have_dropout_too_and_without_bias():
    """Where the probabilities are too many to be kept, torch's own attention drops them."""
    qkv, bounds = inputs(64).detach(), documents(64).starts.tolist()
    plain = module._one_by_one(*qkv, bounds, 0.0, None)
    torch.manual_seed(0)
    dropped = torch.stack([module._one_by_one(*qkv, bounds, 0.2, None) for _ in range(300)])
    assert not torch.allclose(dropped[0], plain, atol=1e-2)
    assert (dropped.mean(0) - plain).abs().mean() < 0.03 * plain.abs().mean() + 0.02


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
    """What a GPU is given where its kernel cannot be used."""
    mask = visible(documents(32), 2, 32)
    qkv = inputs(32).detach()
    expected = F.scaled_dot_product_attention(*qkv, mask)
    assert torch.equal(F.scaled_dot_product_attention(*qkv, added_mask(mask, torch.float32)), expected)


@pytest.mark.parametrize("device", ["cpu", "a GPU with the kernel", "a GPU without"])
def test_documents_have_the_losses_that_they_have_alone(device: str, monkeypatch: pytest.MonkeyPatch):
    """The whole model: all layers take what is made once for the batch."""
    model = GPT(GPTModel(num_layers=2, num_heads=2, width=16, context=24), 50).eval()
    ids = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    given = Documents(torch.tensor([0, 24, 33, 48], dtype=torch.int32), 24)
    positions = torch.stack([torch.arange(24), torch.cat([torch.arange(9), torch.arange(15)])])
    alone = [
        model.token_losses(ids[row : row + 1, start:end], ids[row : row + 1, start:end])
        for row, start, end in ((0, 0, 24), (1, 0, 9), (1, 9, 24))
    ]
    made: list[Documents | Tensor] = []

    def kept_apart(documents: Documents, x: Tensor, flash: bool) -> Documents | Tensor:
        made.append(documents if "with the" in device else added_mask(visible(documents, 2, 24), x.dtype))
        return made[-1]

    if device != "cpu":
        monkeypatch.setattr("llmtrain.models.gpt.kept_apart", kept_apart)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        monkeypatch.setattr(module, "_one_by_one", lambda q, k, v, bounds, dropout, scale: module._flash(
            q, k, v, Documents(torch.tensor(bounds, dtype=torch.int32), 24), scale
        ))  # fmt: skip
    found = model.token_losses(ids, ids, given, positions)
    assert torch.allclose(found.flatten(), torch.cat([losses.flatten() for losses in alone]), atol=1e-5)
    assert len(made) == (device != "cpu")
    monkeypatch.undo()
    leaky = model.token_losses(ids, ids, None, positions)
    assert (leaky[1, 9:] - found[1, 9:]).abs().max() > 1e-3


def test_documents_go_to_the_kernel_of_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch):
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert module.has_flash(gpu, 64)
    assert module.has_flash(gpu, 256)
    assert not module.has_flash(gpu, 60)
    assert not module.has_flash(gpu, 264)
    assert not module.has_flash(torch.device("cpu"), 64)
    capability = (8, 6)
    assert module.has_flash(gpu, 192)
    assert not module.has_flash(gpu, 224)
    assert module.has_flash(gpu, 256)
    capability = (7, 5)
    assert not module.has_flash(gpu, 64)


def test_with_dropout_and_in_fp32_a_gpu_is_given_a_mask(monkeypatch: pytest.MonkeyPatch):
    given, x = Documents(torch.tensor([0, 24, 48], dtype=torch.int32), 24), torch.empty(2, 24, 16)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # a CPU that has no path of its own
        assert isinstance(kept_apart(given, x.bfloat16(), flash=True), Documents)
        in_fp32, without = kept_apart(given, x, flash=True), kept_apart(given, x.bfloat16(), flash=False)
    assert isinstance(in_fp32, Tensor)
    assert isinstance(without, Tensor)
    assert in_fp32.shape == without.shape == (2, 1, 24, 24)
    assert (in_fp32.dtype, without.dtype) == (torch.float32, torch.bfloat16)
    seen: list[bool] = []
    monkeypatch.setattr("llmtrain.models.gpt.kept_apart", lambda documents, x, flash: seen.append(flash))
    shape = GPTModel(num_layers=1, num_heads=2, width=16, context=24, dropout=0.1)
    model, ids = GPT(shape, 50, flash=True), torch.zeros(1, 24, dtype=torch.int64)
    model(ids, ids)
    model.eval()(ids, ids)
    assert seen == [False, True]
