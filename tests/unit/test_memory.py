"""What `llmtrain plan` counts, counted again on real models."""

import pytest
import torch

from llmtrain.batches import BatchPlan
from llmtrain.config.model_sections import GPTModel
from llmtrain.config.schema import RunConfig, TrainSection
from llmtrain.memory import WholeSizes, layer_activations, loss_chunk, num_parameters
from llmtrain.models import GPT
from tests.support.kept import kept

PLAN = BatchPlan(global_batch_size=8, micro_batch_size=8, accumulation=1, total_steps=10)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_number_of_parameters_is_the_models(tied: bool, bias: bool):
    config = GPTModel(num_layers=3, num_heads=2, width=48, context=40, tie_weights=tied, qkv_bias=bias)
    assert num_parameters(config, 321) == GPT(config, 321).num_parameters()


def kept_bytes(config: GPTModel, bf16: bool) -> int:
    """What autograd keeps of one forward pass over 4 rows, without the parameters."""
    model = GPT(config, 512)
    ids = torch.zeros(4, config.context, dtype=torch.int64)
    with kept(model, bf16) as found:
        loss = model(ids, ids)
    assert loss.requires_grad
    return found.bytes


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_layer_keeps_is_what_autograd_keeps(bf16: bool, dropout: float):
    two, four = (GPTModel(num_layers=layers, num_heads=4, width=256, context=128, dropout=dropout) for layers in (2, 4))
    measured = (kept_bytes(four, bf16) - kept_bytes(two, bf16)) / 2
    casts = 256**2 * 2 if bf16 else 0  # of attention's output layer; the others are cast anew
    assert layer_activations(two, 4 * 128, bf16, "cpu") + casts == pytest.approx(measured, rel=0.02)


def total(kind: str, ranks: int = 1, **train: object) -> float:
    config = RunConfig(train=TrainSection.model_validate(train), model=GPTModel(num_layers=12, width=768, num_heads=12))
    parts = WholeSizes(config.model, 50257).estimate(config, PLAN, ranks, kind, bf16=True, device="cuda")
    assert all(part.size_bytes >= 0 for part in parts)
    return sum(part.size_bytes for part in parts)


def test_zero2_takes_less_the_more_ranks_there_are():
    assert total("zero2", 64) < total("zero2", 8) < total("ddp", 8) == total("ddp", 64)


def test_zero2_keeps_a_share_of_the_gradients():
    config = RunConfig()
    sizes = WholeSizes(config.model, 8192)

    def gradients(ranks: int) -> float:
        parts = sizes.estimate(config, PLAN, ranks, "zero2", bf16=True, device="cuda")
        (found,) = [part.size_bytes for part in parts if part.name == "gradients"]
        return found

    assert gradients(1) - gradients(4) == pytest.approx(3 * sizes.trainable)  # 4 bytes each, and a quarter of that


def test_activation_checkpointing_takes_less():
    assert total("ddp", activation_checkpointing=True) < total("ddp")


def test_saving_without_background_takes_no_host_memory():
    config = RunConfig()
    sizes = WholeSizes(config.model, 8192)
    assert sizes.host_copy(config, 1) == 12 * num_parameters(config.model, 8192)
    plain = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"background": False})})
    assert sizes.host_copy(plain, 1) == 0


def test_a_large_vocabulary_makes_the_loss_take_fewer_positions_at_a_time():
    assert loss_chunk("cuda", 50_257) == 4096
    assert loss_chunk("cuda", 128_256) * 128_256 <= 2**28
    assert loss_chunk("cpu", 128_256) == 512
