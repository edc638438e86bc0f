"""What TensorBoard is told of a run's speed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain import metrics
from llmtrain.batches import BatchPlan
from llmtrain.manifest import TrainState
from llmtrain.metrics import Meter
from llmtrain.progress import Progress
from llmtrain.rundir import RunDir
from llmtrain.world import World

PEAK = 1000.0
FLOPS_PER_TOKEN = 5.0


def speeds(folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, waits_s: list[float]) -> list[dict[str, float]]:
    """Of steps that are read one by one; `waits_s`: for data, by the end of each, counted from the beginning."""
    monkeypatch.setattr(World, "sum_floats", lambda _, values: values)
    monkeypatch.setattr(metrics, "peak_flops", lambda _: PEAK)
    run = RunDir(folder / "run")
    run.create()
    shown: list[dict[str, float]] = []
    board: Any = SimpleNamespace(scalars=lambda step, values, at: shown.append(values), flush=lambda: None)
    world, plan = World(0, ranks, 0, torch.device("cpu")), BatchPlan(8, 8, 1, 100)
    meter = Meter(run, world, board, Progress(9, 0, enabled=False), plan, 100, 8.0, FLOPS_PER_TOKEN, bf16=True)
    for step, wait_s in enumerate(waits_s, start=1):
        state = TrainState(step=step, samples=8 * step, targets=64 * step)
        meter.observe(state, 64, 0, 1e-3, torch.tensor(64.0), torch.tensor(1.0))
        meter.flush(wait_s, at_once=True)
    return shown


def test_the_wait_for_data_is_that_of_the_steps_that_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = speeds(tmp_path, monkeypatch, 1, [0.5, 0.75])
    assert [values["speed/data_wait_ms"] for values in found] == [500.0, 250.0]


def test_mfu_is_a_share_of_what_all_gpus_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (values,) = speeds(tmp_path, monkeypatch, 4, [0.0])
    assert values["speed/mfu"] == pytest.approx(values["speed/tokens_per_s"] * FLOPS_PER_TOKEN / (4 * PEAK))
