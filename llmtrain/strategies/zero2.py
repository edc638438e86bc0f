"""ZeRO-2 (Rajbhandari et al. 2020): every rank holds the weights and 1/R of gradients and optimizer state.

Done by DeepSpeed. Its optimizer flattens the parameters of each group into one buffer and gives every
rank a consecutive piece. `_hp_mapping`, which DeepSpeed keeps at each parameter for its own
`safe_get_...` functions, says which elements of the parameter lie where in this rank's piece: that is
what is saved and loaded here, without ever gathering a parameter's whole state on one rank.

Nothing is compiled when a run starts: the optimizer is torch's own fused AdamW, also where its state is
offloaded to the CPU, and DeepSpeed's shared-memory collectives, which it would build at start-up on
CPUs, are switched off.
"""

import logging
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain import heartbeat
from llmtrain.config.schema import RunConfig, StrategySection
from llmtrain.data import Batch
from llmtrain.errors import ConfigError
from llmtrain.fragments import Fragment, FragmentReader
from llmtrain.optim import MOMENTS, STEPS, build_optimizer
from llmtrain.strategies.forward import allow_graphs, autocast, evaluation_loss, training_mode
from llmtrain.world import World


class ZeRO2Strategy:
    def __init__(self, config: RunConfig, model: nn.Module, world: World, bf16: bool):
        """Collective."""
        self._world, self._bf16 = world, bf16
        self._module = model.to(world.device)
        self._named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        if bf16:
            _compute_in_bf16(self._module, world.device)
        optimizer = build_optimizer(self._named.values(), config.optim, torchs=True)
        self._engine: Any = _import_deepspeed(world).initialize(
            model=self._module,
            optimizer=optimizer,
            config=deepspeed_config(config, self._named.values(), world.device),
            dist_init_required=False,
        )[0]
        self._zero: Any = self._engine.optimizer
        if config.strategy.offload_optimizer == "none":
            # Gradients are added to one flat buffer, as DeepSpeed does for bf16 weights. For fp32 ones it keeps a
            # tensor for each parameter and flattens them at the step: the gradients of this rank twice.
            self._zero._use_compact_grad_partition_buffer = lambda group: True
        if world.device.type == "cpu":
            _gather_in_buckets()
        if config.train.compile:
            allow_graphs()
            self._engine.compile()

    def accumulate(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """Collective (default group, inside backward): each micro-batch's gradients are reduced to their owners."""
        training_mode(self._module)
        heartbeat.on_to("forward")
        loss = self._engine(batch.input_ids, batch.targets, batch.documents, batch.positions, batch.learned)
        heartbeat.on_to("backward")
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def update(self, lr: float) -> Tensor:
        """Collective (default group): the norm, and the weights that each rank has updated.

        Host syncs: DeepSpeed looks whether the gradients are finite. If not it skips the update, and the
        norm returned is infinite.
        """
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._world.device)

    def loss(self, batch: Batch) -> Tensor:
        return evaluation_loss(self._module, batch, self._world.device, self._bf16)

    def save_state(self) -> list[Fragment]:
        share: list[Fragment] = []
        for group, flat in enumerate(self._zero.single_partition_of_fp32_groups):
            state = self._zero.optimizer.state[flat]
            for name, start, here in self._pieces(group):
                share += [Fragment(f"{kind}/{name}", start, state[kind].detach()[here]) for kind in MOMENTS]
            if group == 0 and self._world.is_main:
                share.append(Fragment(STEPS, 0, state["step"].detach().reshape(1)))
        return share

    def load_state(self, saved: FragmentReader) -> None:
        steps = saved.read(STEPS, 0, 1)[0]
        for group, flat in enumerate(self._zero.single_partition_of_fp32_groups):
            state = self._zero.optimizer.state[flat]
            state["step"] = steps.to(flat.device, copy=True)
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(flat)
                for name, start, here in self._pieces(group):
                    state[kind][here] = saved.read(f"{kind}/{name}", start, start + here.stop - here.start)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._named.items()}

    def _pieces(self, group: int) -> list[tuple[str, int, slice]]:
        """Which elements this rank owns: parameter, first element in it, and their place in the flat piece."""
        names = {parameter: name for name, parameter in self._named.items()}
        pieces: list[tuple[str, int, slice]] = []
        for parameter in self._zero.bit16_groups[group]:
            mapping = parameter._hp_mapping
            if mapping is not None:
                mine, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                pieces.append((names[parameter], mine.start, slice(flat.start, flat.start + flat.numel)))
        return pieces


def deepspeed_config(config: RunConfig, parameters: Iterable[Tensor], device: torch.device) -> dict[str, Any]:
    """What DeepSpeed is told of a model with these parameters; nobody writes this by hand.

    Its gradient accumulation is off: the loop says when a step is complete.
    """
    strategy = config.strategy
    bucket = _bucket_elements(strategy)
    if device.type == "cuda":
        # A gradient that is larger than a bucket is summed where it lies, on another stream, and freed before that is
        # done: each has to find room in one.
        bucket = max(bucket, *((p.numel() + 1) // 2 * 2 for p in parameters))
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and used for nothing but its throughput timer
        "gradient_accumulation_steps": 1,
        "gradient_allreduce_op": "sum",
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            # With it gradients travel in a copy of their bucket and are copied back, without as they lie: every rank
            # gets all of them either way, and keeps its own.
            "reduce_scatter": False,
            "overlap_comm": strategy.overlap,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "offload_optimizer": {"device": strategy.offload_optimizer, "pin_memory": torch.cuda.is_available()},
        },
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU in every forward pass
    }


def _compute_in_bf16(module: nn.Module, device: torch.device) -> None:
    """Autocast, entered inside of DeepSpeed's forward pass: on a GPU it switches off what was entered around it."""
    forward = module.forward

    def in_bf16(*inputs: Any) -> Any:
        with autocast(device, bf16=True):
            return forward(*inputs)

    module.forward = in_bf16


def _gather_in_buckets() -> None:
    """On CPUs, gather the updated weights bucket by bucket.

    DeepSpeed gathers all at once, which is right for NCCL. gloo makes a second copy of what it gathers: a
    copy of the whole model, at the very peak of memory.
    """
    import deepspeed.comm.comm

    deepspeed.comm.comm.cdb.all_gather_function = None  # private, like the other names


def _bucket_elements(strategy: StrategySection) -> int:
    """fp32 gradients; an even number, which DeepSpeed wants."""
    return max(2, int(strategy.bucket_mb * 1e6 / 4) // 2 * 2)


def _ask_torch_for_free_memory() -> None:
    """Instead of the driver, where GPUs are visible by names (GPU-..., MIG-...): DeepSpeed takes them for numbers."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    if not all(name.strip().isdecimal() for name in visible):
        from deepspeed.accelerator import cuda_accelerator

        cuda_accelerator.pynvml = None  # private; tests/unit/test_gpus.py fails where it has moved


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, quiet, and told not to build its collectives for CPUs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError as error:
        raise ConfigError(
            [
                f"strategy.kind=zero2 needs DeepSpeed, which cannot be imported here ({error}); "
                "pip install deepspeed==0.19.8, or use strategy.kind=ddp"
            ]
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On GPUs it gathers by a name that torch has changed since: said by each rank, at its first step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    _ask_torch_for_free_memory()
    if world.device.type == "cpu":
        # A private name (deepspeed is pinned; tests/multiprocess/test_zero2.py fails where it has moved): without
        # this, initialize() runs a C++ compiler for half a minute, and fails where there is none.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        raise RuntimeError("ZeRO-2 needs a process group, on one rank too")
    return deepspeed
