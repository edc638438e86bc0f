"""Muon for a GPT's matrices, AdamW for the rest."""

from typing import Any

import pytest
import torch

from llmtrain.config import load_config
from llmtrain.config.model_sections import GPTModel
from llmtrain.config.schema import OptimSection
from llmtrain.errors import ConfigError
from llmtrain.memory import WholeSizes
from llmtrain.models import GPT
from llmtrain.optim import MOMENTUM, Optimizer, build_optimizer, restore_state, saved_state
from llmtrain.optim.muon import _cost, _divided

SMALL = GPTModel(num_layers=2, num_heads=2, width=16, context=8)
SETTINGS = OptimSection(kind="muon", lr=1e-2, weight_decay=0.3, momentum=0.9)


def build(model: GPT, settings: OptimSection = SETTINGS) -> Optimizer:
    return build_optimizer(model.parameters(), settings, matrices=model.hidden_matrices())


def take_steps(model: GPT, optimizers: list[Any], steps: range) -> None:
    for step in steps:
        tokens = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(step))
        (model(tokens[:, :-1], tokens[:, 1:]) / 24).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None


def test_its_steps_are_torchs_and_adamws():
    ours, theirs = GPT(SMALL, 40), GPT(SMALL, 40)
    optimizer = build(ours)
    take_steps(ours, [optimizer], range(5))
    # torch's takes whole parameters: query, key and value become parameters of their own, of the same storage
    matrices: list[torch.Tensor] = []
    for parameter, parts in theirs.hidden_matrices():
        matrices += parameter.detach().chunk(parts)
    muon = torch.optim.Muon(
        [torch.nn.Parameter(matrix) for matrix in matrices],
        weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    by_muon = {parameter for parameter, _ in theirs.hidden_matrices()}
    adamw = build_optimizer(
        [p for p in theirs.parameters() if p not in by_muon], OptimSection(weight_decay=0.3), torchs=True
    )

    class WithGradients:
        param_groups = muon.param_groups

        def step(self) -> None:
            gradients = [part for p, parts in theirs.hidden_matrices() for part in p.grad.chunk(parts)]
            for matrix, gradient in zip(muon.param_groups[0]["params"], gradients, strict=True):
                matrix.grad = gradient
            muon.step()

    take_steps(theirs, [adamw, WithGradients()], range(5))
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_it_goes_on_where_it_was():
    whole, first, second = (GPT(SMALL, 40) for _ in range(3))
    take_steps(whole, [build(whole)], range(6))
    before = build(first)
    take_steps(first, [before], range(3))
    second.load_state_dict(first.state_dict())
    after = build(second)
    for saved, parameter in zip(first.parameters(), second.parameters(), strict=True):
        state = saved_state(before, saved)
        restore_state(after, parameter, lambda kind, _, state=state: state[kind].flatten(), torch.tensor(3.0))
    take_steps(second, [after], range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_what_is_saved_is_what_the_plan_counts():
    model = GPT(SMALL, 40)
    optimizer = build(model)
    take_steps(model, [optimizer], range(1))
    states = {name: saved_state(optimizer, parameter) for name, parameter in model.named_parameters()}
    by_muon = {name for name, state in states.items() if set(state) == {MOMENTUM}}
    assert by_muon == {name for name in states if ".h." in name and name.endswith("weight") and ".ln_" not in name}
    assert all(set(states[name]) == {"exp_avg", "exp_avg_sq"} for name in set(states) - by_muon)
    config = load_config(None, ["optim.kind=muon", "model.num_layers=2", "model.num_heads=2", "model.width=16",
                                "model.context=8"])[0]  # fmt: skip
    size = sum(tensor.nbytes for state in states.values() for tensor in state.values())
    sizes = WholeSizes(SMALL, 40)
    assert sizes.checkpoint_bytes(config) == size + 4 * model.num_parameters()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_the_work_evenly(size: int):
    model = GPT(SMALL.model_copy(update={"num_layers": 12}), 40)
    costs = [_cost(parameter, parts) for parameter, parts in model.hidden_matrices()]
    owners = _divided(costs, size)
    assert set(owners) == set(range(size))
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert max(loads) < 1.1 * sum(costs) / size


def test_more_ranks_than_matrices():
    assert sorted(_divided([5, 3], 4)) == [0, 1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["strategy.kind=zero2"], "optim.kind=muon works with strategy.kind=ddp alone"),
        (["model.kind=qlora", "model.base=none"], "optim.kind=muon trains from scratch alone"),
    ],
)
def test_where_it_does_not_work(settings: list[str], told: str):
    with pytest.raises(ConfigError, match=told):
        load_config(None, ["optim.kind=muon", *settings])
