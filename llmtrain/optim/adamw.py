"""AdamW (Loshchilov and Hutter 2019): torch's fused kernel, and bitsandbytes' with moments in 8 bits."""

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state, one element per element of a parameter; the names of the files too."""
MOMENTS_8BIT = ("state1", "state2", "absmax1", "absmax2")
"""bitsandbytes' names: codes, and the scale of each block of 256; small parameters have fp32 moments and no scales."""


class FusedAdamW:
    """torch's fused AdamW kernel, without torch.optim's class around it: the same bits, one call for a group.

    The class imports torch's compiler when it is made (0.9 s, 80 MB), and takes 0.3 ms a step to sort
    parameters by device and type, of which there is one here. They share one count of steps, as in a checkpoint.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float):
        """`groups`: `params` and `weight_decay` each. All parameters on one device."""
        self.param_groups: list[dict[str, Any]] = [{**group, "lr": lr} for group in groups]
        self.state: defaultdict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        self._betas, self._eps = betas, eps
        device = next((p.device for group in groups for p in group["params"]), None)
        self.steps = torch.zeros((), device=device)
        """Taken so far: one number, which all parameters share."""

    @torch.no_grad()
    def step(self) -> None:
        """Update what has a gradient."""
        self.steps += 1
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state_of(p) for p in params]
            # Private, and what torch.optim.AdamW calls: tests/unit/test_optim.py compares the two.
            torch._fused_adamw_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [self.steps] * len(params),
                lr=group["lr"],
                beta1=self._betas[0],
                beta2=self._betas[1],
                weight_decay=group["weight_decay"],
                eps=self._eps,
                amsgrad=False,
                maximize=False,
            )

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's moments and step count; zero moments at the first call."""
        state = self.state[parameter]
        if not state:
            state.update({kind: torch.zeros_like(parameter) for kind in MOMENTS}, step=self.steps)
        return state


class EightBitAdamW:
    """bitsandbytes' AdamW with moments in 8 bits (Dettmers et al. 2022), whose own `step` waits for the GPU after each
    parameter.

    Its kernels and copies follow each other on the stream, so that nobody has to wait; but paged moments lie in memory
    that host and GPU share, and who reads them on the host waits (`saved_state`).
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, paged: bool):
        """`groups`: `params` and `weight_decay` each. `paged`: of large parameters, on a GPU."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
        kind: Any = PagedAdamW8bit if paged else AdamW8bit
        self._inner: Any = kind(groups, lr=lr, betas=betas, eps=eps)
        self.param_groups: list[dict[str, Any]] = self._inner.param_groups
        self.state: Any = self._inner.state
        self._places: dict[nn.Parameter, tuple[dict[str, Any], int, int]] = {
            parameter: (group, number, position)
            for number, group in enumerate(self.param_groups)
            for position, parameter in enumerate(group["params"])
        }

    @torch.no_grad()
    def step(self) -> None:
        """Update what has a gradient."""
        for parameter, (group, number, position) in self._places.items():
            if parameter.grad is not None:
                self.state_of(parameter)
                self._inner.prefetch_state(parameter)
                self._inner.update_step(group, parameter, number, position)

    def zero_grad(self) -> None:
        self._inner.zero_grad()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """A parameter's moments, their scales and its step count; zero moments at the first call."""
        if not self.state[parameter]:
            group, number, position = self._places[parameter]
            self._inner.init_state(group, parameter, number, position)
        return self.state[parameter]
