"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the matrices inside a GPT's blocks.

A step is the momentum made nearly orthogonal, by five Newton-Schulz iterations of torch's (`torch.optim.Muon`), in the
size of AdamW's steps (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that learning rate and weight decay may stay.
Ranks divide the matrices among them: each updates its own, keeps the momentum of those alone, and sends the others the
new weights, which are the same on all ranks by construction.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import _muon

from llmtrain.optim.adamw import FusedAdamW

MOMENTUM = "momentum_buffer"
"""Muon's state, one element per element of a matrix; the name in files too."""
_NS_STEPS = 5

Matrices = Sequence[tuple[nn.Parameter, int]]
"""Weights, and of how many matrices, one below the other, each consists (query, key and value: three)."""


class Muon:
    """Muon for `matrices`, and `adamw` for all other parameters."""

    def __init__(
        self,
        adamw: FusedAdamW,
        matrices: Matrices,
        lr: float,
        weight_decay: float,
        momentum: float,
        rank: int,
        size: int,
    ):
        """`rank` of `size` that share the work. All parameters on one device."""
        self._adamw, self._momentum = adamw, momentum
        self._group: dict[str, Any] = {"params": [p for p, _ in matrices], "weight_decay": weight_decay, "lr": lr}
        self.param_groups = [*adamw.param_groups, self._group]
        self.state = adamw.state
        owners = _divided([_cost(parameter, parts) for parameter, parts in matrices], size)
        self._matrices = [(parameter, parts, owner) for (parameter, parts), owner in zip(matrices, owners, strict=True)]
        self._own = {parameter for parameter, _, owner in self._matrices if owner == rank}
        self._sends = size > 1

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters. Collective (default group) on more than one rank: new weights from who made them."""
        self._adamw.step()
        sent: list[Any] = []
        for parameter, parts, owner in self._matrices:
            if parameter in self._own:
                self._update(parameter, parts)
            if self._sends:  # while the next one is worked out
                sent.append(dist.broadcast(parameter.detach(), src=owner, async_op=True))
        for working in sent:
            working.wait()

    def _update(self, parameter: nn.Parameter, parts: int) -> None:
        assert parameter.grad is not None
        momentum = self.state_of(parameter)[MOMENTUM]
        # Private; what torch.optim.Muon calls, whose class takes no part of a parameter, and imports the compiler.
        _muon.muon(  # tests/unit/test_muon.py compares the two
            list(parameter.chunk(parts)),
            list(parameter.grad.chunk(parts)),
            list(momentum.chunk(parts)),
            lr=self._group["lr"],
            weight_decay=self._group["weight_decay"],
            momentum=self._momentum,
            nesterov=True,
            ns_coefficients=(_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C),
            ns_steps=_NS_STEPS,
            eps=_muon.EPS,
            adjust_lr_fn="match_rms_adamw",
            has_complex=False,
        )

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's momentum or moments and step count; of a matrix that another rank updates nothing but that."""
        if all(parameter is not matrix for matrix, _, _ in self._matrices):
            return self._adamw.state_of(parameter)
        state = self.state[parameter]
        if not state:
            state["step"] = self._adamw.steps
            if parameter in self._own:
                state[MOMENTUM] = torch.zeros_like(parameter)
        return state


def _cost(parameter: nn.Parameter, parts: int) -> int:
    """Multiplications of an iteration: two products of the shorter side's square with the matrix, one of the square."""
    rows, columns = parameter.shape[0] // parts, parameter.shape[1]
    short, long = min(rows, columns), max(rows, columns)
    return parts * short * short * (2 * long + short)


def _divided(costs: list[int], size: int) -> list[int]:
    """An owner for each: the dearest first, to the rank that has the least so far."""
    loads, owners = [0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners
