"""Our attention in a base that transformers built.

transformers tells packed documents by positions that restart, for which a GPU has to be waited for, and keeps them
apart by a mask over all pairs of a row's tokens: a row of 16,384 costs its square. Told where documents begin,
`attention.py` computes each alone. A base that is not known to hand that down, or whose attention sees less than all
that came before, keeps transformers' own.
"""

from typing import Any

import torch
from torch import Tensor

from llmtrain.data import Documents
from llmtrain.models.attention import FLASH_DTYPES, attention, has_flash

_NAME = "llmtrain"
KINDS = (
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_neox", "granite", "helium", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
"""Architectures (`model_type`) that are known to hand down where documents begin: tests/unit/test_base_attention.py
looks at each."""
_WHOLE = {"full_attention", "sliding_attention"}
"""Kinds of layers that see all that came before, if their window is as wide as a row."""
_DROPOUTS = ("attention_dropout", "attn_pdrop")


def use(model: Any, context: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Have `model` compute attention here, if that is what it means by attention; whether it does from now on.

    It then takes `told(documents)` as further arguments of its forward pass. No row may be longer than `context`.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.config
    if config.model_type not in KINDS or config._attn_implementation != "sdpa":
        return False
    window = getattr(config, "sliding_window", None)
    if (window and window < context) or set(getattr(config, "layer_types", None) or _WHOLE) - _WHOLE:
        return False
    if device.type != "cpu":
        width = head_width(config)
        drops = any(getattr(config, name, 0) for name in _DROPOUTS)
        if drops or dtype not in FLASH_DTYPES or width is None or not has_flash(device, width):
            return False
    # A name without a mask of its own: transformers then makes none, and does not look at the positions.
    assert _NAME not in ALL_MASK_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    model.set_attn_implementation(_NAME)
    return True


def head_width(config: Any) -> int | None:
    """Of a head's keys, by the configuration of the part that reads text; None where layers differ in it."""
    try:
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except RuntimeError:  # what transformers raises then is no AttributeError (Gemma 4)
        return None


def told(documents: Documents) -> dict[str, Any]:
    """Where documents begin, by the names under which transformers hands it down."""
    return {
        "cu_seq_lens_q": documents.starts, "cu_seq_lens_k": documents.starts,
        "max_length_q": documents.longest, "max_length_k": documents.longest,
    }  # fmt: skip


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: (B, H, T, K), of key and value perhaps fewer heads, to (B, T, H, K)."""
    if cu_seq_lens_q is None:  # one document a row, or generation
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling)
    out_BHTK = attention(query, key, value, Documents(cu_seq_lens_q, max_length_q), False, dropout, scaling)
    return out_BHTK.transpose(1, 2).contiguous(), None
