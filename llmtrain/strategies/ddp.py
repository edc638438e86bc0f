"""Every rank holds the whole model; gradients are averaged (torch's DistributedDataParallel).

One process is the same with one rank and no wrapper.
"""

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmtrain import heartbeat
from llmtrain.config.schema import RunConfig
from llmtrain.data import IGNORE, Batch
from llmtrain.fragments import Fragment, FragmentReader, equal_share
from llmtrain.optim import STEPS, build_optimizer, restore_state, saved_state
from llmtrain.strategies.forward import autocast, evaluation_loss, training_mode
from llmtrain.world import World

_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # the second was its name before torch 2.13
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class DDPStrategy:
    def __init__(self, config: RunConfig, model: nn.Module, world: World, bf16: bool):
        """Collective."""
        self._world, self._bf16 = world, bf16
        self._clip_norm = config.optim.clip_norm
        self._accumulates = False
        self._module = model.to(world.device)
        self._named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        frozen = len(self._named) < sum(1 for _ in self._module.parameters())
        self._optimizer = build_optimizer(self._named.items(), config.optim)
        self._forward: Any = torch.compile(self._module) if config.train.compile else self._module
        if world.size > 1:
            named: dict[str, Any] = {_SYNC_BUFFERS: False}
            self._forward = DistributedDataParallel(
                self._forward,
                bucket_cap_mb=config.strategy.bucket_mb,
                gradient_as_bucket_view=True,
                init_sync=not frozen,  # each rank has loaded the same base: no gigabytes are sent
                **named,
            )
            self._settle_buckets(config.model.context)

    def _settle_buckets(self, context: int) -> None:
        """Collective. One backward pass on a dummy row, thrown away.

        DDP sorts its buckets anew after its first backward pass, and with more than two ranks the
        place of a gradient in its bucket decides the order in which the ranks' values are added. A
        resumed run would take its first step with the unsorted buckets and differ in the last bit.
        It also finds a lack of memory before the first step.
        """
        dummy = torch.zeros(1, context, dtype=torch.int64, device=self._world.device)
        batch = Batch(dummy, torch.full_like(dummy, IGNORE), None, None, 0)
        with torch.random.fork_rng():
            for _ in range(2):  # the second forward pass is where DDP applies the new order
                self.accumulate(batch, 1.0, last=True)
        self._optimizer.zero_grad(set_to_none=False)

    def accumulate(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """Collective if `last` (default group, inside backward)."""
        training_mode(self._module)
        self._accumulates |= not last
        if last and not self._accumulates:
            # DDP multiplies by 1/R what it copies into its buckets, but divides by R what lies there already, as it
            # does after _settle_buckets: with three ranks the first step after a start would differ in the last bit.
            self._optimizer.zero_grad(set_to_none=True)
        wait = contextlib.nullcontext() if last or self._world.size == 1 else self._forward.no_sync()
        with wait:
            heartbeat.on_to("forward")
            with autocast(self._world.device, self._bf16):
                loss = self._forward(batch.input_ids, batch.targets, batch.doc_ids, batch.positions)
            heartbeat.on_to("backward")
            # DDP divides by the number of ranks; the sum over ranks is wanted.
            (loss * (scale * self._world.size)).backward()
        return loss.detach()

    def update(self, lr: float) -> Tensor:
        if self._clip_norm is None:  # the norm alone: clipping to infinity would write every gradient once more
            norm = nn.utils.get_total_norm([p.grad for p in self._named.values() if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(self._named.values(), self._clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        # Emptied gradients lie outside DDP's buckets until the last micro-step copies them there: twice the
        # memory. Zeroed ones stay views of the buckets, at the price of writing zeros.
        self._optimizer.zero_grad(set_to_none=self._world.size == 1 or not self._accumulates)
        return norm

    def loss(self, batch: Batch) -> Tensor:
        return evaluation_loss(self._module, batch, self._world.device, self._bf16)

    def save_state(self) -> list[Fragment]:
        moments = {
            f"{kind}/{name}": tensor
            for name, parameter in self._named.items()
            for kind, tensor in saved_state(self._optimizer, parameter).items()
        }
        share = list(equal_share(moments, self._world.rank, self._world.size))
        if self._world.is_main:  # the same number for every parameter
            steps = torch.as_tensor(next(iter(self._optimizer.state.values()))["step"], dtype=torch.float32)
            share.append(Fragment(STEPS, 0, steps.detach().reshape(1)))
        return share

    def load_state(self, saved: FragmentReader) -> None:
        steps = saved.read(STEPS, 0, 1)[0]
        for name, parameter in self._named.items():
            restore_state(
                self._optimizer,
                parameter,
                lambda kind, count, name=name: saved.read(f"{kind}/{name}", 0, count),
                steps,
            )

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._named.items()}
