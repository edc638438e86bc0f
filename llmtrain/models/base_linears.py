"""A base's linear layers: which of them text goes through, and which bitsandbytes quantises."""

from typing import Any

import torch
from torch import nn

_OTHER_SENSES = ("embed_tokens_extend",)
"""What decoders themselves hold for pictures and sound (Phi-4-multimodal); other bases have it beside their decoder."""


def text_linears(model: Any) -> list[tuple[str, nn.Module]]:
    """Those of `linear_modules` that text goes through, and that peft does not take for experts. LoRA is added to them
    alone: training runs the decoder, and what lies elsewhere, for pictures or sound, would stay as it began."""
    of_experts = _names_of_experts(model)
    decoder = model.get_decoder()
    read = set(decoder.modules())
    for name in _OTHER_SENSES:
        read -= set(getattr(decoder, name, nn.Identity()).modules())
    return [
        (name, module)
        for name, module in linear_modules(model)
        if module in read and name.rsplit(".", 1)[-1] not in of_experts
    ]


def _names_of_experts(model: nn.Module) -> set[str]:
    """Names of layers that mean the experts to peft, since experts were layers of these names once: where LoRA is asked
    for on dense layers of a mixture (DeepSeek, GLM), peft adds it to the experts in their place."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = {name.rsplit(".", 1)[-1] for name, _ in linear_modules(model)}
    meant = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(meant, model, None)
    return names - set(meant.target_modules or ())


def unread_linears(model: Any) -> list[tuple[str, nn.Module]]:
    """The others of `linear_modules`."""
    read = {name for name, _ in text_linears(model)}
    return [(name, module) for name, module in linear_modules(model) if name not in read]


def linear_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear layers but the output layer.

    A mixture's routers are none (Phi-MoE's, Llama 4's): what they give is no tensor, for LoRA to add to.
    """
    from transformers.pytorch_utils import Conv1D

    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    kinds = (nn.Linear, Conv1D)  # bitsandbytes' layers are nn.Linear's too
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and not _is_router(module)
    ]


def _is_router(module: nn.Module) -> bool:
    return "Router" in type(module).__name__ and type(module).forward is not nn.Linear.forward


def shape_of(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, also where its weights are stored packed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.weight.shape[0], module.weight.shape[1]  # transformers' Conv1D


def names_quantised(model: Any, skipped: list[str] | None) -> set[str]:
    """The layers that transformers has quantised by bitsandbytes, where it is asked to.

    Args:
        skipped: what a base that lies there quantised says of itself (`llm_int8_skip_modules`).
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    # Not public, but for the kinds: tests/unit/test_text_layers.py compares with what was quantised.
    left = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    return {
        name
        for name, module in linear_modules(model)
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, left)
    }


def is_quantised(module: nn.Module) -> bool:
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return isinstance(module, (Linear4bit, Linear8bitLt))


@torch.no_grad()
def dequantise(quantised: nn.Module, into: nn.Module) -> None:
    """Give the layers of `into`, the same base without quantisation, the values that the quantised ones stand for."""
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for name, module in linear_modules(into):
        layer: Any = quantised.get_submodule(name)
        weight: Any = layer.weight
        if isinstance(layer, Linear4bit):
            values = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(layer, Linear8bitLt):
            state: Any = layer.state
            scales = weight.SCB if state.SCB is None else state.SCB  # moved by the first forward pass
            values = functional.int8_vectorwise_dequant(weight.data, scales)
        else:
            continue  # left as it was by the quantiser
        target: Any = module.weight
        target.copy_(values if values.shape == target.shape and isinstance(module, nn.Linear) else values.t())
