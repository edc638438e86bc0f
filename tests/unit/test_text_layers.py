"""What of a base is trained and what is quantised: layers for pictures, and layers that bitsandbytes leaves out."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain import adapters
from llmtrain.batches import BatchPlan
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.errors import CheckpointError, DiskFull, RunFolderError
from llmtrain.memory_lora import LoraSizes, lora_parameters
from llmtrain.models import base as bases
from llmtrain.models import base_linears
from llmtrain.models.qlora import ADAPTER, QLoRA, check_adapter
from tests.support import bases as bases_made
from tests.support.bases import SHAPE, configure, write_llama

CPU = torch.device("cpu")
PLAN = BatchPlan(global_batch_size=2, micro_batch_size=2, accumulation=1, total_steps=10)
TEXT: dict[str, Any] = {**SHAPE, "head_dim": 16, "sliding_window": 128, "pad_token_id": 0}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SEES: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma4": {"text_config": {**TEXT, "vocab_size_per_layer_input": 512}, "vision_config": VISION},
}


def write(folder: Path, kind: str, **values: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(str(folder))
    return folder


def write_falcon(folder: Path) -> Path:
    shape = {name: SHAPE[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    return write(folder, "falcon", **shape, bos_token_id=None, eos_token_id=0)


def build(folder: Path, *settings: str) -> tuple[QLoRAModel, QLoRA]:
    config = configure(folder, *settings)
    assert config.model.kind == "qlora"
    return config.model, bases_made.build(config)


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, v_proj]"])
@pytest.mark.parametrize("kind", list(SEES))
def test_lora_is_added_to_what_text_goes_through_alone(tmp_path: Path, kind: str, targets: str):
    config, model = build(write(tmp_path, kind, **SEES[kind]), f"model.lora.target_modules={targets}")
    facts = bases.describe(config)
    assert facts.unread
    assert all("language_model" in name for name in model.trainable())
    assert lora_parameters(config, facts) == model.num_parameters()
    check_adapter(config)
    model(torch.arange(1, 9).unsqueeze(0), torch.arange(2, 10).unsqueeze(0)).backward()
    assert all(parameter.grad is not None for parameter in model.trainable().values())
    assert facts == type(facts).from_json(facts.to_json())


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, v_proj]"])
def test_an_adapter_that_began_with_lora_on_pictures_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str
):
    base, saved = write(tmp_path / "base", "gemma3", **SEES["gemma3"]), tmp_path / "adapter"
    settings = [f"model.lora.target_modules={targets}", "model.lora.dora=true", "model.quantisation=none"]
    with monkeypatch.context() as earlier:
        earlier.setattr(base_linears, "text_linears", base_linears.linear_modules)
        config, old = build(base, *settings)
        with torch.no_grad():
            for name, parameter in old.trainable().items():
                if "language_model" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        saved.mkdir()
        old.save(saved, {name: p.detach() for name, p in old.trainable().items()}, eos_id=0)
    _, new = build(base, *settings)
    new.load(saved)
    assert 0 < len(new.trainable()) < len(old.trainable())
    assert all(torch.equal(parameter, old.trainable()[name]) for name, parameter in new.trainable().items())
    ids = torch.arange(1, 21).unsqueeze(0)
    with torch.no_grad():
        exported = adapters.attach(
            adapters.find(saved, trust_remote_code=False), bases.load(config, torch.float32, CPU, "none")
        )
        assert torch.allclose(exported(input_ids=ids).logits, new.peft.eval()(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["falcon", "gemma3"])
def test_what_is_counted_as_quantised_is_what_was_quantised(tmp_path: Path, kind: str, quantisation: str):
    folder = write_falcon(tmp_path) if kind == "falcon" else write(tmp_path, kind, **SEES[kind])
    config, model = build(folder, f"model.quantisation={quantisation}")
    facts = bases.describe(config)
    loaded = base_linears.linear_modules(bases.load(config, torch.float32, CPU))
    left = [module for _, module in loaded if not base_linears.is_quantised(module)]
    unquantised = sum(module.weight.numel() for module in left if isinstance(module.weight, torch.Tensor))
    assert facts.unquantised_parameters == unquantised
    assert (unquantised == facts.linear_parameters) == (kind == "falcon")
    parts = LoraSizes(config, facts).estimate(configure(folder), PLAN, 1, "ddp", bf16=True, device="cuda")
    assert {part.name: part.size_bytes for part in parts}.get("unquantised", 0) == 2 * unquantised
    assert ("which bitsandbytes does not quantise" in model.title()) == (unquantised > 0)
    model(torch.arange(1, 9).unsqueeze(0), torch.arange(2, 10).unsqueeze(0)).backward()


def test_an_adapter_that_cannot_be_read_now_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, model = build(write_llama(tmp_path / "base"), "model.quantisation=none")
    (tmp_path / ADAPTER).write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        model.load(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        model.load(tmp_path / "nowhere")
    for number in (errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES):

        def fails(*_: Any, number: int = number) -> None:
            raise OSError(number, "the disk says no")

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", fails)
            with pytest.raises(OSError, match="the disk says no") as caught:
                model.load(tmp_path)
        assert caught.value.errno == number


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, OSError), (errno.EMFILE, OSError), (errno.ESTALE, OSError), (errno.ENOSPC, DiskFull),
     (errno.EACCES, RunFolderError)],
)  # fmt: skip
def test_a_disk_that_fails_is_not_the_bases_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
):
    from transformers import AutoModelForCausalLM

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, "the disk says no")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(kind):
        build(write_llama(tmp_path), "model.quantisation=none")


def test_a_file_that_cannot_be_opened_now_is_not_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """safetensors calls both missing."""
    from transformers import AutoModelForCausalLM

    (tmp_path / "model.safetensors").touch()

    def fails(*_: Any, **__: Any) -> None:
        def too_many(*_: Any) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(Path, "open", too_many)
        raise FileNotFoundError(f"No such file or directory: {tmp_path / 'model.safetensors'}")

    config = configure(write_llama(tmp_path)).model
    assert config.kind == "qlora"
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(OSError, match="Too many open files"):
        bases.load(config, torch.float32, CPU)
