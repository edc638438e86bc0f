"""`llmtrain export --merge`: memory, devices, and bases whose own settings transformers does not write again."""

import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain import export
from llmtrain.adapters import Adapter, TokenizerPlace
from llmtrain.errors import CheckpointError, ConfigError, ModelError
from llmtrain.models import base as bases
from llmtrain.models import build_model
from llmtrain.models.qlora import QLoRA
from tests.support.asked_runs import export_plainly
from tests.support.bases import configure, copy, write_llama
from tests.support.checkpoint_runs import make_run, save

CPU = torch.device("cpu")
QUANTISES = "bitsandbytes.functional.quantize_4bit"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def adapter_on(base: Path, folder: Path, *settings: str) -> Adapter:
    config = configure(base, *settings)
    model = build_model(config, 512, CPU)
    assert isinstance(model, QLoRA)
    assert config.model.kind == "qlora"
    folder.mkdir()
    model.save(folder, {name: p.detach() for name, p in model.trainable().items()}, eos_id=0)
    return Adapter(folder, config.model, TokenizerPlace(str(base)))


@pytest.mark.parametrize(
    ("quantisation", "base", "beside"),
    [("nf4", "original", [0, 0, 0]), ("nf4", "dequantised", [0, 1, 0]), ("none", "original", [0, 0])],
)
def test_one_unquantised_model_is_held_at_a_time(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantisation: str, base: str, beside: list[int]
):
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def from_pretrained(*given: Any, **named: Any) -> Any:
        alive.append(sum(model() is not None for model in made))
        loaded = load(*given, **named)
        made.append(weakref.ref(loaded[0] if isinstance(loaded, tuple) else loaded))
        return loaded

    adapter = adapter_on(llama, tmp_path / "adapter", f"model.quantisation={quantisation}")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    export.write_merged(adapter, tmp_path / "merged", base, torch.float32, CPU)
    assert alive == beside


def test_running_out_of_memory_says_what_to_do():
    gpu = torch.device("cuda")
    with pytest.raises(ModelError, match=r"out of memory on cuda.*--device=cpu"), export.memory_errors(gpu):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(ModelError, match="out of memory on cpu"), export.memory_errors(CPU):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="of another kind"), export.memory_errors(CPU):
        raise RuntimeError("of another kind")


@pytest.mark.parametrize("place", ["transformers.AutoModelForCausalLM.from_pretrained", QUANTISES])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_while_a_base_is_loaded(
    llama: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
):
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(place, fail)
    config = configure(llama).model
    assert config.kind == "qlora"
    with pytest.raises(ModelError, match="--device=cpu"), export.memory_errors(torch.device("cuda")):
        bases.load(config, torch.float32, CPU)


def test_where_to_merge():
    assert export.find_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert export.find_device("auto") == CPU
        with pytest.raises(ConfigError, match="--device=cuda: no such device here"):
            export.find_device("cuda")


def test_a_base_that_samples_without_saying_so(llama: Path, tmp_path: Path):
    base = copy(llama, tmp_path / "base")
    settings = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}  # vicuna's
    (base / "generation_config.json").write_text(json.dumps(settings))
    adapter = adapter_on(base, tmp_path / "adapter", "model.quantisation=none")
    export.write_merged(adapter, tmp_path / "merged", "original", torch.float32, CPU)
    written = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert {name: written.get(name) for name in ("do_sample", "temperature", "top_p")} == {
        "do_sample": True, "temperature": 0.9, "top_p": 0.6,
    }  # fmt: skip


def test_a_base_that_does_not_sample_stays_so(llama: Path, tmp_path: Path):
    adapter = adapter_on(llama, tmp_path / "adapter", "model.quantisation=none")
    export.write_merged(adapter, tmp_path / "merged", "original", torch.float32, CPU)
    assert "do_sample" not in json.loads((tmp_path / "merged/generation_config.json").read_text())


@pytest.mark.parametrize(("known", "after"), [(None, 7), (2, [2, 7]), ([2, 3], [2, 3, 7]), (7, 7), ([2, 7], [2, 7])])
def test_what_ends_a_text_of_the_base_still_ends_one(known: int | list[int] | None, after: int | list[int]):
    """Beside what ended those of training."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=known))
    export.ends_with(model, 7)
    assert model.generation_config.eos_token_id == after


def test_an_altered_checkpoint_is_not_exported(tmp_path: Path):
    run = make_run(tmp_path / "run")
    save(run, 10)
    weights = run.checkpoint(10) / "model" / "model.safetensors"
    (weights.parent / "config.json").write_text("{}")
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: altered"):
        export_plainly(run.checkpoint(10), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [1.0, math.nan, math.inf])
def test_logits_that_moved_or_are_none_are_refused(change: float):
    before = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    export.compare("merging", before, before + 1e-6, tolerance=1e-4)
    after = before.clone()
    after[1, 2, 3] += change
    with pytest.raises(CheckpointError, match=r"merging changed the logits by .*nothing was kept"):
        export.compare("merging", before, after, tolerance=1e-4)
