"""Under torchrun: what a strategy takes for gradients and optimizer, per rank. Prints JSON on rank 0.

torchrun --nproc_per_node 4 -m tests.support.memory_probe zero2
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from llmtrain.config.schema import GPTModel, RunConfig, StrategySection
from llmtrain.data import Batch
from llmtrain.models import GPT
from llmtrain.strategies import build_strategy
from llmtrain.world import World, find_world

MODEL = GPTModel(num_layers=12, num_heads=8, width=640, context=32)
TINY = GPTModel(num_layers=1, num_heads=2, width=16, context=32)
VOCAB_SIZE = 1024
STEPS = 2  # the second is where all of it is there


def resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def train(kind: str, world: World, shape: GPTModel, model: GPT | None = None) -> None:
    """A few steps of two micro-batches."""
    config = RunConfig(model=shape, strategy=StrategySection(kind=kind, bucket_mb=8.0))  # pyright: ignore[reportArgumentType]
    strategy = build_strategy(config, model or GPT(shape, VOCAB_SIZE, seed=1), world, bf16=False)
    ids = torch.randint(0, VOCAB_SIZE, (1, shape.context))
    batch = Batch(ids, ids, None, None, ids.numel())
    for _ in range(STEPS):
        for last in (False, True):
            strategy.accumulate(batch, 1e-3, last)
        strategy.update(1e-4)


def main() -> None:
    torch.set_num_threads(1)
    kind = sys.argv[1]
    world = find_world("cpu", "default")
    world.start_groups(300)
    train(kind, world, TINY)  # what libraries take by themselves is not asked for: a tiny model loads them
    model = GPT(MODEL, VOCAB_SIZE, seed=1)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    train(kind, world, MODEL, model)
    taken = torch.tensor(float(resident_bytes("VmHWM") - before), dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    if world.is_main:
        print(json.dumps({"parameters": model.num_parameters(), "bytes": taken.item()}))
    world.close()


if __name__ == "__main__":
    main()
