"""Schedules and parameter groups."""

import pytest
import torch
from torch import nn

from llmtrain.config.schema import OptimSection, ScheduleSection
from llmtrain.optim import build_optimizer, learning_rate


def rates(kind: str, steps: int = 100, **settings) -> list[float]:
    schedule = ScheduleSection.model_validate({"kind": kind, "warmup_steps": 10, "min_lr_ratio": 0.1, **settings})
    return [learning_rate(step, steps, OptimSection(lr=1.0, schedule=schedule)) for step in range(steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_and_reaches_the_peak(kind: str):
    assert rates(kind)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates(kind)) == 1.0


def test_shapes():
    cosine, linear, constant, wsd = (rates(k) for k in ("cosine", "linear", "constant", "wsd"))
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[100] == pytest.approx(0.1)
    assert linear[55] == pytest.approx(0.55)
    assert linear[100] == pytest.approx(0.1)
    assert set(constant[10:]) == {1.0}
    assert set(wsd[10:81]) == {1.0}
    assert wsd[90] == pytest.approx(0.55)
    assert wsd[100] == pytest.approx(0.1)


@pytest.mark.parametrize(("decay", "decayed"), [("matrices", 1), ("all", 3)])
def test_weight_decay_is_on_matrices_unless_told_otherwise(decay: str, decayed: int):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, bias=False))
    optimizer = build_optimizer(model.named_parameters(), OptimSection.model_validate({"decay": decay}))
    with_decay = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert len(with_decay) == decayed
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    assert isinstance(optimizer, torch.optim.AdamW)
