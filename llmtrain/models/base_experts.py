"""A mixture's experts in 4 bits.

transformers keeps all experts of a layer in tensors of three dimensions, which bitsandbytes' layers do not take. Here
they are quantised as they are loaded, one tensor at a time, and dequantised, a layer's at a time, where they are used.
Autograd would keep what was dequantised until the backward pass, which is the whole base in 16 bits: so experts are
computed once more there.
"""

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

_BLOCK = 64
"""Weights that share a scale, as in bitsandbytes' layers."""


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Modules that hold the experts of a layer, not quantised; their names, and those of their tensors of three
    dimensions."""
    for name, module in model.named_modules():
        if _holds_experts(module):
            keys = [key for key, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
            if keys:
                yield name, module, keys


def largest(model: nn.Module) -> int:
    """Weights that are dequantised together: of a layer's experts."""
    return max((sum(getattr(module, key).numel() for key in keys) for _, module, keys in stacks(model)), default=0)


def count(model: nn.Module) -> int:
    """All weights of experts, not quantised, however they are kept."""
    holding = [module for module in model.modules() if _holds_experts(module)]
    return sum(parameter.numel() for module in holding for parameter in module.parameters(recurse=False))


def _holds_experts(module: nn.Module) -> bool:
    """By transformers' names."""
    return "Expert" in type(module).__name__ and not isinstance(module, nn.Linear)


@contextlib.contextmanager
def quantised_on_load(double: bool) -> Iterator[None]:
    """Within it transformers, when it loads a base in 4 bits, quantises experts too (nf4). Then `use_quantised`.

    Args:
        double: quantise the scales as well.
    """
    from bitsandbytes import functional
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    # Theirs, not public: tests/unit/test_base_experts.py fails where they have moved.
    wants, convert = Bnb4BitHfQuantizer.param_needs_quantization, Bnb4bitQuantize.convert

    def wants_experts_too(self: Any, model: nn.Module, param_name: str, **more: Any) -> bool:
        return _is_stack(model, param_name) or wants(self, model, param_name, **more)  # pyright: ignore[reportArgumentType]

    def convert_experts_too(
        self: Any, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **more: Any
    ) -> dict[str, Tensor]:
        done: dict[str, Tensor] = {}
        for name in [name for name in input_dict if _is_stack(model, name)]:
            value = input_dict.pop(name)
            weights: Tensor = value[0] if isinstance(value, list) else value
            packed, state = functional.quantize_4bit(
                weights, blocksize=_BLOCK, compress_statistics=double, quant_type="nf4"
            )
            done[name] = nn.Parameter(packed, requires_grad=False)
            done[name].quant_state = state  # pyright: ignore[reportAttributeAccessIssue]
        return done | convert(self, input_dict, full_layer_name=full_layer_name, model=model, **more)

    Bnb4BitHfQuantizer.param_needs_quantization = wants_experts_too
    Bnb4bitQuantize.convert = convert_experts_too
    try:
        yield
    finally:
        Bnb4BitHfQuantizer.param_needs_quantization, Bnb4bitQuantize.convert = wants, convert


def _is_stack(model: nn.Module, name: str) -> bool:
    place, _, key = name.rpartition(".")
    module = model.get_submodule(place)
    tensor = getattr(module, key, None)
    return _holds_experts(module) and isinstance(tensor, Tensor) and tensor.ndim == 3


class _Dequantised(nn.Module):
    """What a packed tensor stands for, each time it is read."""

    def __init__(self, state: Any):
        super().__init__()
        self._state = state

    @property
    def shape(self) -> torch.Size:
        return self._state.shape

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        from bitsandbytes import functional

        return functional.dequantize_4bit(packed, self._state)


def use_quantised(model: nn.Module) -> None:
    """Have experts that were loaded within `quantised_on_load` dequantised where they are read."""
    for module in list(model.modules()):
        packed = {
            key: parameter.quant_state  # pyright: ignore[reportAttributeAccessIssue]
            for key, parameter in module.named_parameters(recurse=False)
            if _holds_experts(module) and hasattr(parameter, "quant_state")
        }
        for key, state in packed.items():
            parametrize.register_parametrization(module, key, _Dequantised(state), unsafe=True)
        if packed:
            module.forward = MethodType(_forward, module)


def _forward(experts: nn.Module, *given: Any, **named: Any) -> Any:
    def computed(*given: Any, **named: Any) -> Any:
        with parametrize.cached():  # dequantised once, however often it is read
            return type(experts).forward(experts, *given, **named)

    if not torch.is_grad_enabled():
        return computed(*given, **named)
    return checkpoint(computed, *given, use_reentrant=False, **named)


def shapes(model: nn.Module) -> Iterator[tuple[torch.Size, bool]]:
    """Of tensors with the experts of a layer, experts first; whether they are quantised."""
    for module in model.modules():
        if isinstance(module, _Dequantised):
            yield module.shape, True
    for _, module, keys in stacks(model):
        for key in keys:
            yield getattr(module, key).shape, False


@torch.no_grad()
def dequantise(quantised: nn.Module, into: nn.Module) -> None:
    """Give `into`, the same base without quantisation, the values that the quantised experts stand for."""
    for name, module, keys in stacks(into):
        for key in keys:
            getattr(module, key).copy_(getattr(quantised.get_submodule(name), key))
