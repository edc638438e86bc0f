"""Every rank holds the whole model; gradients are summed over the ranks (`buckets.py`).

One process is the same with one rank and no buckets.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain import heartbeat
from llmtrain.config.schema import RunConfig
from llmtrain.data import Batch
from llmtrain.fragments import Fragment, FragmentReader, equal_share
from llmtrain.optim import MOMENTUM, STEPS, build_optimizer, restore_state, saved_state
from llmtrain.strategies.buckets import GradientBuckets
from llmtrain.strategies.forward import allow_graphs, autocast, evaluation_loss, training_mode
from llmtrain.world import World


class DDPStrategy:
    def __init__(self, config: RunConfig, model: nn.Module, world: World, bf16: bool):
        """Collective."""
        self._world, self._bf16 = world, bf16
        self._clip_norm = config.optim.clip_norm
        self._module = model.to(world.device)
        self._named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        gpt: Any = self._module
        matrices = gpt.hidden_matrices() if config.optim.kind == "muon" else ()
        self._optimizer = build_optimizer(
            self._named.values(), config.optim, matrices=matrices, rank=world.rank, size=world.size
        )
        self._forward: Any = self._module
        if config.train.compile:
            allow_graphs()
            self._forward = torch.compile(self._module)
        self._buckets: GradientBuckets | None = None
        if world.size > 1:
            for parameter in self._named.values():  # the same from the same seed, but perhaps not on another CPU
                dist.broadcast(parameter.detach(), src=0)
            self._buckets = GradientBuckets(self._named.values(), config.strategy.bucket_mb)

    def accumulate(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """Collective if `last` (default group, inside backward and after it)."""
        training_mode(self._module)
        if self._buckets is not None:
            self._buckets.expect(last)
        heartbeat.on_to("forward")
        with autocast(self._world.device, self._bf16):
            loss = self._forward(batch.input_ids, batch.targets, batch.documents, batch.positions, batch.learned)
        heartbeat.on_to("backward")
        (loss * scale).backward()
        if self._buckets is not None and last:
            self._buckets.finish()
        return loss.detach()

    def update(self, lr: float) -> Tensor:
        """Collective with Muon (default group, in its step)."""
        if self._buckets is None:
            self._fill_gradients()
        if self._clip_norm is None:  # the norm alone: clipping to infinity would write every gradient once more
            norm = nn.utils.get_total_norm([p.grad for p in self._named.values() if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(self._named.values(), self._clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _fill_gradients(self) -> None:
        """Zeros where no gradient came (LoRA on an expert that no token went to), as buckets have them.

        Else the optimizer would leave the parameter out, and a checkpoint without its moments could not be loaded.
        """
        for parameter in self._named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def loss(self, batch: Batch) -> Tensor:
        return evaluation_loss(self._module, batch, self._world.device, self._bf16)

    def save_state(self) -> list[Fragment]:
        moments: dict[str, Tensor] = {}
        share: list[Fragment] = []
        for name, parameter in self._named.items():
            for kind, tensor in saved_state(self._optimizer, parameter).items():
                if kind == MOMENTUM:  # which this rank alone holds
                    share.append(Fragment(f"{kind}/{name}", 0, tensor.detach().reshape(-1)))
                else:
                    moments[f"{kind}/{name}"] = tensor
        share += equal_share(moments, self._world.rank, self._world.size)
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
