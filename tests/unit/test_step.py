"""What a step may not do: keep memory, wait for the device; and what seeds it."""

import pytest
import torch

from llmtrain.config.schema import GPTModel, RunConfig
from llmtrain.data import Batch, Documents
from llmtrain.models import GPT
from llmtrain.models.attention import has_flash
from llmtrain.models.dropout import keep_mask
from llmtrain.strategies import build_strategy, deepspeed_config
from llmtrain.strategies.zero2 import ZeRO2Strategy
from llmtrain.trainer import seed_step
from llmtrain.world import World

SMALL = GPTModel(num_layers=2, num_heads=2, width=32, context=24, dropout=0.1)


def world(rank: int = 0, device: str = "cpu") -> World:
    return World(rank, 4, 0, torch.device(device))


def drawn(seed: int, step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    seed_step(seed, step, world(rank))
    return torch.rand(100), keep_mask((1000,), 0.5)


def test_random_numbers_are_a_function_of_seed_step_and_rank():
    numbers, mask = drawn(1, 2, 3)
    torch.rand(17)  # whatever is drawn in between
    again, same_mask = drawn(1, 2, 3)
    assert torch.equal(numbers, again)
    assert torch.equal(mask, same_mask)
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 0)):
        assert not torch.equal(drawn(*other)[0], numbers)
        assert not torch.equal(drawn(*other)[1], mask)


def test_seeding_keeps_nothing():
    """torch.manual_seed notes a stack trace at each call as long as there is no GPU."""
    queued = torch.cuda._queued_calls
    before = len(queued)
    for step in range(5):
        seed_step(0, step, world())
    assert len(queued) == before


def test_a_step_goes_back_to_training_after_evaluating_and_generating():
    model = GPT(SMALL, 100)
    strategy = build_strategy(RunConfig(model=SMALL), model, World(0, 1, 0, torch.device("cpu")), bf16=False)
    ids = torch.zeros(2, SMALL.context, dtype=torch.int64)
    batch = Batch(ids, ids, None, None, ids.numel())
    for evaluate in (lambda: strategy.loss(batch), lambda: model.text_generator().next_logits(ids[0, :3])):
        evaluate()
        assert not any(module.training for module in model.modules())
        strategy.accumulate(batch, 1.0, last=True)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_the_model_is_told_what_is_learned(kind: str):
    told: list[torch.Tensor | None] = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, *given: torch.Tensor | None) -> torch.Tensor:
            told.append(given[4])
            return 1 * self.weight

    class Engine(Model):
        def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
            assert not scale_wrt_gas

    if kind == "zero2":
        strategy = ZeRO2Strategy.__new__(ZeRO2Strategy)  # DeepSpeed's engine in there calls the model
        strategy._world, strategy._bf16, strategy._engine = World(0, 1, 0, torch.device("cpu")), False, Engine()
        strategy._module = strategy._engine
    else:
        strategy = build_strategy(RunConfig(), Model(), World(0, 1, 0, torch.device("cpu")), bf16=False)
    ids, learned = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 4])
    strategy.accumulate(Batch(ids, ids, None, None, 2, learned), 1.0, last=True)
    strategy.loss(Batch(ids, ids, None, None, 2, learned))
    assert told == [learned, learned]


def test_what_deepspeed_is_told_for_a_gpu():
    """A gradient larger than a bucket would be freed while it is summed; the timer would wait in every forward pass."""
    parameters = [torch.empty(10), torch.empty(30_000_001, device="meta")]
    sizes: list[int] = []
    for device in ("cpu", "cuda"):
        told = deepspeed_config(RunConfig(), parameters, torch.device(device))
        sizes.append(told["zero_optimization"]["reduce_bucket_size"])
        assert not told["timers"]["throughput"]["enabled"]
    assert sizes == [6_250_000, 30_000_002]


@pytest.mark.gpu
@pytest.mark.parametrize("documents", ["none", "by a mask", "by the kernel"])
def test_a_step_never_waits_for_the_gpu(documents: str):
    gpu = world(device="cuda")
    alone = World(0, 1, 0, gpu.device)
    by_kernel = documents == "by the kernel"
    if by_kernel and not has_flash(gpu.device, SMALL.width // SMALL.num_heads):
        pytest.skip("a GPU older than Ampere")
    shape = SMALL.model_copy(update={"dropout": 0.0}) if by_kernel else SMALL
    strategy = build_strategy(RunConfig(model=shape), GPT(shape, 100, flash=by_kernel), alone, bf16=True)
    ids = torch.zeros(2, SMALL.context, dtype=torch.int64)
    given = None if documents == "none" else Documents(torch.tensor([0, 9, 24, 48], dtype=torch.int32), 24)
    positions = None if documents == "none" else torch.arange(24).expand(2, -1).contiguous()
    batch = Batch(ids, ids, given, positions, ids.numel()).to(gpu.device)

    def step(number: int) -> torch.Tensor:
        seed_step(0, number, gpu)
        loss = strategy.accumulate(batch, 1.0, last=False) + strategy.accumulate(batch, 1.0, last=True)
        return loss + strategy.update(1e-4)

    for number in range(3):
        step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.isfinite()
