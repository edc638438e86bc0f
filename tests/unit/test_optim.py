"""Schedules and parameter groups."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from llmtrain.batches import warmup_problem
from llmtrain.config.schema import OptimSection, ScheduleSection
from llmtrain.optim import FusedAdamW, Optimizer, build_optimizer, learning_rate, restore_state, saved_state


def rates(kind: str, steps: int = 100, **settings: object) -> list[float]:
    schedule = ScheduleSection.model_validate({"kind": kind, "warmup_steps": 10, "min_lr_ratio": 0.1, **settings})
    return [learning_rate(step, steps, OptimSection(lr=1.0, schedule=schedule)) for step in range(steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_and_reaches_the_peak(kind: str):
    assert rates(kind)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates(kind)) == 1.0


@pytest.mark.parametrize(
    ("settings", "total", "told"),
    [
        ({"kind": "cosine"}, 10, None),
        ({"kind": "cosine", "warmup_steps": 50}, 30, "the learning rate ends at 0.6 and never reaches optim.lr=1"),
        ({"kind": "cosine", "warmup_steps": 0}, 1, None),
        ({"kind": "wsd", "warmup_steps": 81}, 100, None),  # of which the last step has the whole rate, as without
        ({"kind": "wsd", "warmup_steps": 82}, 100, "wsd begins after step 81, before"),
        ({"kind": "wsd", "warmup_steps": 100}, 100, "wsd begins after step 81, before"),
        ({"kind": "wsd", "warmup_steps": 101}, 100, "ends at 0.99 and never reaches"),
        ({"kind": "wsd", "warmup_steps": 90, "min_lr_ratio": 1.0}, 100, None),  # it does not decay
    ],
)
def test_a_warmup_that_is_too_long_for_the_run_is_told(settings: dict[str, object], total: int, told: str | None):
    schedule = ScheduleSection.model_validate({"warmup_steps": 10, "min_lr_ratio": 0.1, **settings})
    problem = warmup_problem(OptimSection(lr=1.0, schedule=schedule), total)
    assert (told or "") in (problem or "")
    assert (problem is None) == (told is None)
    rate = [learning_rate(step, total, OptimSection(lr=1.0, schedule=schedule)) for step in range(total)]
    falls = [before - after for before, after in itertools.pairwise(rate)]
    decay = 0.9 / max(1.0, schedule.decay_share * total)  # of wsd, in a step
    is_sudden = schedule.kind == "wsd" and max(falls, default=0) > 1.001 * decay
    if problem is None:
        assert max(rate) == 1.0
        assert not is_sudden
    elif "never reaches" in problem:
        assert f"{max(rate):.3g}" in problem
        assert max(rate) < 1.0
    else:
        assert is_sudden or schedule.warmup_steps == total


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
    optimizer = build_optimizer(model.parameters(), OptimSection.model_validate({"decay": decay}))
    with_decay = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert len(with_decay) == decayed
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 64), nn.LayerNorm(64), nn.Linear(64, 5))


def take_steps(model: nn.Sequential, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        model(torch.randn(8, 37, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "settings", [OptimSection(weight_decay=0.3), OptimSection(weight_decay=0.3, eps=1e-2, betas=[0.5, 0.8])]
)
def test_adamw_gives_the_bits_of_torchs(settings: OptimSection):
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours.parameters(), settings)
    torchs = build_optimizer(theirs.parameters(), settings, torchs=True)
    assert isinstance(optimizer, FusedAdamW)
    assert isinstance(torchs, torch.optim.AdamW)
    take_steps(ours, optimizer, range(7))
    take_steps(theirs, torchs, range(7))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[mine][kind], torchs.state[other][kind])
        assert mine.grad is None


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bits_are_those_of_bitsandbytes(kind: str):
    from bitsandbytes.optim.adamw import AdamW8bit

    def wide() -> nn.Sequential:  # moments of 4,096 elements and more are kept in 8 bits, others in fp32
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(37, 128), nn.Linear(128, 5))

    ours, theirs = wide(), wide()
    settings = OptimSection.model_validate({"kind": kind, "weight_decay": 0.3, "eps": 1e-6, "betas": [0.8, 0.9]})
    optimizer = build_optimizer(ours.parameters(), settings)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    expected: Any = AdamW8bit(groups, betas=(0.8, 0.9), eps=1e-6)
    take_steps(ours, optimizer, range(5))
    take_steps(theirs, expected, range(5))
    kept: set[torch.dtype] = set()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        for name, state in saved_state(optimizer, mine).items():
            assert torch.equal(state, expected.state[other][name])
            kept.add(state.dtype)
    assert kept == {torch.uint8, torch.float32}


def test_adamw_goes_on_where_it_was():
    whole, first = small_model(), small_model()
    take_steps(whole, build_optimizer(whole.parameters(), OptimSection()), range(6))
    before = build_optimizer(first.parameters(), OptimSection())
    take_steps(first, before, range(3))
    second = copy.deepcopy(first)
    after = build_optimizer(second.parameters(), OptimSection())
    for saved, parameter in zip(first.parameters(), second.parameters(), strict=True):
        state = saved_state(before, saved)
        restore_state(after, parameter, lambda kind, _, state=state: state[kind].flatten(), torch.tensor(3.0))
    take_steps(second, after, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_adamw_leaves_alone_what_has_no_gradient():
    model = small_model()
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model.parameters(), OptimSection())
    model[2].weight.grad = torch.ones_like(model[2].weight)
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True)]
    assert changed == [False, False, False, False, True, False]
    assert set(saved_state(optimizer, model[2].weight)) == {"exp_avg", "exp_avg_sq"}
    assert not saved_state(optimizer, model[0].weight)
    model[2].weight.grad = None
    optimizer.step()
