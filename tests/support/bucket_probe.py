"""Under torchrun: sums of gradients in buckets, compared with sums that every rank makes by itself.

torchrun --nproc_per_node 3 -m tests.support.bucket_probe
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config import RunConfig
from llmtrain.strategies.buckets import GradientBuckets
from llmtrain.strategies.ddp import DDPStrategy
from llmtrain.world import World, find_world

WIDTH, LAYERS, MICRO_STEPS = 32, 5, 2
KB = 1e-3
"""In MB: a bucket holds a layer's weights, or a few biases."""


class Net(nn.Module):
    """Some layers, a parameter in bf16, one that only rank 1 uses, and one that nobody does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Parameter(torch.randn(7))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16))
        self.of_rank_1 = nn.ParameterList([nn.Parameter(torch.randn(WIDTH))])  # behind the layers

    def forward(self, x: Tensor, rank: int) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        x = x * self.scale.float()
        return (x * self.of_rank_1[0] if rank == 1 else x).sum()


def inputs(rank: int, step: int, micro: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * rank + 10 * step + micro))


def expected(size: int, step: int) -> list[Tensor]:
    """The sums over all ranks, in float64."""
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in Net().parameters()]
    for rank in range(size):
        net = Net()
        for micro in range(MICRO_STEPS):
            net(inputs(rank, step, micro), rank).backward()
        for total, p in zip(sums, net.parameters(), strict=True):
            if p.grad is not None:
                total.add_(p.grad)
    return sums


def main() -> None:
    world = find_world("cpu", "default")
    world.start_groups(60)
    net = Net()
    parameters = list(net.parameters())
    buckets = GradientBuckets(parameters, 4 * KB)
    begun: list[int] = []
    net.layers[0].weight.register_post_accumulate_grad_hook(lambda _: begun.append(len(buckets._sums)))
    for step in range(2):
        for micro in range(MICRO_STEPS):
            last = micro == MICRO_STEPS - 1
            buckets.expect(last)
            net(inputs(world.rank, step, micro), world.rank).backward()
            if last:
                buckets.finish()
        found = [p.grad.clone() for p in parameters if p.grad is not None]  # at once; all of them
        for gradient, total in zip(found, expected(world.size, step), strict=True):
            tolerance = 2e-2 if gradient.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(gradient.double(), total, rtol=tolerance, atol=1e-5)
            same = [torch.empty_like(gradient) for _ in range(world.size)]
            dist.all_gather(same, gradient)
            assert all(torch.equal(other, gradient) for other in same)
        for p in parameters:
            p.grad = None  # as the optimizer does
    # Sums begin before the first layer's gradient is there, in order: others than rank 1 wait for `of_rank_1`.
    early = begun[1::2]
    assert all(sent >= LAYERS if world.rank == 1 else sent == 0 for sent in early), begun
    assert begun[::2] == [0, 0], "sums before the last micro-step"
    check_start(world)
    world.close()


def check_start(world: World) -> None:
    """All ranks begin with the weights of rank 0: the same seed may give others on another CPU."""
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, world.rank)
    DDPStrategy(RunConfig(), layer, world, bf16=False)
    assert not layer.weight.any()


if __name__ == "__main__":
    main()
