"""Where a checkpoint is scored from disk: `service.score`, with `auto` resolved as things are now."""

from llmtrain import origin
from llmtrain.config.schema import RunConfig
from llmtrain.gpus import memory_used, num_gpus
from llmtrain.rundir import RunDir

_FREE_BYTES = 1e9
"""A GPU on which less is in use is nobody's: some hundred MB belong to the driver, or to a desktop."""


def find(run: RunDir, config: RunConfig, trains: bool, own: str = "") -> str:
    """A device, or "training": nowhere, the figure of the training ranks is taken.

    Args:
        trains: whether training is here: its GPUs are not free, even where it has not put anything on them yet.
        own: where a scoring process of this run computes now; what is in use there is its own.
    """
    if config.service.score != "auto":
        return config.service.score
    started = origin.read(run)
    if started.device == "cpu":
        return "cpu"
    if started.device == "mps":
        return "cpu" if trains else "mps"
    used = origin.gpus_used_here(run) if trains else 0
    for gpu in (f"cuda:{number}" for number in range(used, num_gpus())):
        if gpu == own or _is_free(int(gpu.removeprefix("cuda:"))):
            return gpu
    return "training" if config.model.kind == "qlora" else "cpu"


def _is_free(gpu: int) -> bool:
    """Whether nobody else computes there, as far as the driver tells."""
    used = memory_used(gpu)
    return used is None or used < _FREE_BYTES
