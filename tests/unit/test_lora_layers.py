"""LoRA beside a linear layer: what peft computes, in fewer passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.models import lora_layers
from llmtrain.models.dropout import draw_seed, mask_of, zeroed
from llmtrain.models.qlora import QLoRA
from tests.support import bases as bases_made
from tests.support.bases import configure, write_gpt2, write_llama

WRITE = {"llama": write_llama, "gpt2": write_gpt2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp(kind)) for kind, write in WRITE.items()}


def build(base: Path, *settings: str) -> QLoRA:
    return bases_made.build(configure(base, "model.lora.target_modules=all-linear", *settings), stir=True).train()


def as_peft_has_it(model: QLoRA) -> int:
    """Take our forward passes away; how many there were."""
    return sum(module.__dict__.pop("forward", None) is not None for module in model.peft.modules())


def loss_and_gradients(model: QLoRA, bf16: bool) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    ids = torch.randint(1, 512, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(ids[:, :-1], ids[:, 1:]) / 64
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("quantisation", ["nf4", "int8", "none"])
@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        (["train.precision=fp32"], 1e-5),
        (["train.precision=bf16"], 4e-2),
        (["train.precision=fp32", "model.compute_dtype=bf16"], 4e-2),
        (["train.precision=bf16", "model.lora.dtype=bf16"], 4e-2),
    ],
    ids=["fp32", "bf16", "a bf16 base without autocast", "bf16 LoRA"],
)
def test_loss_and_gradients_are_pefts(
    settings: list[str], bound: float, kind: str, quantisation: str, bases: dict[str, Path]
):
    model = build(bases[kind], f"model.quantisation={quantisation}", *settings)
    bf16 = settings[0].endswith("bf16")
    mine, my_gradients = loss_and_gradients(model, bf16)
    assert as_peft_has_it(model) == len(model.trainable()) / 2
    theirs, their_gradients = loss_and_gradients(model, bf16)
    assert mine == pytest.approx(theirs, rel=bound / 10)
    assert my_gradients.keys() == their_gradients.keys() == model.trainable().keys()
    for name, gradient in my_gradients.items():
        expected = their_gradients[name]
        assert gradient.dtype == expected.dtype
        assert (gradient - expected).norm() <= bound * expected.norm(), name


def test_dropout_is_that_of_each_adapters_input():
    """Against autograd, with the mask that was drawn."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 12, requires_grad=True), torch.randn(20, 12)
    down, up = torch.randn(4, 12, requires_grad=True), torch.randn(20, 4, requires_grad=True)
    torch.manual_seed(8)
    found = lora_layers._AddLora.apply(x @ weight.t(), x, down, up, 0.5, 0.25)
    found.square().sum().backward()
    mine = [x.grad, down.grad, up.grad]
    x.grad = down.grad = up.grad = None
    torch.manual_seed(8)
    mask = mask_of(draw_seed(), x, 0.25)
    assert 0 < int((mask == 0).sum()) < mask.numel() / 2
    expected = x @ weight.t() + 0.5 * (x * (mask != 0) / 0.75) @ down.t() @ up.t()
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    for gradient, reference in zip(mine, [x.grad, down.grad, up.grad], strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_adapters_of_one_input_drop_out_on_their_own(bases: dict[str, Path]):
    model = build(bases["llama"], "model.quantisation=none", "model.lora.dropout=0.5")
    first: Any = model.peft.base_model.model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (first.q_proj, first.k_proj):
            projection.lora_A["default"].weight.copy_(torch.eye(8, 64))
            projection.lora_B["default"].weight.zero_()[:8] = torch.eye(8)
            projection.base_layer.weight.zero_()
    x = torch.ones(1, 40, 64)
    queries, keys = (projection(x)[..., :8] for projection in (first.q_proj, first.k_proj))
    for found in (queries, keys):
        assert set(found.unique().tolist()) == {0.0, 4.0}  # alpha / r = 2, over 1 - p
    assert not torch.equal(queries, keys)
    model.eval()
    assert torch.equal(first.q_proj(x)[..., :8], torch.full((1, 40, 8), 2.0))


def test_zeroed_is_what_the_mask_keeps():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(5, 6).to(dtype)
        mask = mask_of(draw_seed(), x, 0.3)
        assert torch.equal(zeroed(x, mask), torch.where(mask != 0, x, 0))


def test_layers_with_dora_are_pefts(bases: dict[str, Path]):
    assert as_peft_has_it(build(bases["llama"], "model.quantisation=none", "model.lora.dora=true")) == 0


@torch.no_grad()
def test_a_disabled_adapter_changes_nothing_and_a_merged_one_what_it_did(bases: dict[str, Path]):
    model = build(bases["llama"], "model.quantisation=none").eval()
    ids = torch.arange(1, 20).unsqueeze(0)
    adapted = model.peft(input_ids=ids).logits
    with model.peft.disable_adapter():
        plain = model.peft(input_ids=ids).logits
    model.peft.merge_adapter()
    merged = model.peft(input_ids=ids).logits
    assert (merged - adapted).abs().max() < 1e-4 < (plain - adapted).abs().max()
