"""What torchrun, or whoever sets the same variables, says of this process: which of a run's ranks it is.

The only module that reads these variables (RANK, WORLD_SIZE, ...); without torch, which --help must not wait for.
"""

import os


def has_rank() -> bool:
    """Whether somebody has said which rank this is; alone it is the first of one."""
    return "RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Its number on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_num_ranks() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_below_torchrun() -> bool:
    """WORLD_SIZE is no sign of it: containers and Kubernetes set that too, also for one process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
