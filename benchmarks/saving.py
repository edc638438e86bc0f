"""How long training stands still for a checkpoint: beside training against waiting for the disk.

    python -m benchmarks.saving [ROUNDS]

The 162 M model with AdamW (1.95 GB of state) on one rank. Both ways save in turn (A B A B ...) in one process, with a
training step between, through the code that training uses. Prints medians with their range.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import machine
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


def describe(step: int) -> Manifest:
    return Manifest(
        train_state=TrainState(step=step), seed=0, num_rows=1, global_batch_size=1, fingerprint="", world_size=1,
        strategy="ddp", heldout_loss=None, files={},
    )  # fmt: skip


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    config, world = RunConfig(model=MODEL), find_world("cpu")
    model = GPT(MODEL, VOCAB_SIZE, seed=0)
    strategy = build_strategy(config, model, world, bf16=True)
    ids = torch.randint(0, VOCAB_SIZE, (2, MODEL.context))
    batch = Batch(ids, ids, None, None, ids.numel())

    def step() -> float:
        began = time.perf_counter()
        strategy.accumulate(batch, 1 / ids.numel(), last=True)
        strategy.update(1e-4)
        return time.perf_counter() - began

    for _ in range(3):
        calm_s = step()
    waits: dict[str, list[float]] = {"beside training": [], "waiting for the disk": []}
    beside: list[float] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        run = RunDir(Path(scratch) / "run")
        run.create()
        savers = {
            name: Saver(
                run, world, strategy, lambda folder, weights: model.save(folder, weights, 0),
                CheckpointSection(background=name == "beside training"),
                lambda: retention.prune(run, {}, CheckpointSection(keep_last=1, keep_best=0)),
            )
            for name in waits
        }  # fmt: skip
        number = 0
        for _ in range(rounds):
            for name, saver in savers.items():
                number += 1
                waits[name].append(saver.save(describe(number)))
                if name == "beside training":
                    beside.append(step())
                saver.wait()
                step()
    print(f"{machine.described()}; {rounds} rounds\n")
    print("| a save of 162 M parameters with AdamW | training stands still, s (range) | ratio |\n|---|---|---|")
    disk = statistics.median(waits["waiting for the disk"])
    for name, found in waits.items():
        median = statistics.median(found)
        print(f"| {name} | {median:.2f} ({min(found):.2f} to {max(found):.2f}) | {median / disk:.2f} |")
    print(f"\nFirst save beside training, into fresh memory: {waits['beside training'][0]:.2f} s. ", end="")
    print(f"A step takes {calm_s:.2f} s, the one beside the writing {statistics.median(beside):.2f} s.")


if __name__ == "__main__":
    restart_with_settings()
    main()
