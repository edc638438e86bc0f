"""What an architecture does to its logits after the output layer: Cohere and Granite scale them, Gemma 2 to 4 cap them.

transformers does it where it makes all logits at once, which the loss here never has. Each architecture names it its
own way; `isolation.check` compares with transformers' own logits at the start of every run, so that a name that is not
known here, or means something else, is found.
"""

from dataclasses import dataclass
from typing import Any

_FACTORS = ("logit_scale", "lm_head_multiplier")
"""Cohere; Falcon-H1."""
_DIVISOR = "logits_scaling"
"""Granite, MiniCPM 3; in HyperCLOVA X a factor."""
_CAP = "final_logit_softcapping"
_NOT_APPLIED = ("mpt",)
"""Architectures of which transformers reads such a number and does nothing with it."""


@dataclass(frozen=True)
class LogitChanges:
    """The logits are cap tanh(scale x W / cap); without a cap scale x W. x: hidden states, W: output layer."""

    scale: float = 1.0
    cap: float | None = None


def read(config: Any) -> LogitChanges:
    """From transformers' configuration of the part that reads text."""
    if config.model_type in _NOT_APPLIED:
        return LogitChanges()
    scale = 1.0
    for name in _FACTORS:
        scale *= getattr(config, name, None) or 1.0
    number = getattr(config, _DIVISOR, None) or 1.0
    scale *= number if config.model_type.startswith("hyperclovax") else 1 / number
    return LogitChanges(scale, getattr(config, _CAP, None) or None)
