"""Bases of many kinds: what they are made of, what is refused, and files that are not whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.planning.base_config import read_facts
from llmtrain import base_facts, rank0
from llmtrain.batches import BatchPlan
from llmtrain.config.schema import RunConfig
from llmtrain.data import make_batch
from llmtrain.errors import ModelError, RunFolderError
from llmtrain.memory_lora import LoraSizes, lora_parameters
from llmtrain.models import base as bases
from llmtrain.models import base_checks, base_linears, build_model, isolation
from llmtrain.models.qlora import QLoRA, check_adapter
from llmtrain.rundir import RunDir
from llmtrain.shards import Rows
from tests.support import bases as bases_made
from tests.support.bases import build, configure, copy, write_llama

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {**bases_made.SHAPE, "pad_token_id": None}
LONGROPE: dict[str, Any] = {
    "num_key_value_heads": 4, "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
PLAN = BatchPlan(global_batch_size=2, micro_batch_size=2, accumulation=1, total_steps=10)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def write(folder: Path, kind: str, **values: Any) -> Path:
    """The configuration of a base alone; no weights."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **values).save_pretrained(str(folder))
    return folder


def write_weights(folder: Path, kind: str, **values: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **({} if "text_config" in values else SHAPE) | values)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return folder


def refused(config: RunConfig) -> str:
    assert config.model.kind == "qlora"
    with pytest.raises(ModelError) as caught:
        base_checks.check(config.model, bases.describe(config.model), None)
    return str(caught.value)


def facts_of(config: RunConfig) -> base_facts.BaseFacts:
    assert config.model.kind == "qlora"
    facts = bases.describe(config.model)
    base_checks.check(config.model, facts, None)
    return facts


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_files_that_lack_weights_are_refused(llama: Path, tmp_path: Path, quantisation: str, lost: str):
    folder = copy(llama, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"do not hold all of its weights: 1 missing \({lost}\)"):
        build(configure(folder, f"model.quantisation={quantisation}"))


def test_a_base_with_tied_embeddings_lacks_nothing(tmp_path: Path):
    tied = write_llama(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    assert build(configure(tied)).num_parameters() > 0


def test_a_file_that_was_cut_short_is_a_message(llama: Path, tmp_path: Path):
    folder = copy(llama, tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match="cannot be loaded: SafetensorError"):
        build(configure(folder))


def test_weights_that_lie_there_twice_are_fetched_and_read_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **arguments: Any) -> str:
        asked.update(arguments)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = configure(Path("some/base"))
    assert config.model.kind == "qlora"
    bases.fetch(config.model)
    files = ["model-00001-of-00002.safetensors", "consolidated.safetensors", "original/consolidated.00.safetensors"]
    chosen = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(chosen) == files[:1]

    run = RunDir(tmp_path / "run")
    run.create()
    folder = copy(llama, tmp_path / "base")
    rank0.check_same_base(run, folder, resuming=False)
    noted = json.loads(run.base.read_text())
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    rank0.check_same_base(run, folder, resuming=True)
    assert json.loads(run.base.read_text()) == noted
    earlier = {**noted, "consolidated.safetensors": {"sha256": "0"}}  # as versions before this one noted it
    run.base.write_text(json.dumps(earlier))
    rank0.check_same_base(run, folder, resuming=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"\(config.json changed\)"):
        rank0.check_same_base(run, folder, resuming=True)


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, v_proj]"])
def test_a_base_whose_layers_differ_in_their_heads(tmp_path: Path, targets: str):
    """Gemma 4. Its layers for pictures have modules around their linear layers, of the same names as those for text."""
    text = {**SHAPE, "head_dim": 16, "sliding_window": 128, "pad_token_id": 0, "vocab_size_per_layer_input": 512}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    write_weights(tmp_path, "gemma4", text_config=text, vision_config=vision)
    config = configure(tmp_path, f"model.lora.target_modules={targets}")
    assert config.model.kind == "qlora"
    facts, model = facts_of(config), build(config)
    assert lora_parameters(config.model, facts) == model.num_parameters()
    assert facts.expert_parameters == 0
    assert facts.kv_width == max(linear.outputs for linear in facts.linears if linear.name == "k_proj")


def test_a_context_with_two_ways_to_scale_positions_is_refused(tmp_path: Path):
    write(tmp_path, "phi3", **{**SHAPE, **LONGROPE})
    said = refused(configure(tmp_path, "model.context=33"))
    assert "beyond 32 tokens this base computes positions another way (longrope)" in said
    assert "Write model.context=32 or less" in said
    assert facts_of(configure(tmp_path, "model.context=32")).positions == 256


def test_planning_asks_transformers_about_longrope(tmp_path: Path):
    shape = {**SHAPE, "tie_word_embeddings": False}
    config = configure(write(tmp_path, "llama", **shape))
    assert config.model.kind == "qlora"
    assert read_facts(config.model, None) is not None
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **LONGROPE}))
    assert read_facts(config.model, None) is None


def test_a_base_that_wants_a_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lacks(*_: object, **__: object) -> None:
        raise ImportError("\nTimmWrapperModel requires the timm library but it was not found in your environment.\n")

    from transformers import AutoModelForCausalLM

    config = configure(write(tmp_path, "llama", **SHAPE))
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lacks)
    assert config.model.kind == "qlora"
    with pytest.raises(ModelError, match=f"model.base={tmp_path}: TimmWrapperModel requires the timm library"):
        bases.describe(config.model)


def test_a_base_that_takes_its_output_layer_for_its_decoder_is_refused(tmp_path: Path):
    config = configure(write(tmp_path, "modernbert-decoder", **{**SHAPE, "pad_token_id": 1, "bos_token_id": 1}))
    assert config.model.kind == "qlora"
    with pytest.raises(ModelError, match="does not tell its output layer from the rest"):
        bases.describe(config.model)


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, v_proj]"])
def test_what_is_trained_beside_experts_is_what_is_counted(tmp_path: Path, targets: str):
    config = configure(
        write_weights(tmp_path, "mixtral", num_local_experts=4),
        "model.quantisation=none", f"model.lora.target_modules={targets}",
    )  # fmt: skip
    facts, model = facts_of(config), build(config)
    assert config.model.kind == "qlora"
    assert lora_parameters(config.model, facts) == model.num_parameters()
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    assert facts.expert_parameters == experts
    parts = LoraSizes(config.model, facts).estimate(config, PLAN, 1, "ddp", bf16=True, device="cuda")
    sizes = {part.name: part.size_bytes for part in parts}
    assert sizes["experts"] == 2 * experts
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert sizes["base"] + sizes["embeddings"] + sizes["experts"] == 2 * frozen


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_a_base_without_attention_is_a_message(tmp_path: Path, kind: str):
    assert "not a model with attention" in refused(configure(write(tmp_path, kind)))


def test_a_base_whose_output_layer_cannot_be_left_out_is_a_message(tmp_path: Path):
    write(tmp_path, "llama4_text", **SHAPE, head_dim=16, intermediate_size_mlp=128, num_local_experts=4)
    assert "does not tell its output layer" in refused(configure(tmp_path, "model.quantisation=none"))


def test_layers_that_peft_refuses_are_a_message(tmp_path: Path):
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1, "ssm_state_size": 16}
    write_weights(tmp_path, "nemotron_h", head_dim=16, layers_block_type=["mamba", "attention"], **mamba)
    config = configure(tmp_path, "model.quantisation=none", "model.lora.target_modules=all-linear")
    assert config.model.kind == "qlora"
    with pytest.raises(ModelError, match=r"peft says: .*'out_proj' is incompatible") as caught:
        build(config)
    assert str(caught.value).startswith("model.lora.target_modules=all-linear: LoRA cannot be added")
    assert "the base has in_proj, out_proj, q_proj" in str(caught.value)
    with pytest.raises(ModelError) as planned:
        check_adapter(config.model)
    assert str(planned.value) == str(caught.value)
    named = configure(tmp_path, "model.quantisation=none", "model.lora.target_modules=[q_proj]")
    assert build(named).num_parameters() > 0


def test_routers_are_left_out_of_all_linear(tmp_path: Path):
    """Phi-MoE's are linear layers by their class, but give two tensors."""
    write_weights(tmp_path, "phimoe", num_local_experts=4, num_experts_per_tok=2)
    config = configure(tmp_path, "model.quantisation=none", "model.lora.target_modules=all-linear")
    assert config.model.kind == "qlora"
    facts, model = facts_of(config), build(config)
    check_adapter(config.model)
    assert lora_parameters(config.model, facts) == model.num_parameters()
    assert facts.names == ["q_proj", "k_proj", "v_proj", "o_proj"]
    model(torch.arange(1, 9).unsqueeze(0), torch.arange(2, 10).unsqueeze(0)).backward()


def test_int8_in_company_is_not_taken_for_a_leak(tmp_path: Path):
    """Some channels of the norms are large, as in trained models: what is beyond 6.0 leaves the 8 bits in all rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**SHAPE, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.3 + 0.4 * torch.rand_like(parameter))
                parameter[torch.randperm(len(parameter))[:4]] = 3.0
            elif parameter.ndim > 1:
                parameter.mul_(2.0)
    model.save_pretrained(str(tmp_path))
    built = build(configure(tmp_path, "model.quantisation=int8", "train.precision=bf16"))
    tokens = np.random.default_rng(3).integers(1, 512, (1, 201)).astype(np.uint16)
    batch = make_batch(Rows(tokens, [np.array([200], np.int32)], None), isolate_documents=False)
    alone = isolation.difference(built, batch, [200], autocast=True)
    with bases.rows_apart(built):
        assert isolation.difference(built, batch, [200], autocast=True) < alone / 10
    assert isolation.check(built, batch, [200], autocast=True) < alone / 10
    assert isolation.difference(built, batch, [200], autocast=True) == alone, "the threshold is not what it was"


@pytest.mark.parametrize("recompute", [False, True])
def test_int8_with_dora_computes_with_its_values_at_every_pass(llama: Path, recompute: bool):
    """peft replaces the weight of a layer, which bitsandbytes took for one that had just been loaded."""
    settings = ["model.lora.dora=true", "model.lora.dropout=0"]
    config = configure(llama, *settings, "model.quantisation=int8")
    model = build_model(config, 512, CPU, recompute).train()
    plain = build_model(configure(llama, *settings, "model.quantisation=none"), 512, CPU).train()
    assert isinstance(model, QLoRA)
    assert isinstance(plain, QLoRA)
    tokens = np.random.default_rng(3).integers(1, 512, (2, 33)).astype(np.uint16)
    batch = make_batch(Rows(tokens, [np.array([33], np.int32)] * 2, None), isolate_documents=False)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            parameter.mul_(1.1).add_(0.01)
            plain.trainable()[name].copy_(parameter)
        base_linears.dequantise(model._base, into=plain._base)
    wanted = plain(batch.input_ids, batch.targets).item()
    for _ in range(3):
        loss = model(batch.input_ids, batch.targets)
        assert loss.item() == pytest.approx(wanted, rel=1e-4)
        loss.backward()
    base_linears.dequantise(model._base, into=plain._base)  # the scales are still there
    assert plain(batch.input_ids, batch.targets).item() == wanted


def test_a_document_alone_is_not_told_to_be_alone(llama: Path):
    model = build(configure(llama))
    tokens = np.random.default_rng(3).integers(1, 512, (1, 41)).astype(np.uint16)
    batch = make_batch(Rows(tokens, [np.array([40], np.int32)], None), isolate_documents=False)
    plain = model.logits
    model.logits = lambda hidden_ND: plain(hidden_ND) * 0.5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModelError, match="take another base") as caught:
        isolation.check(model, batch, [40], autocast=False)
    assert "data.packing=none" not in str(caught.value)


def test_a_prompt_gives_logits_of_its_last_token_alone(llama: Path):
    model = build(configure(llama, "model.context=200"))
    shapes: set[tuple[int, ...]] = set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim > 1 and out.shape[-1] == 512:
                shapes.add(tuple(out.shape[:-1]))
            return out

    prompt = torch.arange(1, 181)
    with Note():
        found = model.text_generator().next_logits(prompt)
    assert (180,) not in shapes
    assert (1, 180) not in shapes
    with torch.no_grad():
        hidden = model.eval().hidden(prompt.unsqueeze(0), None, None)
    assert torch.allclose(found, model.logits(hidden[0])[-1], atol=1e-4)
