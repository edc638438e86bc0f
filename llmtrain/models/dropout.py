"""Dropout (Srivastava et al. 2014) that costs little on a CPU.

torch draws its masks there one number at a time: as long as a matrix product takes. Here each 64-bit word of a quick
generator (numpy's SFC64) gives four decisions, and a mask is all ones or all zeros, so that applying it is one `and`
of the bits. It starts from one number of torch's own generator.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def keep_mask(shape: tuple[int, ...], probability: float, seed: Tensor | None = None) -> Tensor:
    """int16 on the CPU: -1, all bits set, with a chance of 1 - probability (to within 2^-16), else 0.

    Args:
        seed: from `draw_seed`, the same for the same mask; one is drawn where there is none.
    """
    count = math.prod(shape)
    number = int(draw_seed() if seed is None else seed) % 2**64
    draws = torch.from_numpy(np.random.SFC64(number).random_raw(-(-count // 4)).view(np.int16))[:count]
    draws.bitwise_and_(0x7FFF)  # 15 bits, of which the lowest round(p 2^15) values mean: drop
    torch.sub(torch.tensor(round(probability * 2**15) - 1, dtype=torch.int16), draws, out=draws)
    return draws.bitwise_right_shift_(15).view(shape)  # the sign, in every bit


def draw_seed() -> Tensor:
    """From torch's own generator: whoever seeds that, as the loop does at each step, decides everything."""
    return torch.randint(-(2**63), 2**63 - 1, (), device="cpu")


def keep_(x: Tensor, mask: Tensor) -> Tensor:
    """`x` (contiguous), with zeros written where `mask` has them."""
    of_size = _OF_SIZE[x.element_size()]
    x.view(of_size).bitwise_and_(mask.to(of_size))
    return x


def mask_of(seed: Tensor, x: Tensor, probability: float) -> Tensor:
    """Of the shape of `x`, for `zeroed`: from a seed (`draw_seed`), which is all that a backward pass has to keep.

    On a GPU ones and zeros, by a generator of its own, which is seeded on the host: nothing waits.
    """
    if x.device.type == "cpu":
        return keep_mask(x.shape, probability, seed)
    own = torch.Generator(x.device).manual_seed(int(seed))
    return torch.empty_like(x).bernoulli_(1 - probability, generator=own)


def zeroed(x: Tensor, mask: Tensor) -> Tensor:
    """A copy with zeros where elements are dropped. The others are not scaled."""
    if x.device.type != "cpu":
        return x * mask
    of_size = _OF_SIZE[x.element_size()]
    return x.view(of_size).bitwise_and(mask.to(of_size)).view(x.dtype)
