"""What int8 layers keep beyond the reach of activation checkpointing, and that `llmtrain plan` counts it."""

import gc
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.batches import BatchPlan
from llmtrain.memory_lora import LoraSizes, layer_activations
from llmtrain.models import base as bases
from llmtrain.models import build_model
from tests.support.bases import configure, write_llama

CPU = torch.device("cpu")
LENGTH = 512
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 896, "max_position_embeddings": LENGTH}


class Alive(TorchDispatchMode):
    """Bytes of all that was made within it and is still there, whoever holds it."""

    def __init__(self):
        super().__init__()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
        return out

    def bytes(self) -> int:
        gc.collect()
        return sum(self._sizes.values())


def kept(base: Path, *settings: str) -> float:
    """Bytes that live between a forward and a backward pass, for each further position of a row."""
    model = build_model(configure(base, f"model.context={LENGTH}", "data.packing=none", *settings), 512, CPU).train()
    found: list[int] = []
    for length in (LENGTH // 2, LENGTH):
        ids = torch.randint(1, 512, (1, length))
        with torch.autocast("cpu", torch.bfloat16), Alive() as alive:
            loss = model(ids, ids.clone())
            found.append(alive.bytes())
        loss.backward()
        del loss
    return (found[1] - found[0]) / (LENGTH // 2)


@pytest.fixture(params=["the CPU's path", "CUDA's path"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "CUDA's path":

        def matmul(A: Any, B: Any, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None) -> Any:
            return MatMul8bitLt.apply(A, B, out, bias, state)

        monkeypatch.setattr(bitsandbytes, "matmul", matmul)
    return request.param


def test_what_checkpointing_does_not_reach_is_counted(path: str, tmp_path: Path):
    layers = 4
    base = write_llama(tmp_path, num_hidden_layers=layers, **SHAPE)
    settings = ["train.precision=bf16", "train.activation_checkpointing=true", "model.lora.r=2"]
    measured: dict[str, float] = {}
    counted: dict[str, float] = {}
    for quantisation in ("nf4", "int8"):
        config = configure(base, *settings, f"model.quantisation={quantisation}", f"model.context={LENGTH}")
        assert config.model.kind == "qlora"
        measured[quantisation] = kept(base, *settings, f"model.quantisation={quantisation}")
        sizes = LoraSizes(config.model, bases.describe(config.model))
        parts = sizes.estimate(config, BatchPlan(1, 1, 1, 10), 1, "ddp", bf16=True, device="cuda")
        counted[quantisation] = next(part.size_bytes for part in parts if part.name == "activations") / LENGTH
    beside = measured["int8"] - measured["nf4"]
    print(f"{path}: int8 keeps {beside:.0f} bytes a position more, counted {counted['int8'] - counted['nf4']:.0f}")
    assert beside > 3 * measured["nf4"], "bitsandbytes lets checkpointing work now: count less"
    assert counted["int8"] - counted["nf4"] == pytest.approx(beside, rel=0.01)


@pytest.mark.parametrize(("dropout", "targets"), [(0.0, "[q_proj]"), (0.1, "all-linear")])
def test_what_a_layer_keeps_without_checkpointing(path: str, tmp_path: Path, dropout: float, targets: str):
    settings = [
        "model.quantisation=int8", "train.precision=bf16", f"model.lora.dropout={dropout}", "model.lora.r=2",
        f"model.lora.target_modules={targets}", "data.packing=none",
    ]  # fmt: skip
    one, three = (write_llama(tmp_path / str(layers), num_hidden_layers=layers, **SHAPE) for layers in (1, 3))
    real = (kept(three, *settings) - kept(one, *settings)) / 2
    config = configure(one, *settings)
    assert config.model.kind == "qlora"
    counted = layer_activations(config, config.model, bases.describe(config.model), bf16=True, device="cpu")
    print(f"{path}, dropout {dropout}, {targets}: counted {counted:.0f}, kept {real:.0f} bytes a position")
    assert counted == pytest.approx(real, rel=0.02)
