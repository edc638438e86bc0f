"""Our attention in bases that transformers builds: each architecture, with random weights."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.data import Batch, make_batch
from llmtrain.models import base, base_attention
from llmtrain.shards import Rows

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
OTHERWISE: dict[str, dict[str, Any]] = {
    "granite": {"attention_multiplier": 0.3},
    "mistral": {"sliding_window": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}
"""What an architecture needs besides, or what is worth looking at in it."""
LENGTHS = [23, 7, 41, 12]
CPU = torch.device("cpu")


def build(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    base.be_quiet()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **OTHERWISE.get(kind, {}), **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def packed() -> Batch:
    tokens = np.random.default_rng(0).integers(1, 256, (1, 90)).astype(np.uint16)
    return make_batch(Rows(tokens, [np.array(LENGTHS, np.int32)], None), isolate_documents=True)


def hidden(model: Any, input_ids: Tensor, **more: Any) -> Tensor:
    return model.get_decoder()(input_ids=input_ids, use_cache=False, **more).last_hidden_state[0]


@pytest.mark.parametrize("kind", base_attention.KINDS)
@torch.no_grad()
def test_packed_documents_are_computed_as_alone(kind: str):
    model, batch = build(kind), packed()
    assert batch.documents is not None
    alone: list[Tensor] = []
    begin = 0
    for length in LENGTHS:
        alone.append(hidden(model, batch.input_ids[:, begin : begin + length]))
        begin += length
    assert base_attention.use(model, 128, torch.float32, CPU)
    told = base_attention.told(batch.documents)
    found = hidden(model, batch.input_ids, position_ids=batch.positions, **told)[:begin]
    expected = torch.cat(alone)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    leaky = hidden(model, batch.input_ids)[:begin]
    assert (leaky - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite"])
def test_gradients_are_those_that_transformers_mask_gives(kind: str):
    batch = packed()
    assert batch.documents is not None
    found: list[list[Tensor]] = []
    for ours in (False, True):
        model = build(kind)
        told = base_attention.told(batch.documents) if ours else {}
        assert not ours or base_attention.use(model, 128, torch.float32, CPU)
        hidden(model, batch.input_ids, position_ids=batch.positions, **told).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_generation_with_a_cache_is_transformers_own():
    model, ids = build("llama"), packed().input_ids[:, :20]
    expected = model(input_ids=ids).logits
    assert base_attention.use(model, 128, torch.float32, CPU)
    cache = model(input_ids=ids[:, :15], use_cache=True)
    logits = [cache.logits]
    for place in range(15, 20):
        step = model(input_ids=ids[:, place : place + 1], past_key_values=cache.past_key_values, use_cache=True)
        logits.append(step.logits)
    assert torch.allclose(torch.cat(logits, 1), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {}),
        ("nemotron", {}),
        ("llama", {"attn_implementation": "eager"}),
    ],
    ids=["a window", "capped scores", "starts are not handed down", "computed another way"],
)
def test_a_base_with_attention_of_another_kind_keeps_it(kind: str, changes: dict[str, Any]):
    model = build(kind, **changes)
    before = model.config._attn_implementation
    assert not base_attention.use(model, 128, torch.float32, CPU)
    assert model.config._attn_implementation == before


def test_on_a_gpu_its_kernel_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert not base_attention.use(build("llama"), 128, torch.float32, gpu)
    assert not base_attention.use(build("gpt2"), 128, torch.bfloat16, gpu)  # its dropout is 0.1
    assert base_attention.use(build("llama"), 128, torch.bfloat16, gpu)
