"""The command that starts the ranks of one node: the rank itself where there is one, else torchrun.

torchrun restarts its workers after any failure, also after a mistake in the configuration or a full disk, and tells
its caller nothing but 1. So it is used without restarts: every rank leaves its exit code in a file, and what to do is
decided in supervisor.py. Nodes meet at a port that their first one has chosen (`static`): a rank's number does not
depend on which node came first.
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from llmtrain import cpu
from llmtrain.errors import ConfigError
from llmtrain.gpus import driver_problem, num_gpus
from llmtrain.rundir import RESTARTED

ENVIRONMENT = {
    # Without it a killed rank left 5 of 14 restarts hanging in rendezvous (pytorch#135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
_PLACE = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
_PREFIXES = ("TORCHELASTIC_", "PET_")
_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_SHUTDOWN_S = 5
"""For ranks, when torchrun itself is told to end. A stop goes to the ranks themselves, and after one has failed
torchrun waits for 30 s whatever it is told; supervisor.py does not."""


@dataclass(frozen=True)
class Start:
    """What to start."""

    words: list[str]
    """CONFIG and section.key=value, for `python -m llmtrain`."""
    ranks: int
    """On each node."""
    device: str | None = None
    node: int = 0
    num_nodes: int = 1

    @property
    def is_alone(self) -> bool:
        """One rank: there is no torchrun."""
        return self.ranks * self.num_nodes == 1


@dataclass(frozen=True)
class Place:
    """Where the nodes of one start meet, and what this node is called."""

    host: str
    port: int
    own: str


def command(start: Start, place: Place | None, again: bool, scratch: Path) -> list[str]:
    """The process that trains on this node.

    Args:
        place: of several nodes.
        again: never from the beginning, whatever run.resume says.
        scratch: for torchrun's folders; without it torchrun leaves one in /tmp at each start.
    """
    words = [*([f"train.device={start.device}"] if start.device else []), *start.words]
    if again:
        words.append("run.resume=auto")
    if start.is_alone:
        return [sys.executable, "-m", "llmtrain", *words]
    meeting = ["--standalone"]
    if start.num_nodes > 1:
        assert place is not None
        meeting = [
            "--nnodes", str(start.num_nodes), "--node_rank", str(start.node), "--rdzv_backend", "static",
            "--master_addr", place.host, "--master_port", str(place.port), "--local_addr", place.own,
        ]  # fmt: skip
    return [
        sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc_per_node", str(start.ranks),
        "--signals_to_handle", "SIGQUIT", "--max_restarts", "0", "--shutdown_timeout", str(_SHUTDOWN_S),
        "--log-dir", str(scratch), "-m", "llmtrain", "--", *words,
    ]  # fmt: skip


def environment(start: Start, restarted: bool, further: dict[str, str]) -> dict[str, str]:
    """For that process. A rank alone has no place among others, whatever a container or Kubernetes says: torchrun
    would write its own over that. Several share the cores evenly, unless OMP_NUM_THREADS says otherwise.
    """
    kept = {name: value for name, value in os.environ.items() if name != RESTARTED}
    if start.is_alone:
        kept = {name: value for name, value in kept.items() if name not in _PLACE and not name.startswith(_PREFIXES)}
    if start.ranks > 1:
        # torchrun would say 1, and AdamW on offloaded state, say, would use one core of many.
        kept.setdefault("OMP_NUM_THREADS", str(max(1, cpu.usable_cores() // start.ranks)))
    return {**kept, **ENVIRONMENT, **({RESTARTED: "1"} if restarted else {}), **further}


def ignore_stops() -> None:
    """In the new process, before it becomes torchrun: SLURM signals every process of a job, and torchrun would end the
    ranks while they save. They listen themselves.
    """
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)


def ranks_here(gpus: int | None, ranks: int | None) -> tuple[int, str | None]:
    """(ranks, device) from the command line; raises ConfigError where they do not fit this machine."""
    problem = driver_problem() if gpus or (gpus is None and ranks is None) else None
    if problem is not None:  # else a machine full of GPUs would train on its CPU in silence
        raise ConfigError([f"{problem}; mend the driver (often a reboot), or take the CPU: --gpus 0"])
    there = num_gpus()
    if gpus is None and ranks is None:
        return (there, "cuda") if there else (1, None)
    if not gpus:
        return ranks or 1, "cpu"  # named: else one that is not counted here (MPS) would be taken
    if ranks is not None:
        raise ConfigError(["--ranks is for the CPU: with --gpus there is one rank per GPU; leave it out"])
    if gpus > there:
        raise ConfigError([f"--gpus {gpus}: this machine shows {there}; use at most {there}, or --gpus 0 for the CPU"])
    return gpus, "cuda"
