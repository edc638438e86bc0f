"""What the loop costs beside a bare one over the same model: `python -m benchmarks.overhead [TURNS]`.

A whole run of a tiny GPT (2 layers, width 64, 8 x 64, fp32) with TensorBoard at every step, clipping, schedule,
checks, ledger and checkpoint manager. In the same process, its loop and a bare one take turns of 25 steps over the
same model, optimizer and tokens (A B A B ...), so that a machine which others use as well slows both. A turn of ours
counts everything between its first and its last step: waiting for data too, and what its threads take from it.
"""

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.step import Row, settings_of, write_shards
from llmtrain import assemble
from llmtrain.allocator import restart_with_settings
from llmtrain.data import Batch, StepData
from llmtrain.trainer import Parts, train

ROW = Row("", {"num_layers": 2, "num_heads": 2, "width": 64, "context": 64, "dropout": 0.0}, 8, 1024, ("fp32",), (), 1)
TURN = 25


class TakingTurns:
    """A loader that, whenever the loop has taken a turn, takes one with a bare loop and times both."""

    def __init__(self, parts: Parts):
        self._loader: Any = parts.loader
        self._module: nn.Module = parts.strategy._module  # pyright: ignore
        self._optimizer = torch.optim.AdamW(self._module.parameters(), lr=1e-5, fused=True)
        self.ours_ms: list[float] = []
        self.bare_ms: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def steps(self, first_sample: int, num_steps: int) -> Iterator[StepData]:
        kept: list[Batch] = []
        began = time.perf_counter()
        for number, data in enumerate(self._loader.steps(first_sample, num_steps), start=1):
            kept = [*kept, *data.batches][-16:]
            yield data
            if number % TURN == 0:
                self.ours_ms.append(1e3 * (time.perf_counter() - began) / TURN)
                began = time.perf_counter()
                self._bare(kept)
                self.bare_ms.append(1e3 * (time.perf_counter() - began) / TURN)
                began = time.perf_counter()

    def _bare(self, batches: list[Batch]) -> None:
        """The shortest loop that reads its loss."""
        for batch in itertools.islice(itertools.cycle(batches), TURN):
            loss = self._module(batch.input_ids, batch.targets)
            (loss / batch.num_targets).backward()
            nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            loss.item()


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 240
    found: list[TakingTurns] = []

    def train_in_turns(parts: Parts, state: Any) -> Any:
        found.append(TakingTurns(parts))
        parts.loader = found[0]  # pyright: ignore
        return train(parts, state)

    assemble.train = train_in_turns
    assemble.become_finish = lambda *_: None  # pyright: ignore  it would replace this process by the summary's
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        folder = Path(scratch)
        write_shards(folder, ROW, num_steps=1024)  # with a few, working out the next epoch's order would show
        settings = [*settings_of(folder, ROW, "fp32"), f"train.steps={turns * TURN}", "run.name=turns"]
        assemble.run(None, [*settings, "service.start=never"])
    ours, bare = found[0].ours_ms[1:], found[0].bare_ms[1:]
    more = [a - b for a, b in zip(ours, bare, strict=True)]
    quartiles = statistics.quantiles(more, n=4)
    print(f"{machine.with_limits()}\n")
    print(f"{len(more)} turns of {TURN} steps each, in turn, in one process; medians")
    print(f"ours {statistics.median(ours):.3f} ms a step, bare loop {statistics.median(bare):.3f}")
    print(f"ours takes {statistics.median(more):+.3f} ms more (quartiles {quartiles[0]:+.3f} to {quartiles[2]:+.3f})")


if __name__ == "__main__":
    restart_with_settings()
    main()
