"""How a run fails: noted in its folder, and where a GPU's memory does not suffice, with what would take less."""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator

import torch

from llmtrain import ledger, log
from llmtrain.batches import ANY_ROWS, plan_batches
from llmtrain.config import RunConfig
from llmtrain.config.load import Origins
from llmtrain.errors import OutOfMemory, RunFolderError, UserError
from llmtrain.ledger import Event
from llmtrain.rundir import RESTARTED, RunDir
from llmtrain.world import World


@contextlib.contextmanager
def failures_noted(run: RunDir) -> Iterator[None]:
    """Around what rank 0 does with a run that is its own: how that fails goes into the run's log and its events too.

    Whoever starts a run overnight may have no terminal to look at any more.

    Raises:
        RunFolderError: it failed because the run folder is gone.
    """
    try:
        with _missing_folder_named(run):
            yield
    except Exception as error:
        known = isinstance(error, UserError)
        code, message = (error.exit_code, str(error)) if known else (1, f"{type(error).__name__}: {error}")
        log.to_file_alone(f"error: {message}" if known else traceback.format_exc().rstrip())
        with contextlib.suppress(OSError):  # such as the full disk that this is about
            if run.config.exists():  # else what is there is an empty mount point
                ledger.append(run.events, Event(kind="failed", message=f"exit code {code}: {message}"))
        raise


@contextlib.contextmanager
def _missing_folder_named(run: RunDir) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if run.config.exists():
            raise
        raise RunFolderError(
            f"{run.path}: the run folder is gone: was it moved or deleted, or its disk unmounted? Bring it back, then "
            "run the same command again: it goes on from the last checkpoint"
        ) from error


@contextlib.contextmanager
def memory_explained(
    config: RunConfig, origins: Origins, world: World, has_stepped: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Around what fills the memory. Once a step was done the memory did suffice, so that starting again may help, as
    it may where a supervisor has done that (another process may still be leaving the GPU): the error stays a crash,
    and the advice goes with its traceback.

    Raises:
        OutOfMemory: it would happen again.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = advice(config, origins, world.size)
        if has_stepped() or RESTARTED in os.environ:
            error.add_note(words)
            raise
        said = str(error).partition(" If reserved")[0]  # torch's own advice, for those who tune its allocator
        raise OutOfMemory(f"rank {world.rank}, before its first step was done: {said}\n  {words}") from error


def advice(config: RunConfig, origins: Origins, num_ranks: int) -> str:
    """What takes less memory, as settings, the cheapest first."""
    train, strategy = config.train, config.strategy
    micro = plan_batches(config, origins, num_ranks, ANY_ROWS).micro_batch_size
    smaller = max((size for size in range(1, micro // 2 + 1) if micro % size == 0), default=None)
    settings = [
        *([f"train.micro_batch_size={smaller} (now {micro}; the global batch stays)"] if smaller else []),
        *(["train.activation_checkpointing=true"] if not train.activation_checkpointing else []),
    ]
    if config.model.kind != "qlora" and strategy.kind == "ddp" and num_ranks > 1:
        settings.append("strategy.kind=zero2")
    if strategy.kind == "zero2" and strategy.offload_optimizer == "none":
        settings.append("strategy.offload_optimizer=cpu")
    if not settings:
        return "A smaller model, a shorter model.context or more GPUs take less; 'llmtrain plan' counts it"
    return f"Less memory is taken with {', '.join(settings)}; 'llmtrain plan' counts it"
