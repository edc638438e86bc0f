"""The learning-rate schedule."""

import math

from llmtrain.config.schema import OptimSection


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
