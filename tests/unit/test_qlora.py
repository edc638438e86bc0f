"""LoRA on a quantised base: the loss, packing, what is frozen, what is saved, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.config.schema import RunConfig
from llmtrain.data import IGNORE, Documents, make_batch
from llmtrain.errors import ModelError
from llmtrain.memory_lora import layer_activations, lora_parameters, weight_bytes
from llmtrain.models import base as bases
from llmtrain.models import base_checks, base_linears, isolation
from llmtrain.models.qlora import QLoRA
from llmtrain.shards import Rows
from tests.support import bases as bases_made
from tests.support.bases import configure, copy, write_gpt2, write_llama, write_tokenizer
from tests.support.kept import kept

CPU = torch.device("cpu")
QUANTISATIONS = ["nf4", "int8", "none"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


def build(config: RunConfig, stir: bool = True) -> QLoRA:
    return bases_made.build(config, stir)


def samples(lengths: list[int], context: int, together: bool) -> Rows:
    """Samples of uneven lengths, each learned in its last third; in one row or in one row each."""
    draw = np.random.default_rng(1)
    ids = [np.append(draw.integers(1, 512, length - 1), 0) for length in lengths]  # 0 ends a text
    rows = [list(range(len(lengths)))] if together else [[i] for i in range(len(lengths))]
    tokens = np.zeros((len(rows), context + 1), np.uint16)
    mask = np.zeros(tokens.shape, np.uint8)
    for row, members in enumerate(rows):
        at = 0
        for i in members:
            length = lengths[i]
            tokens[row, at : at + length] = ids[i]
            mask[row, at + length - length // 3 : at + length] = 1
            at += length
    return Rows(tokens, [np.array([lengths[i] for i in members], np.int32) for members in rows], mask)


LENGTHS = [23, 7, 41, 12]


def loss_and_gradients(model: QLoRA, rows: Rows, isolate: bool) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    batch = make_batch(rows, isolate)
    loss = model(batch.input_ids, batch.targets, batch.documents, batch.positions, batch.learned) / batch.num_targets
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packed_samples_have_the_loss_and_gradients_of_samples_alone(
    architecture: str, quantisation: str, request: pytest.FixtureRequest
):
    model = build(configure(request.getfixturevalue(architecture), f"model.quantisation={quantisation}"))
    packed, packed_gradients = loss_and_gradients(model, samples(LENGTHS, 90, together=True), isolate=True)
    alone, alone_gradients = loss_and_gradients(model, samples(LENGTHS, 90, together=False), isolate=False)
    assert packed == pytest.approx(alone, abs=1e-5)
    assert len(packed_gradients) == len(model.trainable())
    for name, gradient in packed_gradients.items():
        reference = alone_gradients[name]
        assert (gradient - reference).norm() <= 1e-4 * reference.norm(), name


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_mask_makes_the_start_up_check_fail(
    architecture: str, quantisation: str, precision: str, request: pytest.FixtureRequest
):
    config = configure(
        request.getfixturevalue(architecture), f"model.quantisation={quantisation}", f"train.precision={precision}"
    )
    model = build(config)
    rows = samples(LENGTHS, 90, together=True)
    batch = make_batch(rows, isolate_documents=True)
    arguments: Any = (batch, LENGTHS, precision == "bf16")
    assert isolation.check(model, *arguments) < 0.01

    def with_an_attention_mask(input_ids: Tensor, _: Tensor | None, positions: Tensor | None) -> Tensor:
        ones = torch.ones_like(input_ids)  # the mask that most training scripts pass
        output = model._base.get_decoder()(
            input_ids=input_ids, position_ids=positions, attention_mask=ones, use_cache=False
        )
        return output.last_hidden_state

    model.hidden = with_an_attention_mask  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModelError, match="does not keep packed documents apart"):
        isolation.check(model, *arguments)


def test_logits_that_are_scaled_behind_our_back_are_found(llama: Path):
    model = build(configure(llama))
    rows = samples([40], 90, together=True)
    batch = make_batch(rows, isolate_documents=False)
    assert isolation.check(model, batch, [40], autocast=False) < 1e-4
    plain = model.logits
    model.logits = lambda hidden_ND: plain(hidden_ND) * 0.5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModelError, match="changes its logits"):
        isolation.check(model, batch, [40], autocast=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_is_transformers_with_labels_ignored_on_the_prompt(architecture: str, request: pytest.FixtureRequest):
    model = build(configure(request.getfixturevalue(architecture)))
    rows = samples(LENGTHS, 64, together=False)
    batch = make_batch(rows, isolate_documents=False)
    assert rows.loss_mask is not None
    ids = torch.from_numpy(rows.tokens.astype(np.int64))
    labels = ids.where(torch.from_numpy(rows.loss_mask) == 1, IGNORE)
    model.eval()
    with torch.no_grad():
        theirs = model.peft(input_ids=ids, labels=labels).loss.item()
        ours = model(batch.input_ids, batch.targets).item() / batch.num_targets
    assert batch.num_targets == int((labels[:, 1:] != IGNORE).sum())
    assert ours == pytest.approx(theirs, abs=1e-6)


def frozen_bytes(model: QLoRA) -> dict[str, bytes]:
    state = {name: p for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    return {name: p.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, p in state.items()}


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_and_evaluating_leave_the_base_as_it_is(llama: Path, quantisation: str, precision: str):
    model = build(configure(llama, f"model.quantisation={quantisation}", f"train.precision={precision}"))
    assert all("lora_" in name for name in model.trainable())
    before, adapter = frozen_bytes(model), {name: p.clone() for name, p in model.trainable().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)  # all of them, on purpose
    batch = make_batch(samples(LENGTHS, 90, together=True), isolate_documents=True)
    for _ in range(2):
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(batch.input_ids, batch.targets, None, batch.positions)
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(batch.input_ids, batch.targets, None, batch.positions)
        loss.backward()
        optimizer.step()
    assert frozen_bytes(model) == before
    assert all(not torch.equal(adapter[name], p) for name, p in model.trainable().items())


@pytest.mark.parametrize(
    "settings",
    [["model.lora.dora=true"], ["model.lora.rslora=true"], ["model.lora.target_modules=[q_proj, v_proj]"],
     ["model.lora.dtype=bf16"], ["model.quantisation=int8"]],
)  # fmt: skip
def test_an_adapter_is_saved_and_loaded_here_and_by_peft(llama: Path, tmp_path: Path, settings: list[str]):
    from peft import AutoPeftModelForCausalLM

    config = configure(llama, *settings)
    model, again = build(config), build(config, stir=False)
    model.save(tmp_path, {name: p.detach() for name, p in model.trainable().items()}, eos_id=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again.load(tmp_path)
    for name, parameter in again.trainable().items():
        assert torch.equal(parameter, model.trainable()[name]), name

    plain = build(configure(llama, *settings, "model.quantisation=none"), stir=False)
    plain.load(tmp_path)
    theirs: Any = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    ids = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))
    plain.eval()
    with torch.no_grad():
        mine = plain.logits(plain.hidden(ids, None, None))
        # peft computes adapters in fp32, also those that are stored in bf16
        tolerance = 2e-2 if "model.lora.dtype=bf16" in settings else 1e-5
        assert torch.allclose(mine, theirs.eval()(input_ids=ids).logits, atol=tolerance)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["lora_alpha"] == 16
    assert saved["inference_mode"] is True


def test_alpha_is_twice_r_unless_it_is_given(llama: Path):
    assert configure(llama).model.lora.scale_alpha == 16  # pyright: ignore[reportAttributeAccessIssue]
    assert configure(llama, "model.lora.alpha=3").model.lora.scale_alpha == 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("rslora", "scale"), [("true", 3 / 8**0.5), ("false", 3 / 8)])
def test_what_the_adapter_is_scaled_by(llama: Path, rslora: str, scale: float):
    model = build(configure(llama, "model.lora.alpha=3", f"model.lora.rslora={rslora}"), stir=False)
    found = {module.scaling["default"] for module in model.peft.modules() if hasattr(module, "lora_A")}
    assert list(found) == [pytest.approx(scale)]


@pytest.mark.parametrize("double", [True, False])
def test_the_counted_bytes_of_nf4_weights_are_the_models(llama: Path, double: bool):
    config = configure(llama, f"model.double_quantisation={str(double).lower()}").model
    assert config.kind == "qlora"
    for _, module in base_linears.linear_modules(bases.load(config, torch.float32, CPU)):
        weight: Any = module.weight
        state = weight.quant_state
        assert state.nested == double
        scales = [state.absmax, state.state2.absmax] if double else [state.absmax]
        size = weight.nbytes + sum(scale.nbytes for scale in scales)
        assert size / state.shape.numel() == pytest.approx(weight_bytes(config, 4), rel=0.005)


@pytest.mark.parametrize("settings", [[], ["model.lora.dora=true"], ["model.lora.target_modules=[q_proj, down_proj]"]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_counted_parameters_are_the_models(architecture: str, settings: list[str], request: pytest.FixtureRequest):
    if architecture == "gpt2":
        settings = [s.replace("q_proj, down_proj", "c_attn, c_proj") for s in settings]
    config = configure(request.getfixturevalue(architecture), *settings)
    assert config.model.kind == "qlora"
    facts = bases.describe(config.model)
    model = build(config, stir=False)
    assert lora_parameters(config.model, facts) == model.num_parameters()
    whole = build(configure(request.getfixturevalue(architecture), *settings, "model.quantisation=none"), stir=False)
    counted = facts.linear_parameters + facts.other_parameters
    assert counted == sum(p.numel() for p in whole.parameters() if not p.requires_grad)


@pytest.mark.parametrize("packing", ["none", "bestfit"])
@pytest.mark.parametrize(
    ("precision", "dropout", "targets"),
    [("bf16", 0.0, "all-linear"), ("bf16", 0.1, "[q_proj, k_proj, v_proj, o_proj]"), ("fp32", 0.0, "all-linear")],
)
def test_what_a_layer_keeps_is_what_autograd_keeps(
    tmp_path: Path, precision: str, dropout: float, targets: str, packing: str
):
    measured: dict[int, int] = {}
    length, rows = 128, 2
    config = None
    for layers in (1, 3):
        shape = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": layers}
        folder = write_llama(tmp_path / str(layers), **shape)
        config = configure(
            folder, f"train.precision={precision}", f"model.lora.dropout={dropout}", "model.lora.r=2",
            f"model.lora.target_modules={targets}", f"data.packing={packing}", f"model.context={length}",
        )  # fmt: skip
        model = build(config, stir=False)
        ids = torch.zeros(rows, length, dtype=torch.int64)
        positions = documents = None
        if packing == "bestfit":
            positions = torch.arange(length).expand(rows, -1)
            documents = Documents(torch.arange(0, (rows + 1) * length, length, dtype=torch.int32), length)
        with kept(model, precision == "bf16") as found:
            assert model.hidden(ids, documents, positions).requires_grad
        measured[layers] = found.bytes
    assert config is not None
    assert config.model.kind == "qlora"
    facts = bases.describe(config.model)
    counted = layer_activations(config, config.model, facts, precision == "bf16", "cpu")
    real = (measured[3] - measured[1]) / 2 / (rows * length)
    print(f"{precision} dropout {dropout} {targets} {packing}: counted {counted:.0f}, kept {real:.0f} bytes a position")
    assert counted == pytest.approx(real, rel=0.1)


def test_activation_checkpointing_gives_the_same_gradients(llama: Path):
    rows = samples(LENGTHS, 90, together=True)
    settings = ["model.lora.dropout=0.1"]
    found = []
    for recompute in ("false", "true"):
        model = build(configure(llama, *settings, f"train.activation_checkpointing={recompute}"))
        model.train()
        torch.manual_seed(3)
        found.append(loss_and_gradients(model, rows, isolate=True))
    (loss, gradients), (again, gradients_again) = found
    assert loss == again
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def refused(config: RunConfig, tokenizer_size: int | None = None) -> str:
    assert config.model.kind == "qlora"
    with pytest.raises(ModelError) as caught:
        base_checks.check(config.model, bases.describe(config.model), tokenizer_size)
    return str(caught.value)


def test_target_modules_that_match_nothing(llama: Path):
    said = refused(configure(llama, "model.lora.target_modules=[q_proj, v_prj]"))
    assert "v_prj matches nothing; did you mean v_proj? LlamaForCausalLM has: q_proj, k_proj, v_proj, o_proj" in said
    assert "lm_head" in refused(configure(llama, "model.lora.target_modules=[lm_head]"))


def test_a_base_that_is_quantised_another_way(llama: Path, tmp_path: Path):
    folder = copy(llama, tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert "already quantised (gptq)" in refused(configure(folder))
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": eight}))
    bases.read_config.cache_clear()
    assert "set model.quantisation=int8" in refused(configure(folder))


def test_a_base_that_lies_there_quantised_is_taken_as_it_is(llama: Path, tmp_path: Path):
    config = configure(llama)
    assert config.model.kind == "qlora"
    bases.load(config.model, torch.float32, CPU).save_pretrained(str(tmp_path / "nf4"))
    write_tokenizer(tmp_path / "nf4")
    stored, fresh = build(configure(tmp_path / "nf4")), build(config)
    ids = torch.randint(512, (1, 20), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(stored.eval().hidden(ids, None, None), fresh.eval().hidden(ids, None, None), atol=1e-5)


def test_a_tokenizer_larger_than_the_embedding(llama: Path):
    said = refused(configure(llama), tokenizer_size=600)
    assert "the tokenizer has 600 tokens, but the base's embedding only 512 rows" in said


def test_a_context_longer_than_the_base_knows(llama: Path):
    assert "model.context=512 is longer than the base was made for (256 positions)" in refused(
        configure(llama, "model.context=512")
    )


def test_code_of_the_bases_own_runs_only_if_it_was_allowed(llama: Path, tmp_path: Path):
    folder = copy(llama, tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    trace = tmp_path / "it-ran"
    (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w').close()\nraise RuntimeError('ran')\n")
    said = refused(configure(folder))
    assert "set model.trust_remote_code=true" in said
    assert not trace.exists()
    refused(configure(folder, "model.trust_remote_code=true"))
    assert trace.exists()


def test_a_base_that_is_not_there(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "Give a folder with config.json" in refused(configure(tmp_path / "empty"))


def test_the_weights_that_nf4_stands_for_are_what_it_computes_with(llama: Path, gpt2: Path):
    for folder in (llama, gpt2):
        for quantisation in ("nf4", "int8"):
            config = configure(folder, f"model.quantisation={quantisation}")
            assert config.model.kind == "qlora"
            quantised = bases.load(config.model, torch.float32, CPU).train()  # int8 rounds its inputs in evaluation
            plain = bases.load(config.model, torch.float32, CPU, quantisation="none").train()
            ids = torch.randint(512, (1, 20), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                original = plain(input_ids=ids).logits
                base_linears.dequantise(quantised, into=plain)
                wanted, found = quantised(input_ids=ids).logits, plain(input_ids=ids).logits
            assert torch.allclose(found, wanted, atol=2e-3), (folder, quantisation)
            assert not torch.allclose(found, original, atol=2e-3)


def test_saved_adapters_hold_no_base_weights(llama: Path, tmp_path: Path):
    model = build(configure(llama))
    model.save(tmp_path, {name: p.detach() for name, p in model.trainable().items()}, eos_id=0)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
