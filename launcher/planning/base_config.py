"""What a base of a usual kind is made of, from its config.json alone: planning needs no torch for these.

Whatever is out of the ordinary (another architecture, a key that is missing, a setting that cannot work) is left to
`llmtrain.inspect_base`, which asks transformers, and says what is wrong.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from llmtrain.base_facts import BaseFacts, Linear
from llmtrain.config.model_sections import QLoRAModel

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
_NEEDED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
_UNUSUAL = ("quantization_config", "final_logit_softcapping", "logits_scaling", "logit_scale", "auto_map")


def read_facts(model: QLoRAModel, base: str | None) -> BaseFacts | None:
    """What transformers would count; None where that cannot be said for sure.

    Args:
        base: a folder with config.json, in place of `model.base`.
    """
    file = find(base or model.base, model.revision)
    if file is None:
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or not _is_usual(values):
        return None
    facts = _count(values)
    known = model.lora.target_modules == "all-linear" or set(model.lora.target_modules) <= set(facts.names)
    fits = facts.positions is not None and model.context <= facts.positions
    return facts if known and fits else None


def find(base: str, revision: str | None) -> Path | None:
    """A base's config.json: in a folder, or where the Hub's client keeps what was downloaded."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
        kept = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser() / f"models--{base.replace('/', '--')}"
        commit = revision or "main"
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            named = kept / "refs" / commit
            commit = named.read_text(encoding="utf-8").strip() if named.is_file() else ""
        folder = kept / "snapshots" / commit if commit else kept / "nowhere"
    file = folder / "config.json"
    return file if file.is_file() else None


def _is_usual(values: dict[str, Any]) -> bool:
    numbers = [values.get(name) for name in _NEEDED if name != "tie_word_embeddings"]
    return (
        values.get("model_type") in _ARCHITECTURES
        and all(isinstance(number, int) and number > 0 for number in numbers)
        and isinstance(values.get("tie_word_embeddings"), bool)
        and (values["model_type"] != "qwen3" or "head_dim" in values)  # its default is a number of its own
        and not any(values.get(name) for name in _UNUSUAL)
        and "longrope" not in str([values.get(name) for name in ("rope_parameters", "rope_scaling")])
    )


def _count(values: dict[str, Any]) -> BaseFacts:
    kind, hidden, layers = values["model_type"], values["hidden_size"], values["num_hidden_layers"]
    head = values.get("head_dim") or hidden // values["num_attention_heads"]
    wide, narrow = values["num_attention_heads"] * head, values["num_key_value_heads"] * head
    inner = values["intermediate_size"]
    shapes = {
        "q_proj": (hidden, wide), "k_proj": (hidden, narrow), "v_proj": (hidden, narrow), "o_proj": (wide, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    other = 2 * hidden  # norms
    if kind == "qwen2":
        other += wide + 2 * narrow
    elif kind in ("llama", "qwen3") and values.get("attention_bias"):
        other += wide + 2 * narrow + hidden
    if kind == "llama" and values.get("mlp_bias"):
        other += 2 * inner + hidden
    if kind == "qwen3":
        other += 2 * head
    tables = values["vocab_size"] * hidden * (1 if values["tie_word_embeddings"] else 2)
    return BaseFacts(
        architecture=_ARCHITECTURES[kind],
        vocab_size=values["vocab_size"],
        positions=values["max_position_embeddings"],
        hidden=hidden,
        layers=layers,
        heads=values["num_attention_heads"],
        kv_width=narrow,
        linears=tuple(Linear(name, *shape, layers) for name, shape in shapes.items()),
        other_parameters=layers * other + hidden + tables,
    )
