"""AdamW in its variants, what of its state is saved, and the learning-rate schedule."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmtrain.config.schema import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state, one element per element of a parameter; the names of the files too."""
STEPS = "step"
"""How many steps AdamW has taken: one number."""
_MOMENTS_8BIT = ("state1", "state2", "absmax1", "absmax2")
"""bitsandbytes' names: codes, and the scale of each block of 256; small parameters have fp32 moments and no scales."""


class Optimizer(Protocol):
    """What the loop needs of one."""

    param_groups: list[dict[str, Any]]
    state: Any
    """Parameter -> {name of a state tensor: tensor}."""

    def step(self) -> object: ...
    def zero_grad(self) -> None: ...


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
        self._steps = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self) -> None:
        """Update what has a gradient."""
        self._steps += 1
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
                [self._steps] * len(params),
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
            state.update({kind: torch.zeros_like(parameter) for kind in MOMENTS}, step=self._steps)
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


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimSection, torchs: bool = False) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices alone, unless `decay: all`.

    torch's fused one (`torchs`: as a torch.optim.Optimizer, which DeepSpeed wants), or bitsandbytes' with moments in 8
    bits.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad:
            (decayed if config.decay == "all" or parameter.ndim >= 2 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.betas[0], config.betas[1])
    if config.kind == "adamw":
        if torchs:
            return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        return FusedAdamW(groups, config.lr, betas, config.eps)
    on_gpu = any(p.device.type == "cuda" for group in groups for p in group["params"])
    paged = config.kind == "paged_adamw8bit" and on_gpu  # pages move between a GPU and its host: nowhere else
    return EightBitAdamW(groups, config.lr, betas, config.eps, paged)


def saved_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What a checkpoint holds of a parameter's optimizer state, by kind: views.

    Host sync where a moment is paged: the host reads it, and the GPU may still be writing.
    """
    state = optimizer.state[parameter]
    saved = {kind: state[kind] for kind in (*MOMENTS, *_MOMENTS_8BIT) if kind in state}
    if any(getattr(tensor, "is_paged", False) for tensor in saved.values()):
        torch.cuda.synchronize()
    return saved


def restore_state(
    optimizer: Optimizer, parameter: nn.Parameter, read: Callable[[str, int], Tensor], steps: Tensor
) -> None:
    """Fill a parameter's state. `read(kind, count)` gives the saved elements of a kind, flat, on the CPU."""
    if isinstance(optimizer, FusedAdamW):
        optimizer.state_of(parameter)["step"].copy_(steps)
    else:
        assert isinstance(optimizer, EightBitAdamW)
        optimizer.state_of(parameter)["step"] = int(steps)
    for kind, tensor in saved_state(optimizer, parameter).items():
        tensor.copy_(read(kind, tensor.numel()).reshape(tensor.shape))


def learning_rate(step: int, total_steps: int, config: OptimSection) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`. A pure function: nothing to save."""
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return config.lr * (step + 1) / schedule.warmup_steps
    after = max(1, total_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / after)
    lowest = schedule.min_lr_ratio
    match schedule.kind:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - (1 - lowest) * progress
        case "cosine":
            factor = lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            decay_steps = max(1.0, schedule.decay_share * total_steps)
            decayed = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / decay_steps))
            factor = 1 - (1 - lowest) * decayed
    return config.lr * factor
