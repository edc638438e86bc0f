"""A layer norm and the linear layers behind it; for training in bf16 on CPUs in a form that keeps less.

Until the backward pass has used them, autocast keeps a bf16 copy of each weight, and autograd each layer's input.
Here both are computed again from what is kept anyway: casts, layer norms and GELU once more take 3% of a step, and
what they would keep is a third of the activations. The numbers are the same, bit for bit. GPUs and fp32 go torch's
way.

Shapes: B rows, T positions, N = B x T, D width, E width of the output.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmtrain.models.attention import trains_on_cpu


def norm_linear(x_BTD: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """(B, T, E), `linear(norm(x))`."""
    if not _recomputes(x_BTD):
        return linear(norm(x_BTD))
    out_NE = _NormLinear.apply(x_BTD.flatten(0, 1), norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)
    return out_NE.view(*x_BTD.shape[:2], -1)


def norm_mlp(x_BTD: Tensor, norm: nn.LayerNorm, up: nn.Linear, down: nn.Linear) -> Tensor:
    """(B, T, D), `down(gelu(up(norm(x))))`, with the tanh form of GELU that GPT-2 has."""
    if not _recomputes(x_BTD):
        return down(F.gelu(up(norm(x_BTD)), approximate="tanh"))
    layers = (norm.weight, norm.bias, norm.eps, up.weight, up.bias, down.weight, down.bias)
    return _NormMLP.apply(x_BTD.flatten(0, 1), *layers).view_as(x_BTD)


def _recomputes(x: Tensor) -> bool:
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return bf16 and trains_on_cpu(x)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        normed, mean, rstd = _norm(x_ND, scale, shift, eps)
        ctx.save_for_backward(x_ND, mean, rstd, scale, shift, weight)
        ctx.eps = eps
        return _linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, mean, rstd, scale, shift, weight = ctx.saved_tensors
        normed = _norm(x_ND, scale, shift, ctx.eps)[0]
        grad_normed, grad_weight, grad_bias = _linear_gradients(grad_NE, normed, weight)
        norms = _norm_gradients(grad_normed, x_ND, mean, rstd, scale, shift)
        return *norms, None, grad_weight, grad_bias if ctx.needs_input_grad[5] else None


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
    ) -> Tensor:
        normed, mean, rstd = _norm(x_ND, scale, shift, eps)
        inside = _linear(normed, up, up_bias)
        ctx.save_for_backward(x_ND, mean, rstd, scale, shift, up, down, inside)
        ctx.eps = eps
        return _linear(F.gelu(inside, approximate="tanh"), down, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, mean, rstd, scale, shift, up, down, inside = ctx.saved_tensors
        grad, *of_down = _linear_gradients(grad_ND, F.gelu(inside, approximate="tanh"), down)
        grad = torch.ops.aten.gelu_backward(grad, inside, approximate="tanh")
        grad, *of_up = _linear_gradients(grad, _norm(x_ND, scale, shift, ctx.eps)[0], up)
        return *_norm_gradients(grad, x_ND, mean, rstd, scale, shift), None, *of_up, *of_down


def _norm(x_ND: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The layer norm in fp32, rounded to bf16; mean and reciprocal deviation."""
    normed, mean, rstd = torch.native_layer_norm(x_ND, [x_ND.shape[-1]], scale, shift, eps)
    return normed.bfloat16(), mean, rstd


def _norm_gradients(
    grad_bf16: Tensor, x_ND: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of input, scale and shift, in fp32."""
    every = [True, True, True]
    return torch.ops.aten.native_layer_norm_backward(
        grad_bf16.float(), x_ND, [x_ND.shape[-1]], mean, rstd, scale, shift, every
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.bfloat16(), None if bias is None else bias.bfloat16())


def _linear_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of input (bf16), weight and bias (fp32), each rounded to bf16 as autocast does."""
    return grad @ weight.bfloat16(), (grad.t() @ x).float(), grad.sum(0).float()
