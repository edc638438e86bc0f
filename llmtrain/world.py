"""The processes of a run: who am I, how many are we, on what device, and how we agree.

The only module that starts process groups. Two exist: the default one moves tensors (NCCL on GPUs, gloo on CPUs), and
`control` (always gloo) moves a few numbers between host processes, so that agreeing on a count or on stopping never
waits for a GPU.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.rendezvous import rendezvous

from llmtrain import devices, gpus, launched
from llmtrain.errors import ConfigError, UserError

_POLL_S = 0.02


@dataclass
class World:
    """One process among `size`. With size 1 no launcher is needed."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    _store: Any = field(default=None, repr=False)
    _control: Any = field(default=None, repr=False)

    @property
    def local_size(self) -> int:
        """Ranks on this machine."""
        return launched.local_num_ranks()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rank0_first(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone and give its result (plain JSON data) to every rank.

        Not a collective: it works before any process group exists, and the others poll a key in the
        store, so `work` may take hours. If `work` raises, every rank leaves with its exit code.
        """
        if self.size == 1:
            return work()
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                self.post(name, {"exit_code": error.exit_code})
                raise
            self.post(name, {"result": result})
            return result
        answer = self.wait_for(name)
        if "exit_code" in answer:
            raise SystemExit(answer["exit_code"])
        return answer["result"]

    def start_groups(self, timeout_s: float, even_alone: bool = False) -> None:
        """Collective. Start the process groups; a single process needs one only if `even_alone`."""
        if self.size == 1:
            if even_alone:
                backend = "nccl" if self.device.type == "cuda" else "gloo"
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
                os.environ.setdefault("LOCAL_RANK", str(self.local_rank))  # DeepSpeed insists on it
            return
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=self._connect(),
            rank=self.rank,
            world_size=self.size,
            timeout=timeout,
            device_id=self.device if self.device.type == "cuda" else None,
        )
        self._control = dist.new_group(backend="gloo", timeout=timeout)

    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """Collective (control group). Element-wise sums over all ranks; does not touch the GPU."""
        if self.size == 1:
            return counts
        totals = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(totals, group=self._control)
        return tuple(totals.tolist())

    def sum_floats(self, values: list[float]) -> list[float]:
        """Collective (control group). Element-wise sums over all ranks, in float64; does not touch the GPU."""
        if self.size == 1:
            return values
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals, group=self._control)
        return totals.tolist()

    def post(self, name: str, message: dict[str, Any]) -> None:
        """Leave a message for other ranks' `wait_for`. From any thread; not a collective. More than one rank only."""
        self._connect().set(f"llmtrain/{name}", json.dumps(message))

    def wait_for(self, name: str) -> dict[str, Any]:
        """The message of that name, once it is there, however long that takes. From any thread."""
        key, store = f"llmtrain/{name}", self._connect()
        while not store.check([key]):  # a rank that died: the launcher ends us
            time.sleep(_POLL_S)
        return json.loads(store.get(key))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _connect(self) -> Any:
        """The launcher's key-value store, shared by all ranks of this start."""
        if self._store is None:
            self._store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=30)))
        return self._store


def find_world(device_setting: str, place: str) -> World:
    """This process's place, from the environment that torchrun (or SLURM's wrapper) sets.

    Args:
        place: where `train.device` was set, for the error.

    Raises:
        ConfigError: the device that was asked for is not there; or srun started several tasks without a launcher.
        RuntimeError: a GPU that SLURM has promised is not there: nothing for a person to write otherwise.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks not in ("0", "1") and not launched.has_rank():
        raise ConfigError(
            [
                f"srun started {tasks} tasks that know nothing of each other: each would train alone, in one folder. "
                "Start one task a node with 'llmtrain run' or torchrun in it, or take 'llmtrain submit'; for a run of "
                "its own in each task set RANK=0 and another run.name there"
            ]
        )
    local_rank = launched.local_rank()
    try:
        device = devices.find(device_setting, f"train.device={device_setting} ({place})")
        if device.type == "cuda":
            device = _own_gpu(local_rank)
    except ConfigError:
        if (why := _lost_by_this_node()) is None:
            raise
        raise RuntimeError(why) from None
    devices.keep_deepspeed_on(device)
    return World(launched.rank(), launched.num_ranks(), local_rank, device)


def _lost_by_this_node() -> str | None:
    """A node of a cluster with a GPU that has failed: its supervisor knows these words (`launcher/keeper/ranks.py`)."""
    promised = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if not promised.isdigit() or torch.version.cuda is None:
        return None
    why = gpus.missing(int(promised))
    return None if why is None else f"a GPU is lost: SLURM promised {promised} on this node, and {why}"


def _own_gpu(local_rank: int) -> torch.device:
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            [
                f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
                f"start at most {torch.cuda.device_count()} processes on it (--nproc_per_node)"
            ]
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
