"""AdamW and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from llmtrain.config.schema import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state, one element per element of a parameter; the names of the files too."""
STEPS = "step"
"""How many steps AdamW has taken: one number."""


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019); weight decay on matrices alone, unless `decay: all`."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            (decayed if config.decay == "all" or parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


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
