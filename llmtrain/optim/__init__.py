"""Optimizers, and what of their state is saved. `build_optimizer` is the only place that knows the kinds."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmtrain.config.schema import OptimSection
from llmtrain.optim.adamw import MOMENTS, MOMENTS_8BIT, EightBitAdamW, FusedAdamW
from llmtrain.optim.muon import MOMENTUM, Matrices, Muon
from llmtrain.optim.schedule import learning_rate

__all__ = [
    "MOMENTS",
    "MOMENTUM",
    "STEPS",
    "Optimizer",
    "build_optimizer",
    "learning_rate",
    "restore_state",
    "saved_state",
]

STEPS = "step"
"""How many steps an optimizer has taken: one number."""


class Optimizer(Protocol):
    """What the loop needs of one."""

    param_groups: list[dict[str, Any]]
    state: Any
    """Parameter -> {name of a state tensor: tensor}."""

    def step(self) -> object: ...
    def zero_grad(self) -> None: ...


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimSection,
    torchs: bool = False,
    matrices: Matrices = (),
    rank: int = 0,
    size: int = 1,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices alone, unless `decay: all`.

    torch's fused one (`torchs`: as a torch.optim.Optimizer, which DeepSpeed wants), or bitsandbytes' with moments in 8
    bits; or Muon for those of the parameters that are `matrices`, divided among ranks.
    """
    by_muon = {parameter for parameter, _ in matrices} if config.kind == "muon" else set[nn.Parameter]()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad and parameter not in by_muon:
            (decayed if config.decay == "all" or parameter.ndim >= 2 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.betas[0], config.betas[1])
    match config.kind:
        case "adamw" if torchs:
            return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        case "adamw":
            return FusedAdamW(groups, config.lr, betas, config.eps)
        case "muon":
            adamw = FusedAdamW(groups, config.lr, betas, config.eps)
            return Muon(adamw, matrices, config.lr, config.weight_decay, config.momentum, rank, size)
        case "adamw8bit" | "paged_adamw8bit":
            on_gpu = any(p.device.type == "cuda" for group in groups for p in group["params"])
            paged = config.kind == "paged_adamw8bit" and on_gpu  # pages move between a GPU and its host: nowhere else
            return EightBitAdamW(groups, config.lr, betas, config.eps, paged)


def saved_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What a checkpoint holds of a parameter's optimizer state, by kind: views.

    Host sync where a moment is paged: the host reads it, and the GPU may still be writing.
    """
    state = optimizer.state[parameter]
    saved = {kind: state[kind] for kind in (*MOMENTS, MOMENTUM, *MOMENTS_8BIT) if kind in state}
    if any(getattr(tensor, "is_paged", False) for tensor in saved.values()):
        torch.cuda.synchronize()
    return saved


def restore_state(
    optimizer: Optimizer, parameter: nn.Parameter, read: Callable[[str, int], Tensor], steps: Tensor
) -> None:
    """Fill a parameter's state. `read(kind, count)` gives the saved elements of a kind, flat, on the CPU."""
    if isinstance(optimizer, FusedAdamW | Muon):
        optimizer.state_of(parameter)["step"].copy_(steps)
    else:
        assert isinstance(optimizer, EightBitAdamW)
        optimizer.state_of(parameter)["step"] = int(steps)
    for kind, tensor in saved_state(optimizer, parameter).items():
        tensor.copy_(read(kind, tensor.numel()).reshape(tensor.shape))
