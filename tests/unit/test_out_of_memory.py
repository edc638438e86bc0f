"""Where a GPU's memory does not suffice: what is said, and when starting again may help."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config import load_config
from llmtrain.errors import ModelError, OutOfMemory, is_for_a_person
from llmtrain.failures import advice, memory_explained
from llmtrain.models import base as bases
from llmtrain.rundir import RESTARTED
from llmtrain.world import World
from tests.support.bases import write_llama

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 10 MiB free. If reserved but unallocated memory is large"
)


def exhaust(has_stepped: bool) -> None:
    with memory_explained(*load_config(None), World(0, 1, 0, torch.device("cpu")), lambda: has_stepped):
        raise torch.OutOfMemoryError(SAID)


def test_before_the_first_step_it_is_for_a_person(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(RESTARTED, raising=False)
    with pytest.raises(OutOfMemory, match=r"GPU 0 has 10 MiB free\.\n  Less memory is taken with train") as caught:
        exhaust(has_stepped=False)
    assert is_for_a_person(caught.value.exit_code)


@pytest.mark.parametrize("has_stepped", [False, True])
def test_later_and_after_a_restart_it_is_a_crash_with_the_same_advice(
    monkeypatch: pytest.MonkeyPatch, has_stepped: bool
):
    if has_stepped:
        monkeypatch.delenv(RESTARTED, raising=False)
    else:
        monkeypatch.setenv(RESTARTED, "1")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        exhaust(has_stepped)
    assert "Less memory is taken with" in caught.value.__notes__[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def load_where(llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, quantising: bool) -> None:
    """Load a base on a GPU that answers with this error."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    if quantising:
        monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fail)
    else:
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    config, origins = load_config(None, ["model.kind=qlora", f"model.base={llama}", "model.context=64"])
    assert config.model.kind == "qlora"
    with memory_explained(config, origins, World(0, 1, 0, torch.device("cpu"))):
        bases.load(config.model, torch.float32, torch.device("cpu"), "nf4" if quantising else "none")


@pytest.mark.parametrize("quantising", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(SAID), RuntimeError("CUDA driver error: out of memory")])
def test_a_base_too_large_for_the_gpu_is_no_base_that_cannot_be_loaded(
    llama: Path, monkeypatch: pytest.MonkeyPatch, quantising: bool, error: Exception
):
    monkeypatch.delenv(RESTARTED, raising=False)
    with pytest.raises(OutOfMemory, match="Less memory is taken with train"):
        load_where(llama, monkeypatch, error, quantising)
    monkeypatch.setenv(RESTARTED, "1")  # the GPU may still hold what is leaving it
    with pytest.raises(torch.OutOfMemoryError):
        load_where(llama, monkeypatch, error, quantising)


@pytest.mark.parametrize("quantising", [False, True])
def test_a_gpu_that_fails_while_a_base_is_loaded_is_a_crash(
    llama: Path, monkeypatch: pytest.MonkeyPatch, quantising: bool
):
    with pytest.raises(torch.AcceleratorError, match="busy"):
        load_where(llama, monkeypatch, torch.AcceleratorError("CUDA error: the device is busy"), quantising)
    for error in (ValueError("odd"), RuntimeError("of the base")):
        with pytest.raises(ModelError, match="cannot be loaded: "):
            load_where(llama, monkeypatch, error, quantising)


MICRO_4 = "train.micro_batch_size=4 (now 8; the global batch stays)"
MICRO_3 = "train.micro_batch_size=3 (now 9; the global batch stays)"
RECOMPUTE = "train.activation_checkpointing=true"
ONE = "train.micro_batch_size=1"


@pytest.mark.parametrize(
    ("settings", "ranks", "proposed"),
    [
        (["train.micro_batch_size=8"], 1, [MICRO_4, RECOMPUTE]),
        (["train.micro_batch_size=9"], 4, [MICRO_3, RECOMPUTE, "strategy.kind=zero2"]),
        ([ONE, RECOMPUTE], 4, ["strategy.kind=zero2"]),
        ([ONE, "strategy.kind=zero2"], 4, [RECOMPUTE, "strategy.offload_optimizer=cpu"]),
        (["train.micro_batch_size=9", "model.kind=qlora", "model.base=x/y"], 4, [MICRO_3, RECOMPUTE]),
    ],
)
def test_what_is_proposed(settings: list[str], ranks: int, proposed: list[str]):
    config, origins = load_config(None, ["train.global_batch_size=72", *settings])
    assert (
        advice(config, origins, ranks) == f"Less memory is taken with {', '.join(proposed)}; 'llmtrain plan' counts it"
    )


def test_where_nothing_is_left_to_propose():
    config, origins = load_config(None, [ONE, RECOMPUTE])
    assert "a shorter model.context or more GPUs" in advice(config, origins, 1)
