"""Small base models for LoRA: random weights, and a tokenizer trained on real text."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from launcher.sharding import tokenize
from llmtrain.config import data_sections, load_config
from llmtrain.config.schema import RunConfig
from llmtrain.models import build_model
from llmtrain.models.qlora import QLoRA
from tests.support.data import python_sources

VOCAB = 512
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": 0,
}  # fmt: skip


def write_tokenizer(folder: Path, size: int = VOCAB) -> None:
    texts = [path.read_text() for path in python_sources(4)]
    config = data_sections.DataSection(tokenizer=data_sections.TrainedTokenizer(vocab_size=size))
    tokenize.prepare(config, folder, texts)


def write_llama(folder: Path, vocab: int = VOCAB, **changes: Any) -> Path:
    """A Llama of two layers with shared key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": vocab, **changes})).save_pretrained(str(folder))
    write_tokenizer(folder)
    return folder


def write_gpt2(folder: Path, vocab: int = VOCAB) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 256, "vocab_size": vocab}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        GPT2LMHeadModel(GPT2Config(**shape, **off)).save_pretrained(str(folder))
    write_tokenizer(folder)
    return folder


def write_stirred(folder: Path, kind: str, **values: Any) -> Path:
    """A base of any kind, of four layers; weights larger than those that training begins with, which hardly look at
    other tokens. No tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": 4, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.std() < 0.3:
                parameter.mul_(3.0)
            elif name == "lm_head.bias":
                parameter.normal_()
    model.save_pretrained(str(folder))
    return folder


def build(config: RunConfig, stir: bool = False) -> QLoRA:
    """On the CPU; `stir`: with an adapter that changes something: LoRA's second matrix begins as zeros."""
    model = build_model(config, VOCAB, torch.device("cpu"))
    assert isinstance(model, QLoRA)
    if stir:
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def configure(base: Path, *settings: str) -> RunConfig:
    """A run of LoRA on `base`; no data."""
    given = [
        "model.kind=qlora", f"model.base={base}", "model.context=64", "model.lora.r=8",
        "data.sources=[{kind: json, paths: [none.json]}]", "data.format.kind=instruction", "train.precision=fp32",
    ]  # fmt: skip
    return load_config(None, [*given, *settings])[0]


def copy(base: Path, to: Path) -> Path:
    shutil.copytree(base, to)
    return to
