"""Training on one rank, where nothing is summed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtrain.config import load_config
from llmtrain.data import make_batch
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
    config, world = load_config(None)[0], find_world("cpu")
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
