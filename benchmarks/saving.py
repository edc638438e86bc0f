"""How long training stands still for a checkpoint: beside training against waiting for the disk.

    python -m benchmarks.saving [ROUNDS] [cpu|cuda]

The 162 M model with AdamW (1.95 GB of state) on one rank, 2 x 256; on a GPU 16 x 1,024. Both ways save in turn
(A B A B ...) in one process, through the code that training uses: some calm steps, then a save and as many steps beside
it. What these take longer is lost.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.words import with_range
from llmtrain import retention
from llmtrain.allocator import restart_with_settings
from llmtrain.config.schema import CheckpointSection, GPTModel, RunConfig
from llmtrain.data import Batch
from llmtrain.manifest import Manifest, TrainState
from llmtrain.models import GPT
from llmtrain.rundir import RunDir
from llmtrain.saver import Saver
from llmtrain.strategies import build_strategy
from llmtrain.world import find_world

MODEL = GPTModel(num_layers=12, num_heads=12, width=768, context=256, qkv_bias=False, tie_weights=False, init="pytorch")
VOCAB_SIZE = 50257
_STEPS = 6
"""Enough for the save to end within them."""


def describe(step: int) -> Manifest:
    return Manifest(
        train_state=TrainState(step=step), seed=0, num_rows=1, global_batch_size=1, fingerprint="", world_size=1,
        strategy="ddp", heldout_loss=None, files={},
    )  # fmt: skip


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    on_gpu = sys.argv[2:] == ["cuda"]
    model_config = MODEL.model_copy(update={"context": 1024}) if on_gpu else MODEL
    config, world = RunConfig(model=model_config), find_world("cuda" if on_gpu else "cpu", "default")
    model = GPT(model_config, VOCAB_SIZE, seed=0)
    strategy = build_strategy(config, model, world, bf16=True)
    ids = torch.randint(0, VOCAB_SIZE, (16 if on_gpu else 2, model_config.context), device=world.device)
    batch = Batch(ids, ids, None, None, ids.numel())

    def step(saver: Saver) -> float:
        """As the loop does it: the copy goes on beside the gradients, the update waits for it."""
        began = time.perf_counter()
        strategy.accumulate(batch, 1 / ids.numel(), last=True)
        saver.until_copied()
        strategy.update(1e-4)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    lost: dict[str, list[float]] = {"beside training": [], "waiting for the disk": []}
    longest: dict[str, list[float]] = {name: [] for name in lost}
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        run = RunDir(Path(scratch) / "run")
        run.create()
        savers = {
            name: Saver(
                run, world, strategy, lambda folder, weights: model.save(folder, weights, 0),
                CheckpointSection(background=name == "beside training"),
                lambda: retention.prune(run, {}, CheckpointSection(keep_last=1, keep_best=0)),
            )
            for name in lost
        }  # fmt: skip
        number = 0
        for _ in range(rounds):
            for name, saver in savers.items():
                calm = [step(saver) for _ in range(_STEPS + 1)][1:]
                number += 1
                began = time.perf_counter()
                saver.save(describe(number))
                first = time.perf_counter() - began
                beside = [step(saver) for _ in range(_STEPS)]
                saver.wait()
                beside[0] += first
                lost[name].append(sum(beside) - sum(calm))
                longest[name].append(max(beside) - statistics.median(calm))
                print(f"{name}: lost {lost[name][-1]:.2f} s, a step {longest[name][-1]:.2f} s later", file=sys.stderr)
    print(f"{machine.with_limits()}; {rounds} rounds\n")
    print(
        "| a save of 162 M with AdamW, and the steps beside it | lost in all, s (range) | the slowest step, s later |"
    )
    print("|---|---|---|")
    for name, found in lost.items():
        print(f"| {name} | {with_range(found, '.2f')} | {statistics.median(longest[name]):.2f} |")
    print(f"\nThe first save, into fresh memory, lost {lost['beside training'][0]:.2f} s.")


if __name__ == "__main__":
    restart_with_settings()
    main()
