"""A cluster's profile: what SLURM there has to be told, and what its nodes need before Python starts.

One YAML file per cluster (configs/clusters/), for all runs. `llmtrain doctor --cluster` drafts one from sinfo.
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from launcher import walltime
from llmtrain import access_tokens
from llmtrain.config.load import load_section
from llmtrain.config.section import MEMORY, WORD, Section

_SECRET_NAME = re.compile(r"(TOKEN|SECRET|KEY|PASSWORD)(?![A-Z])", re.IGNORECASE)
"""HF_TOKEN, but not TOKENIZERS_PARALLELISM."""
_LOGIN = "log in to the Hub instead ('hf auth login', once): jobs find that login, and no file or script shows it"
_OWN = {
    "gpus-per-node": "gpus_per_node", "cpus-per-gpu": "cpus_per_gpu", "mail-user": "mail_user",
    "mail-type": "mail_type", "gres": "gpus_per_node", "signal": "signal_s", "no-requeue": "requeue",
    **{name: name for name in ("partition", "account", "qos", "constraint", "time", "mem", "exclusive", "requeue")},
}  # fmt: skip
_DECIDED = (
    "nodes", "ntasks", "ntasks-per-node", "job-name", "output", "error", "open-mode", "array", "dependency", "chdir",
    "parsable", "quiet", "wait", "test-only",
)  # fmt: skip


def _number_as_text(value: Any) -> Any:
    """`mem: 0` and `OMP_NUM_THREADS: 4` are numbers in YAML."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _is_limit(text: str) -> str:
    walltime.seconds(text)
    return text


def _holds_no_secret(text: str) -> str:
    if access_tokens.found_in(text):
        raise ValueError(f"looks like an access token; {_LOGIN}")
    return text


def _expanded(text: str) -> str:
    """With ~ and variables filled in, as they are where the job is submitted: in a script they stand in quotes."""
    return os.path.expandvars(f"{Path.home()}{text[1:]}" if text == "~" or text.startswith("~/") else text)


def _is_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError("is no name for a variable: letters, digits and _ only")
    if _SECRET_NAME.search(name) and not name.upper().endswith(("_PATH", "_FILE", "_DIR")):
        raise ValueError(f"looks like the name of a secret; {_LOGIN}")
    return name


def _is_option(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError("is no option of sbatch: write it without dashes in front, e.g. 'reservation: maintenance'")
    if name in _OWN:
        raise ValueError(f"has a key of its own in a profile: {_OWN[name]}")
    if name in _DECIDED:
        raise ValueError("is decided by 'llmtrain submit'; leave it out")
    return name


Word = Annotated[str, Field(pattern=WORD)]
Line = Annotated[str, Field(pattern=r"^[^\n]+$"), AfterValidator(_holds_no_secret)]
Location = Annotated[Line, AfterValidator(_expanded)]
Value = Annotated[str, BeforeValidator(_number_as_text), Field(pattern=r"^[^\n]*$"), AfterValidator(_holds_no_secret)]
Limit = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_is_limit)]
Memory = Annotated[str, BeforeValidator(_number_as_text), Field(pattern=MEMORY)]
Variable = Annotated[str, AfterValidator(_is_variable)]
Option = Annotated[str, AfterValidator(_is_option)]


class SideJob(Section):
    """A job beside training: the checkpoint service, or sharding. What is not said here is as for training."""

    partition: Word | None = None
    """By default the profile's partition."""
    cpus: Annotated[int, Field(ge=1)] = 4
    """CPUs of one such job."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of one such job; 0 for CPUs alone."""
    time: Limit | None = None
    """Time limit; by default the profile's."""
    mem: Memory | None = None
    """Memory, e.g. 32G; "0" for all of a node; null for what the cluster gives by itself."""


class Profile(Section):
    """How to ask one cluster for machines. Of all keys only `gpus_per_node` has no default."""

    name: str = ""
    """By default the file's name without .yaml."""
    partition: Word | None = None
    """Where jobs queue; null for the cluster's default."""
    account: Word | None = None
    """Who pays."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that nodes must have, as sbatch takes them, e.g. "a100&nvlink"."""
    time: Limit = "24:00:00"
    """Time limit of a job ("24:00:00", "2-12:00:00", or minutes). Longer runs save before it and requeue."""
    gpus_per_node: Annotated[int, Field(ge=0)]
    """How many GPUs a node has; 0 for a cluster of CPUs."""
    gpu_memory_gb: Annotated[float | None, Field(gt=0)] = None
    """Memory of one GPU, for `llmtrain plan`: SLURM does not tell."""
    cpus_per_gpu: Annotated[int | None, Field(ge=1)] = None
    """CPUs for each GPU that is asked for; null for what the cluster gives by itself."""
    cpus_per_node: Annotated[int | None, Field(ge=1)] = None
    """CPUs for a job on each of its nodes, shared by its ranks; in place of cpus_per_gpu."""
    mem: Memory | None = None
    """Memory on each node, e.g. 64G; "0" for all of it; null for what the cluster gives by itself."""
    nodes_at_least: Annotated[int | None, Field(ge=1)] = None
    """A job that was submitted with more nodes may start again on as few as these; null: only on as many."""
    exclusive: bool = False
    """Whole nodes, shared with nobody."""
    signal_s: Annotated[int, Field(ge=30)] = 120
    """At the latest so long before the time limit a job saves and queues again. SLURM is up to a minute late."""
    requeue: bool = True
    """Requeue after a preemption, a time limit or a node's failure, and resume."""
    mail_user: Word | None = None
    """Address for SLURM's mails; null for none."""
    mail_type: Word = "END,FAIL"
    """When to send one (sbatch --mail-type)."""
    modules: list[Word] = []
    """Environment modules to load, in order."""
    venv: Location | None = None
    """A virtual environment to activate, which all nodes see. In paths ~ and $VARIABLES are filled in."""
    container: Location | None = None
    """Image to run in (`srun --container-image`, which Pyxis and others give)."""
    container_mounts: list[Location] = []
    """Folders that the container sees, "outside:inside"."""
    python: Location | None = None
    """The Python that runs; by default `python` of the venv or the container, else the one that submits."""
    environment: dict[Variable, Value] = {}
    """Variables of the job. Access tokens are refused: the Hub's own login is used."""
    shared: list[Location] = []
    """Folders that all nodes see, e.g. /scratch/$USER; run folders and shards must lie below one of them. Without any,
    the kind of file system decides."""
    setup: list[Line] = []
    """Lines of shell that run on each job's first node before Python starts, after modules and venv."""
    extra: dict[Option, Value] = {}
    """Further options of sbatch, e.g. `reservation: maintenance`; "" for one without a value."""
    service: SideJob = SideJob()
    """The checkpoint service's job (--service-job)."""
    shard: SideJob = SideJob()
    """Jobs of `llmtrain shard --submit`."""

    @field_validator("shared")
    @classmethod
    def _from_the_root(cls, shared: list[str]) -> list[str]:
        for folder in shared:
            if not Path(folder).is_absolute():
                raise ValueError(f"{folder!r} must start at the root: nodes do not know where you stand")
        return shared

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> Self:
        if self.container_mounts and self.container is None:
            raise ValueError("container_mounts needs a container")
        if self.cpus_per_gpu is not None and self.cpus_per_node is not None:
            raise ValueError("cpus_per_gpu and cpus_per_node are both set; keep one")
        if self.cpus_per_gpu is not None and not self.gpus_per_node:
            raise ValueError("cpus_per_gpu needs GPUs: with gpus_per_node: 0 set cpus_per_node")
        if self.time_s is not None and self.signal_s >= self.time_s:
            raise ValueError(f"signal_s={self.signal_s} must be shorter than the time limit ({self.time})")
        return self

    @property
    def time_s(self) -> float | None:
        """The time limit in seconds; None without one."""
        return walltime.seconds(self.time)

    @property
    def mem_bytes(self) -> float | None:
        """`mem`; None where it says "all", or nothing."""
        mem = self.mem or "0"
        unit = mem[-1].upper() if mem[-1].isalpha() else "M"
        return int(mem.rstrip("KMGTkmgt")) * 1024.0 ** ("KMGT".index(unit) + 1) or None

    def shared_folders(self) -> list[Path]:
        return [Path(folder) for folder in self.shared]

    def python_command(self) -> list[str]:
        """What starts Python on the nodes, outside a container."""
        if self.python is not None:
            return shlex.split(self.python)
        return [sys.executable] if self.venv is None else [f"{self.venv}/bin/python"]


def load_profile(path: str | Path) -> Profile:
    """The profile in a YAML file.

    Raises:
        ConfigError: lists everything that is wrong, each with its place and what is allowed.
    """
    profile, _ = load_section(Profile, path)
    return profile if profile.name else profile.model_copy(update={"name": Path(path).stem})
