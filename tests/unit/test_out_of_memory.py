"""Where a GPU's memory does not suffice: what is said, and when starting again may help."""

import pytest
import torch

from llmtrain.config import load_config
from llmtrain.errors import OutOfMemory, is_for_a_person
from llmtrain.out_of_memory import advice, explained
from llmtrain.rundir import RESTARTED
from llmtrain.world import World

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 10 MiB free. If reserved but unallocated memory is large"
)


def exhaust(has_stepped: bool) -> None:
    with explained(*load_config(None), World(0, 1, 0, torch.device("cpu")), lambda: has_stepped):
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
