"""Training on one rank, where nothing is summed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtrain.config import load_config
from llmtrain.data import Batch, make_batch
from llmtrain.fragments import FragmentReader
from llmtrain.shards import Rows
from llmtrain.strategies.ddp import DDPStrategy
from llmtrain.world import find_world


class Net(nn.Module):
    """A weight that the loss needs and one that it never reaches, as LoRA on a part of a base that text has no use
    for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 2))

    def forward(self, input_ids: Tensor, *_: Any) -> Tensor:
        return (self.used * input_ids.sum()).square().sum()


def test_a_weight_that_no_gradient_reaches_does_not_spoil_the_checkpoint(tmp_path: Path):
    config, world = load_config(None)[0], find_world("cpu", "default")
    strategy = DDPStrategy(config, Net(), world, bf16=False)
    batch = make_batch(Rows(np.ones((2, 4), np.uint16), [np.array([4], np.int32)] * 2, None), isolate_documents=False)
    strategy.accumulate(batch, 1.0, last=True)
    strategy.update(1e-3)
    save_file(
        {fragment.name: fragment.values.contiguous() for fragment in strategy.save_state()},
        tmp_path / "optimizer-00000-of-00001.safetensors",
    )
    resumed = DDPStrategy(config, Net(), world, bf16=False)
    resumed.load_state(FragmentReader(tmp_path))
    states = [each.save_state() for each in (strategy, resumed)]
    assert [fragment.key for fragment in states[0]] == [fragment.key for fragment in states[1]]
    for before, after in zip(*states, strict=True):
        assert torch.equal(before.values, after.values)


@pytest.mark.parametrize("clip_norm", ["1.0", "0.25", "1e6", "null"])
def test_the_gradients_of_all_micro_batches_are_clipped_together(clip_norm: str):
    """The norm is the one before; nothing is left for the next step."""
    settings = [f"optim.clip_norm={clip_norm}", "optim.betas=[0.0, 0.99]"]
    strategy = DDPStrategy(load_config(None, settings)[0], Net(), find_world("cpu", "default"), bf16=False)
    used = strategy._named["used"]
    limit = float("inf") if clip_norm == "null" else float(clip_norm)
    for _ in range(2):
        gradient = 0.5 * 2 * used.detach() * (4**2 + 8**2)  # of (used * sum)^2, for both batches
        for ids in (torch.ones(1, 4), torch.full((1, 4), 2.0)):
            strategy.accumulate(Batch(ids, ids, None, None, 4), 0.5, last=ids[0, 0] == 2)
        norm = strategy.update(1e-3)
        assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-5)
        taken = strategy._optimizer.state[used]["exp_avg"]  # without a first moment: the gradient as it was used
        assert taken.norm().item() == pytest.approx(min(limit, norm.item()), rel=1e-4)
