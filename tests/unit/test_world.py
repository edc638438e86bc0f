"""What ranks add up over all of them."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.world import World


def test_sums_over_ranks_keep_what_float32_would_lose(monkeypatch: pytest.MonkeyPatch):
    def as_if_the_other_had_the_same(totals: Tensor, group: object) -> None:
        totals.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", as_if_the_other_had_the_same)
    world = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    assert world.sum_floats([2.0**24 + 1, 0.1]) == [2.0**25 + 2, 0.2]
