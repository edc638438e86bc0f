"""What the shell's variables would change of a job that is submitted from it."""

import itertools
import os
from typing import Any

_OF_PARAMETERS = {
    "partition": ("PARTITION",), "account": ("ACCOUNT",), "qos": ("QOS",), "constraint": ("CONSTRAINT",),
    "time": ("TIMELIMIT",), "exclusive": ("EXCLUSIVE",), "job_name": ("JOB_NAME",), "cpus_per_task": ("CPUS_PER_GPU",),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
}  # fmt: skip
"""Which SBATCH_ variables beat which of a job's parameters."""
_DECIDED = (
    "REQUEUE", "NO_REQUEUE", "SIGNAL", "ARRAY_INX", "WAIT", "OPEN_MODE", "OUTPUT", "ERROR",
    "GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_SOCKET", "GPUS_PER_TASK",
)  # fmt: skip
"""Of what a script always says; a script that says nothing of GPUs wants none."""
_HOW_TO_REACH_SLURM = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK_SOCKET")


def forget_overrides(parameters: dict[str, Any]) -> None:
    """A variable such as SBATCH_PARTITION beats what a script says: of what is said here none may be left.

    In an allocation (salloc, srun --pty, a job) there are also those of that job, which sbatch hands on to the new one:
    its srun would take them for its own.
    """
    of_given = (found for name, found in _OF_PARAMETERS.items() if parameters[name] is not None)
    extra = [name.upper().replace("-", "_") for name in parameters["additional_parameters"]]
    for variable in (*itertools.chain(*of_given), *extra, *_DECIDED):
        os.environ.pop(f"SBATCH_{variable}", None)
    for name in [name for name in os.environ if name.startswith("SLURM_") and name not in _HOW_TO_REACH_SLURM]:
        del os.environ[name]
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)  # jobs inherit it, and listen to the signal that the script names
