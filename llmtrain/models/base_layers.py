"""What bitsandbytes' layers of a base would lose on the way, kept."""

from typing import Any

import torch
from torch import nn


def keep_layout(model: nn.Module, dtype: torch.dtype) -> None:
    """4-bit layers compute in `dtype`, whatever was stored with them, and keep their weights' layout.

    On CPUs with AVX-512 bf16, bitsandbytes rewrites 4-bit weights in place for its inference kernel, on the first
    evaluation. That kernel has no backward pass, and there is no way back when training goes on: switch it off.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            layer: Any = module
            layer.compute_dtype = dtype
            layer.support_avx512bf16_for_cpu = False


def keep_scales(model: nn.Module) -> None:
    """8-bit layers on a CPU keep the scales of their weights through what peft does for DoRA.

    At each forward pass it replaces the weight by one that has lost its scales: the layer's own first pass has moved
    them away. The next pass would take that weight for one just loaded, and its missing scales for the layer's.
    """
    from bitsandbytes.nn.modules import Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(_keep_own_scales)


def _keep_own_scales(layer: Any, _: object) -> None:
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.CB = None  # the mark of a weight that was just loaded
