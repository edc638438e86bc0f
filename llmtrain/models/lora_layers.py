"""LoRA beside a base's linear layers, in few passes over memory (Hu et al. 2021): W x + s B A x.

peft multiplies B A x, as wide as the layer's output, by s in a pass of its own, and adds it to W x in another; each
adapter keeps its own dropped out copy of x, with the mask. Here s goes to A x, of LoRA's small rank; the product with
B adds to W x where it lies; x is kept once for all adapters that read it, and dropped out again in the backward pass.

Shapes: N positions, D inputs, E outputs, R LoRA's rank.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmtrain.models.attention import computed_in
from llmtrain.models.dropout import draw_seed, mask_of, zeroed

_ADAPTER = "default"
"""peft's name for the only adapter there is."""


def use(peft: nn.Module) -> None:
    """Have the model's LoRA layers compute here; those with DoRA, which peft computes from the whole weight, do not."""
    from peft.tuners.lora import LoraLayer

    for module in peft.modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A and not module.lora_variant:
            module.forward = MethodType(_forward, module)


def _forward(layer: Any, x: Tensor, *args: Any, **more: Any) -> Tensor:
    """In place of peft's, whose class still says what a merged or disabled adapter does, and what is compiled."""
    if layer.merged or layer.disable_adapters or torch.compiler.is_compiling():
        return type(layer).forward(layer, x, *args, **more)
    down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    dropout = layer.lora_dropout[_ADAPTER]
    probability = dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0
    out = layer.base_layer(x, *args, **more)
    return _AddLora.apply(out, x, down, up, layer.scaling[_ADAPTER], probability)


class _AddLora(torch.autograd.Function):
    """out (..., E) of the base's layer, changed in place where it may be; x (..., D); down (R, D); up (E, R)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, probability: float) -> Tensor:
        ctx.dtype = computed_in(x) if torch.is_autocast_enabled(x.device.type) else down.dtype
        ctx.scale, ctx.probability = scale / (1 - probability), probability
        x_ND, seed = x.flatten(0, -2).to(ctx.dtype), None
        if probability:
            seed = draw_seed()
            x_ND = zeroed(x_ND, mask_of(seed, x_ND, probability))
        inside_NR = (x_ND @ down.to(ctx.dtype).t()).mul_(ctx.scale)
        ctx.save_for_backward(x, down, up, inside_NR, seed)
        up_RE = up.to(ctx.dtype).t()
        if out.dtype != ctx.dtype:
            return out + (inside_NR @ up_RE).to(out.dtype).view_as(out)
        if out._is_view() or not out.is_contiguous():
            return torch.addmm(out.flatten(0, -2), inside_NR, up_RE).view_as(out)
        out.view(-1, out.shape[-1]).addmm_(inside_NR, up_RE)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, down, up, inside_NR, seed = ctx.saved_tensors
        grad_NE, x_ND = grad.flatten(0, -2).to(ctx.dtype), x.flatten(0, -2).to(ctx.dtype)
        mask = None if seed is None else mask_of(seed, x_ND, ctx.probability)
        grad_up = grad_NE.t() @ inside_NR
        grad_NR = (grad_NE @ up.to(ctx.dtype)).mul_(ctx.scale)
        grad_down = grad_NR.t() @ (x_ND if mask is None else zeroed(x_ND, mask))
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_NR @ down.to(ctx.dtype)
            grad_x = (grad_x if mask is None else zeroed(grad_x, mask)).to(x.dtype).view_as(x)
        return grad, grad_x, grad_down.to(down.dtype), grad_up.to(up.dtype), None, None
