"""Llama from scratch: what transformers makes of it, its documents, its memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from llmtrain.config import load_config
from llmtrain.config.model_sections import LlamaModel, RopeScalingSection
from llmtrain.config.schema import SampleSection
from llmtrain.data import Documents
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.evaluate import continue_text
from llmtrain.memory import WholeSizes, block_matrices, layer_activations
from llmtrain.models import GPT, read_model
from llmtrain.models.attention import _flash
from llmtrain.models.llama import Llama
from tests.support.kept import kept

SMALL = LlamaModel(kind="llama", num_layers=2, num_heads=4, num_kv_heads=2, width=32, context=24)
QWEN2 = SMALL.model_copy(update={"qkv_bias": True})
QWEN3 = SMALL.model_copy(update={"qk_norm": True, "head_width": 12})


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("own", "made"),
    [
        ({"num_kv_heads": None}, "LlamaForCausalLM"),
        ({"num_kv_heads": 1, "head_width": 12, "norm_eps": 1e-2}, "LlamaForCausalLM"),
        ({}, "LlamaForCausalLM"),
        ({"qkv_bias": True, "norm_eps": 1e-6}, "Qwen2ForCausalLM"),
        ({"qk_norm": True, "head_width": 16, "norm_eps": 1e-3}, "Qwen3ForCausalLM"),
    ],
)
def test_transformers_gives_the_same_logits_and_gradients(tmp_path: Path, tied: bool, own: dict[str, Any], made: str):
    from transformers import AutoModelForCausalLM

    changed = {"tie_weights": tied, "rope_theta": 500.0, "mlp_width": 80, **own}
    model = Llama(SMALL.model_copy(update=changed), 100, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save(tmp_path, dict(model.named_parameters()), eos_id=7)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == made
    assert theirs.config.eos_token_id == 7
    ids = random_ids(2, 20)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model.logits(ids), atol=2e-5)
    loss = model(ids[:, :-1], ids[:, 1:]) / (2 * 19)
    expected = theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)

    again, eos_id = read_model(tmp_path)
    assert isinstance(again, Llama)
    ours = model.config.model_dump()
    assert again.config.model_dump() == {**ours, "num_kv_heads": model.config.kv_heads}
    assert eos_id == 7
    assert torch.equal(again.logits(ids), model.logits(ids))


def test_positions_stretched_as_in_llama_31_are_those_of_transformers(tmp_path: Path):
    """Of 8 channels some turn slowly within 16 positions, one is mixed, and some stay."""
    from transformers import AutoModelForCausalLM

    scaling = RopeScalingSection(factor=8.0, low_freq_factor=1.0, high_freq_factor=2.0, original_context=16)
    config = SMALL.model_copy(update={"width": 64, "rope_theta": 50.0, "context": 128})
    ids = random_ids(2, 120)
    plain = Llama(config, 100, seed=3)
    model = Llama(config.model_copy(update={"rope_scaling": scaling}), 100, seed=3)
    model.save(tmp_path, dict(model.named_parameters()), eos_id=7)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model.logits(ids), atol=2e-5)
    assert not torch.allclose(plain.logits(ids), model.logits(ids), atol=1e-3)

    again, _ = read_model(tmp_path)
    assert again.config.rope_scaling == scaling
    assert torch.equal(again.logits(ids), model.logits(ids))
    file = tmp_path / "config.json"  # as transformers wrote it before its version 5
    settings = json.loads(file.read_text())
    del settings["rope_parameters"]
    file.write_text(json.dumps(settings))
    assert read_model(tmp_path)[0].config == again.config


def test_another_model_is_not_read(tmp_path: Path):
    model = Llama(SMALL, 100)
    model.save(tmp_path, dict(model.named_parameters()), eos_id=7)
    file = tmp_path / "config.json"
    whole = file.read_text()
    for before, after in [
        ("silu", "gelu"),
        ('"default"', '"yarn"'),
        ("llama", "mamba"),
        ('"hidden_size": 32', '"hidden_size": 34'),
    ]:
        file.write_text(whole.replace(before, after))
        with pytest.raises(CheckpointError, match="cannot be read as a GPT-2 or a Llama of ours"):
            read_model(tmp_path)
    file.write_text(whole)
    with pytest.raises(CheckpointError, match="not the weights of this model"):
        Llama(SMALL.model_copy(update={"mlp_width": 64}), 100).load(tmp_path)


@pytest.mark.parametrize("config", [SMALL, QWEN3])
@pytest.mark.parametrize("bf16", [False, True])
def test_packed_documents_are_computed_as_if_alone(bf16: bool, config: LlamaModel):
    model = Llama(config, 100, seed=1)
    ids = random_ids(2, 24)
    starts = torch.tensor([0, 9, 24, 30, 48], dtype=torch.int32)
    positions = torch.stack(
        [torch.cat([torch.arange(9), torch.arange(15)]), torch.cat([torch.arange(6), torch.arange(18)])]
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        packed = model.logits(ids, Documents(starts, 18), positions)
        alone = [model.logits(part)[0] for part in (ids[:1, :9], ids[:1, 9:], ids[1:, :6], ids[1:, 6:])]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), atol=2e-2 if bf16 else 1e-5, rtol=1e-3)


@pytest.mark.parametrize("config", [SMALL, QWEN2, QWEN3])
def test_generation_with_the_cache_equals_generation_without(config: LlamaModel):
    model = Llama(config, 100, seed=1).eval()
    greedy = SampleSection(temperature=0, tokens=12)
    with_cache = list(continue_text(model.text_generator(), [1, 2, 3], greedy, 0, None))
    ids = [1, 2, 3]
    for _ in range(12):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert with_cache == ids[3:]


@pytest.mark.parametrize("bf16", [False, True])
def test_activation_checkpointing_changes_memory_not_numbers(bf16: bool):
    ids = random_ids(2, 24)
    found: list[list[torch.Tensor]] = []
    sizes: list[int] = []
    for recompute in (False, True):
        model = Llama(SMALL, 100, seed=3, activation_checkpointing=recompute)
        with kept(model, bf16) as seen:
            loss = model(ids, ids)
        sizes.append(seen.bytes)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize(("documents", "config"), [(False, SMALL), (True, SMALL), (True, QWEN3)])
def test_the_compiled_model_is_one_graph_with_the_same_gradients(documents: bool, config: LlamaModel):
    model = Llama(config, 100, seed=3)
    ids = random_ids(2, 24)
    given = Documents(torch.tensor([0, 9, 24, 33, 48], dtype=torch.int32), 24) if documents else None
    positions = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, -1) if documents else None
    found: list[list[torch.Tensor]] = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = forward(ids, ids, given, positions)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference)


def test_with_a_gpus_kernel_for_documents_the_model_is_one_graph(monkeypatch: pytest.MonkeyPatch):
    """As tests/unit/test_models.py has it for a GPT, up to the graph; keys and values with their own few heads."""

    def as_on_a_gpu(q: Tensor, k: Tensor, v: Tensor, apart: Documents, causal: bool, dropout: float) -> Tensor:
        return _flash(q, k, v, apart, None)

    class Captured(Exception):
        pass

    def keep(graph: Any, inputs: Any) -> Any:
        raise Captured(str(graph.graph))

    monkeypatch.setattr("llmtrain.models.llama.kept_apart", lambda documents, x, flash: documents)
    monkeypatch.setattr("llmtrain.models.llama.attention", as_on_a_gpu)
    ids, starts = torch.zeros(2, 24, dtype=torch.int64), torch.tensor([0, 9, 24, 48], dtype=torch.int32)
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(Llama(SMALL, 100), backend=keep, fullgraph=True)(ids, ids, Documents(starts, 24))
    assert isinstance(caught.value.inner_exception, Captured)
    calls = [line for line in str(caught.value.inner_exception).splitlines() if "torch_attn._varlen_attn" in line]
    assert [call.count("[-1, 0], True") for call in calls] == [1] * SMALL.num_layers  # causal, with few keys


def test_initial_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    first, again, other = Llama(SMALL, 100, seed=1), Llama(SMALL, 100, seed=1), Llama(SMALL, 100, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    deep = Llama(SMALL.model_copy(update={"num_layers": 8, "width": 128}), 100)
    stds = {name: p.std().item() for name, p in deep.named_parameters()}
    assert stds["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert stds["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert set(deep.model["norm"].weight.tolist()) == {1.0}


def test_a_block_is_about_as_large_as_gpt2s():
    with torch.device("meta"):
        config = load_config(None, ["model.kind=llama", "model.width=768", "model.num_heads=12", "model.num_layers=12",
                                    "model.context=1024"])[0]  # fmt: skip
        llama, gpt = Llama(config.model, 50257), GPT(load_config(None, ["model.width=768", "model.num_heads=12",
                                    "model.num_layers=12", "model.context=1024"])[0].model, 50257)  # fmt: skip
    assert llama.num_parameters() == pytest.approx(gpt.num_parameters(), rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [SMALL, SMALL.model_copy(update={"num_kv_heads": None}), QWEN2, QWEN3])
def test_the_plan_counts_its_parameters_and_its_state(tied: bool, config: LlamaModel):
    config = config.model_copy(update={"tie_weights": tied})
    model, sizes = Llama(config, 100), WholeSizes(config, 100)
    assert sizes.trainable == model.num_parameters()
    by_muon = sum(p.numel() for p, _ in model.hidden_matrices())
    run = load_config(None, ["optim.kind=muon"])[0]
    assert sizes.checkpoint_bytes(run) == 12 * model.num_parameters() - 4 * by_muon


@pytest.mark.parametrize(
    "own", [{}, {"num_kv_heads": 2}, {"head_width": 32}, {"qkv_bias": True}, {"qk_norm": True, "num_kv_heads": 2}]
)
@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_layer_keeps_is_what_autograd_keeps(bf16: bool, own: dict[str, Any]):
    config = LlamaModel(kind="llama", num_layers=1, num_heads=8, width=128, context=256, **own)
    ids = random_ids(4, 256)
    seen: list[int] = []
    for num_layers in (2, 3):
        model = Llama(config.model_copy(update={"num_layers": num_layers}), 100)
        with kept(model, bf16) as counted:
            model(ids, ids)
        seen.append(counted.bytes)
    casts = 2 * block_matrices(config) if bf16 else 0
    assert layer_activations(config, 4 * 256, bf16, "cpu") + casts == pytest.approx(seen[1] - seen[0], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["model.num_heads=5"],
            "num_heads=5 does not divide width=256 into heads of a multiple of 2; use one of 1, 2, 4",
        ),
        (
            ["model.width=33"],
            "num_heads=4 does not divide width=33 into heads of a multiple of 2; use a width of a multiple of 8",
        ),
        (["model.num_kv_heads=3"], "num_kv_heads=3 does not divide num_heads=4; use one of 1, 2, 4"),
        (["model.qk_norm=true", "model.qkv_bias=true"], "no model has both"),
        (["model.dropout=0.1"], "dropout belongs to kind: gpt, not llama"),
    ],
)
def test_settings_that_do_not_fit(settings: list[str], told: str):
    with pytest.raises(ConfigError, match=told):
        load_config(None, ["model.kind=llama", *settings])
