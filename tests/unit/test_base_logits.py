"""Bases that scale or cap their logits: the loss is transformers' own, and so are its gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.errors import ModelError
from llmtrain.memory import loss_part
from llmtrain.memory_lora import layer_activations
from llmtrain.models import base as bases
from llmtrain.models import base_logits, build_model, isolation
from llmtrain.models.loss import Head, linear_cross_entropy, token_losses
from llmtrain.models.qlora import QLoRA
from tests.support import bases as bases_made
from tests.support.bases import configure, write_stirred
from tests.support.kept import kept
from tests.unit.test_isolation import LENGTHS, packed

CPU = torch.device("cpu")
CAPPED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 1.0},
    "gemma3_text": {"head_dim": 16, "final_logit_softcapping": 1.0},
    "gemma4_text": {
        "head_dim": 16, "global_head_dim": 16, "final_logit_softcapping": 1.0, "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}  # fmt: skip
SCALED: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"head_dim": 16, "logit_scale": 0.3},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "hyperclovax": {"logits_scaling": 0.125},
}
BIASED: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
    "phi": {"partial_rotary_factor": 0.5},
}
OTHER = CAPPED | SCALED | BIASED


def build(base: Path, *settings: str) -> QLoRA:
    everywhere = ["model.quantisation=none", "model.lora.target_modules=all-linear"]
    return bases_made.build(configure(base, *everywhere, *settings), stir=True)


@pytest.mark.parametrize("kind", OTHER)
def test_loss_and_gradients_are_transformers(kind: str, tmp_path: Path):
    model = build(write_stirred(tmp_path, kind, **OTHER[kind]))
    ids = packed().input_ids[:, :49]
    found: list[tuple[float, list[Tensor]]] = []
    for ours in (False, True):
        model.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:]) / 48 if ours else model.peft(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.trainable().values() if p.grad is not None]))
    (theirs, their_gradients), (mine, my_gradients) = found
    assert mine == pytest.approx(theirs, abs=2e-6)
    assert len(their_gradients) == len(my_gradients) == len(model.trainable())
    for gradient, expected in zip(my_gradients, their_gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()
    scored = model.token_losses(ids[:, :-1], ids[:, 1:]).mean().item()
    assert scored == pytest.approx(theirs, abs=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", OTHER)
def test_they_pass_the_check_at_the_start_which_misses_nothing_of_it(
    kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = build(write_stirred(tmp_path, kind, **OTHER[kind]), f"train.precision={precision}")
    assert isolation.difference(model, packed(), LENGTHS, precision == "bf16") < isolation._ALONE
    plain = Head(model._head.weight)
    model._logit_changes = base_logits.LogitChanges()
    monkeypatch.setattr(QLoRA, "_head", plain)
    assert isolation.difference(model, packed(), LENGTHS, precision == "bf16") > isolation._ALONE


def test_what_is_read_of_a_configuration():
    from transformers import AutoConfig

    def read(kind: str, **values: Any) -> base_logits.LogitChanges:
        return base_logits.read(AutoConfig.for_model(kind, **values).get_text_config())

    assert read("llama") == base_logits.LogitChanges()
    assert read("gemma2") == base_logits.LogitChanges(cap=30.0)
    assert read("gemma3_text") == base_logits.LogitChanges()
    assert read("granite", logits_scaling=16.0) == base_logits.LogitChanges(scale=1 / 16)
    assert read("cohere", logit_scale=None) == base_logits.LogitChanges()
    assert read("mpt", logit_scale="inv_sqrt_d_model") == base_logits.LogitChanges()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_capped_loss_with_a_bias_and_its_gradients_are_autograds(precision: torch.dtype):
    torch.manual_seed(0)
    bias = torch.randn(101)
    hidden = torch.randn(70, 24, requires_grad=True)
    weight = torch.randn(101, 24, requires_grad=True)
    targets = torch.randint(0, 101, (70,))
    targets[::7] = -100
    found: list[list[Tensor]] = []
    for ours in (True, False):
        hidden.grad = weight.grad = None
        if ours:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = linear_cross_entropy(hidden, Head(weight, bias, 4.0), targets, -100)
        else:
            logits = 4.0 * torch.tanh((hidden @ weight.t() + bias) / 4.0)
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        found.append([loss.detach(), hidden.grad, weight.grad])
    bound = 1e-5 if precision == torch.float32 else 2e-2
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() <= bound * theirs.norm()
    with torch.no_grad():
        each = token_losses(hidden, Head(weight, bias, 4.0), targets, -100)
        assert each.sum().item() == pytest.approx(found[1][0].item(), rel=1e-5)
        whole = 4.0 * ((hidden @ weight.t() + bias) / 4.0).tanh()
        torch.testing.assert_close(Head(weight, bias, 4.0).logits(hidden), whole)


def test_a_base_whose_logits_are_cut_is_refused(tmp_path: Path):
    """Some architectures give fewer logits than their output layer has rows."""
    bases.be_quiet()
    model = build(write_stirred(tmp_path, "llama"))
    whole = model.peft.forward

    def cut(*args: Any, **more: Any) -> Any:
        output = whole(*args, **more)
        output.logits = output.logits[..., :500]
        return output

    model.peft.forward = cut
    with pytest.raises(ModelError, match="changes its logits"):
        isolation.check(model, packed(), LENGTHS, autocast=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_attention_without_a_fused_kernel_keeps_is_counted(precision: str, tmp_path: Path):
    """Gemma 2 caps its scores too."""
    length, wide = 256, {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
    measured: dict[int, int] = {}
    config = None
    for layers in (1, 3):
        base = write_stirred(tmp_path / str(layers), "gemma2", **wide, num_hidden_layers=layers)
        config = configure(
            base, "model.quantisation=none", "model.lora.r=2", f"train.precision={precision}", f"model.context={length}"
        )
        model = build_model(config, 512, CPU)
        assert isinstance(model, QLoRA)
        with kept(model, precision == "bf16") as found:
            assert model.hidden(torch.zeros(2, length, dtype=torch.int64), None, None).requires_grad
        measured[layers] = found.bytes
    assert config is not None
    assert config.model.kind == "qlora"
    facts = bases.describe(config.model)
    assert facts.keeps_scores
    assert facts.caps_logits
    counted = layer_activations(config, config.model, facts, precision == "bf16", "cpu")
    assert counted == pytest.approx((measured[3] - measured[1]) / 2 / (2 * length), rel=0.1)
    plain = configure(write_stirred(tmp_path / "llama", "llama")).model
    assert plain.kind == "qlora"
    assert not bases.describe(plain).keeps_scores


def test_a_cap_takes_memory_on_gpus():
    plain, capped = (loss_part(4096, 1000, 0, True, "cuda", cap).size_bytes for cap in (False, True))
    assert capped - plain == 4 * 4096 * 1000
