"""Dropout (Srivastava et al. 2014) that costs little on a CPU.

torch draws its masks there one number at a time, on one core: as long as a matrix product takes. Here a hash of a
counter (`data.mix`, which together with the counter is splitmix64) gives four decisions a 64-bit word, and a mask is
all ones or all zeros, so that applying it is one `and` of the bits. The hash starts from one number of torch's own
generator: whoever seeds that, as the loop does at each step, decides everything.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.data import mix

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # the odd number nearest to 2^64 over the golden ratio
_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """As `torch.nn.functional.dropout`."""
    if x.device.type != "cpu" or not training or not probability or torch.compiler.is_compiling():
        return F.dropout(x, probability, training)
    return _Dropout.apply(x, probability)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        ctx.scale = 1 / (1 - probability)
        mask = keep_mask(x.shape, probability)
        ctx.save_for_backward(mask)
        return keep_(x * ctx.scale, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (mask,) = ctx.saved_tensors
        return keep_(grad * ctx.scale, mask), None


def keep_mask(shape: tuple[int, ...], probability: float) -> Tensor:
    """int16 on the CPU: -1, all bits set, with a chance of 1 - probability (to within 2^-16), else 0."""
    count = math.prod(shape)
    seed = np.uint64(int(torch.randint(-(2**63), 2**63 - 1, ())) % 2**64)
    words = mix(np.arange(1, -(-count // 4) + 1, dtype=np.uint64) * _GAMMA + seed)
    draws = torch.from_numpy(words.view(np.int16))[:count]
    draws.bitwise_and_(0x7FFF)  # 15 bits, of which the lowest round(p 2^15) values mean: drop
    draws.neg_().add_(round(probability * 2**15) - 1).bitwise_right_shift_(15)  # the sign, in every bit
    return draws.view(shape)


def keep_(x: Tensor, mask: Tensor) -> Tensor:
    """`x` (contiguous), with zeros written where `mask` has them."""
    of_size = _OF_SIZE[x.element_size()]
    x.view(of_size).bitwise_and_(mask.to(of_size))
    return x
