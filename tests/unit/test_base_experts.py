"""A mixture's experts in 4 bits: what they stand for, what they take, and how they come back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from llmtrain.batches import BatchPlan
from llmtrain.errors import ModelError
from llmtrain.memory_lora import LoraSizes, lora_parameters, weight_bytes
from llmtrain.models import base as bases
from llmtrain.models import base_checks, base_experts, base_linears, isolation
from llmtrain.models.qlora import QLoRA
from tests.support import bases as bases_made
from tests.support.bases import configure, write_stirred
from tests.support.kept import kept
from tests.unit.test_isolation import LENGTHS, packed

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


WITH_DENSE: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        "head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4},
}  # fmt: skip
"""With layers that are none of the experts, and called as experts once were."""


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stirred(tmp_path_factory.mktemp(request.param), request.param, **MIXTURES[request.param])


def build(base: Path, *settings: str) -> QLoRA:
    return bases_made.build(configure(base, "model.lora.target_modules=all-linear", *settings), stir=True)


def loss_and_gradients(model: QLoRA) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    ids = packed().input_ids[:, :49]
    loss = model(ids[:, :-1], ids[:, 1:]) / 48
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.trainable().items() if p.grad is not None}


def test_they_are_what_bitsandbytes_makes_of_them(mixture: Path):
    plain, quantised = (build(mixture, f"model.quantisation={how}")._base for how in ("none", "nf4"))
    seen = 0
    for name, module, keys in base_experts.stacks(plain):
        for key in keys:
            packed_weights, state = functional.quantize_4bit(
                getattr(module, key).data, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            expected = functional.dequantize_4bit(packed_weights, state)
            assert torch.equal(getattr(quantised.get_submodule(name), key), expected), (name, key)
            seen += 1
    assert seen == 2 * plain.config.num_hidden_layers
    # Routers and norms stay what they were.
    rest = {name for name, _ in plain.named_parameters()} & {name for name, _ in quantised.named_parameters()}
    assert any("router" in name or "gate" in name for name in rest)
    for name in rest:
        mine, theirs = quantised.get_parameter(name), plain.get_parameter(name)
        assert mine.shape != theirs.shape or torch.equal(mine, theirs), name


def test_loss_and_gradients_are_those_of_the_weights_that_they_stand_for(mixture: Path):
    quantised, plain = build(mixture, "model.quantisation=nf4"), build(mixture, "model.quantisation=none")
    base_linears.dequantise(quantised._base, into=plain._base)
    base_experts.dequantise(quantised._base, into=plain._base)
    (loss, gradients), (expected, references) = loss_and_gradients(quantised), loss_and_gradients(plain)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert gradients.keys() == references.keys()
    assert len(gradients) == len(quantised.trainable())
    for name, gradient in gradients.items():
        assert (gradient - references[name]).norm() <= 1e-3 * references[name].norm(), name


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
@pytest.mark.parametrize("kind", WITH_DENSE)
def test_lora_is_not_added_to_experts_in_the_place_of_dense_layers(kind: str, quantisation: str, tmp_path: Path):
    model = build(write_stirred(tmp_path, kind, **WITH_DENSE[kind]), f"model.quantisation={quantisation}")
    assert not any(".experts." in name for name in model.trainable())
    assert model.num_parameters() == lora_parameters(model.config, bases.describe(model.config))
    loss_and_gradients(model)
    folder = tmp_path / "adapter"
    model.save(folder, {name: p.detach() for name, p in model.trainable().items()}, eos_id=0)
    from peft import AutoPeftModelForCausalLM

    again = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    mine = {name.removeprefix("peft."): p for name, p in model.trainable().items()}
    found = {name: p for name, p in again.named_parameters() if "lora_" in name}
    assert found.keys() == mine.keys()
    assert all(torch.equal(found[name], mine[name]) for name in found)


def test_they_take_four_bits_and_nothing_that_was_dequantised_waits_for_the_backward_pass(mixture: Path):
    model = build(mixture, "model.quantisation=nf4")
    config = model.config
    facts = bases.describe(config)
    experts = [module for module in model.modules() if isinstance(module, base_experts._Dequantised)]
    assert len(experts) == 2 * facts.layers
    stored = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".original"))
    weights = sum(each.shape.numel() for each in experts)
    assert stored == weights / 2
    assert 0 < weights <= facts.expert_parameters
    assert facts.largest_stack == weights / facts.layers
    ids = packed().input_ids[:, :49]
    with kept(model, bf16=False) as found:
        assert model(ids[:, :-1], ids[:, 1:]).requires_grad
    smallest = 4 * min(each.shape.numel() for each in experts)
    assert all(tensor.untyped_storage().nbytes() < smallest for tensor in found.tensors)
    linears = [module for _, module in base_linears.linear_modules(model._base)]
    frozen = sum(p.numel() for m in linears if base_linears.is_quantised(m) for p in m.parameters()) * 2 + weights
    assert frozen > weights
    assert f"{frozen / 1e6:,.1f} M weights frozen in 4 bits (nf4)" in model.title()


def test_the_plan_counts_them(mixture: Path):
    config = configure(mixture, "model.quantisation=nf4", "model.lora.target_modules=all-linear")
    assert config.model.kind == "qlora"
    facts = bases.describe(config.model)
    plan = BatchPlan(global_batch_size=8, micro_batch_size=8, accumulation=1, total_steps=10)
    parts = LoraSizes(config.model, facts).estimate(config, plan, 1, "ddp", bf16=True, device="cuda")
    sizes = {part.name: part for part in parts}
    rest = facts.expert_parameters - facts.stacked_experts  # GPT-OSS's biases
    assert 0 <= rest < facts.stacked_experts / 10
    assert sizes["experts"].size_bytes == facts.stacked_experts * weight_bytes(config.model, 2) + 2 * rest
    assert "(nf4)" in sizes["experts"].note


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_documents_are_kept_apart(mixture: Path, precision: str):
    model = build(mixture, "model.quantisation=nf4", f"train.precision={precision}")
    if "gpt_oss" in mixture.name:  # as transformers has it, quantised or not
        with pytest.raises(ModelError, match=r"data\.packing=none"):
            isolation.check(model, packed(), LENGTHS, precision == "bf16")
    else:
        assert isolation.check(model, packed(), LENGTHS, precision == "bf16") < 0.05


def test_training_with_recomputation_goes_on(mixture: Path):
    """Checkpoints within checkpoints."""
    found = [
        loss_and_gradients(build(mixture, "model.quantisation=nf4", f"train.activation_checkpointing={on}").train())
        for on in ("false", "true")
    ]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


def test_int8_and_what_is_stored_quantised_are_refused(mixture: Path, tmp_path: Path):
    def refused(base: Path, quantisation: str, **other: int) -> str:
        config = configure(base, f"model.quantisation={quantisation}", "model.lora.target_modules=all-linear").model
        assert config.kind == "qlora"
        with pytest.raises(ModelError) as caught:
            base_checks.check(config, replace(bases.describe(config), **other), None)
        return str(caught.value)

    assert "stay in 16 bits with model.quantisation=int8" in refused(mixture, "int8")
    assert "Set model.quantisation=nf4, or none" in refused(mixture, "int8")
    assert "Set model.quantisation=none" in refused(mixture, "nf4", stacked_experts=0)  # kept another way (DBRX)
    values = json.loads((mixture / "config.json").read_text())
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": how}))
    assert "it is not known how they were quantised" in refused(tmp_path, "nf4")


def test_transformers_is_as_before_also_after_an_error(mixture: Path, tmp_path: Path):
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    before = Bnb4BitHfQuantizer.param_needs_quantization, Bnb4bitQuantize.convert
    (mixture / "model.safetensors").rename(tmp_path / "gone")
    try:
        with pytest.raises(ModelError, match="cannot be loaded"):
            build(mixture, "model.quantisation=nf4")
    finally:
        (tmp_path / "gone").rename(mixture / "model.safetensors")
    assert (Bnb4BitHfQuantizer.param_needs_quantization, Bnb4bitQuantize.convert) == before
