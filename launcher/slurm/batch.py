"""The batch script of a job, as submitit writes it: the same for `submit`, its preview, and the scripts in slurm/."""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster import Profile, SideJob
from launcher.walltime import seconds

_EVER = 1_000_000
"""No limit, where submitit has one: on requeues after time-outs (a job that makes no progress is ended by its
supervisor), and on the jobs of an array that run at once."""


@dataclass(frozen=True)
class JobSpec:
    """A job, before it is submitted."""

    name: str
    """As SLURM shows it."""
    folder: Path
    """Absolute, on the shared file system: script, pickles, output."""
    profile: Profile
    nodes: int = 1
    gpus_per_node: int = 0
    """For training."""
    ranks_per_node: int = 1
    time: str = ""
    """Limit; by default the profile's."""
    after: str = ""
    """Dependency, as sbatch takes it: afterok:123."""
    at_once: int | None = None
    """Of an array: how many of its jobs may run at the same time; None: all."""
    side: SideJob | None = None
    """It does not train: one node, with what the profile says for such jobs."""

    @property
    def partition(self) -> str | None:
        """None for the cluster's default."""
        return (self.side.partition if self.side is not None else None) or self.profile.partition

    @property
    def gpus(self) -> int:
        """On each node, whatever the job does."""
        return self.gpus_per_node if self.side is None else self.side.gpus

    @property
    def limit(self) -> str:
        """Of its time, as it was written."""
        return self.time or (self.side.time if self.side is not None else None) or self.profile.time

    @property
    def minutes(self) -> int:
        limit_s = seconds(self.limit)
        return 525_600 if limit_s is None else math.ceil(limit_s / 60)


def parameters(spec: JobSpec) -> dict[str, Any]:
    """For submitit's executor.

    The script's own output is left to submitit, which joins it to that of the first node (JOB_0_log.out): modules that
    cannot be loaded, srun's errors, SLURM's notes on a time limit then stand where `llmtrain status` and `logs` look.
    """
    profile, side = spec.profile, spec.side
    extra = {name: value or True for name, value in profile.extra.items()}  # "" is an option without a value
    further: dict[str, Any] = {"requeue" if profile.requeue else "no-requeue": True, **extra}
    cpus = _cpus(spec)
    least = profile.nodes_at_least if side is None else None
    elastic = least is not None and least < spec.nodes
    if elastic:
        further["nodes"] = f"{least}-{spec.nodes}"
    if spec.after:
        further["kill-on-invalid-dep"] = "yes"
    if profile.mail_user is not None:
        further |= {"mail-user": profile.mail_user, "mail-type": profile.mail_type}
    return {
        "job_name": spec.name,
        "partition": spec.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "time": spec.minutes,
        "nodes": spec.nodes,
        # With a range of nodes SLURM would take the fewest, for the one task that it counts then: srun says it.
        "ntasks_per_node": None if elastic else 1,
        "cpus_per_task": cpus,
        "gpus_per_node": spec.gpus or None,
        "mem": (side.mem if side is not None else None) or profile.mem,
        "exclusive": True if profile.exclusive and side is None else None,
        "dependency": spec.after or None,
        "array_parallelism": spec.at_once or _EVER,  # submitit's own limit is 256
        "signal_delay_s": profile.signal_s,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": _setup(profile),
        "srun_args": [*(["--ntasks-per-node=1"] if elastic else []), *_srun(profile, cpus)],
        "additional_parameters": further,
    }


def executor(spec: JobSpec) -> Any:
    """submitit's, ready to submit."""
    import submitit

    made = submitit.SlurmExecutor(spec.folder, max_num_timeout=_EVER, python=_python(spec.profile))
    made.update_parameters(**{name: value for name, value in parameters(spec).items() if value is not None})
    # None is not "not given" here: submitit would name its own wckey, which clusters that count them refuse.
    made.parameters["wckey"] = None
    return made


def render(spec: JobSpec, count: int = 1) -> str:
    """The script of a job, or of an array of `count`. Needs no SLURM."""
    payload = f"{_python(spec.profile)} -u -m submitit.core._submit {shlex.quote(str(spec.folder))}"
    return _script(payload, spec, parameters(spec), map_count=count if count > 1 else None)


def render_plain(spec: JobSpec, words: Sequence[str]) -> str:
    """A script for sbatch itself, without submitit: `python -m launcher WORDS` on each node. Needs no SLURM."""
    further = parameters(spec)
    further["additional_parameters"]["output"] = "%x-%j.out"  # beside where a person calls sbatch
    srun = shlex.join(["srun", "--unbuffered", *further.pop("srun_args")])
    # What the script is given becomes settings: sbatch SCRIPT train.steps=100
    payload = f'{srun} {_python(spec.profile)} -u -m launcher {shlex.join(words)} "$@"'
    return _script(payload, spec, further, use_srun=False)


def _script(payload: str, spec: JobSpec, further: dict[str, Any], **how: Any) -> str:
    from submitit.slurm import slurm

    make: Any = vars(slurm)["_make_sbatch_string"]  # it has no public name; a test fails where it moves
    return make(payload, spec.folder, **further, **how)


def _python(profile: Profile) -> str:
    inside = profile.container is not None or profile.venv is not None
    return profile.python or ("python" if inside else shlex.quote(sys.executable))


def _cpus(spec: JobSpec) -> int | None:
    """Of the one task on each node; None leaves it to SLURM."""
    if spec.side is not None:
        return spec.side.cpus
    if spec.profile.cpus_per_node is not None:
        return spec.profile.cpus_per_node
    if spec.profile.cpus_per_gpu is not None and spec.gpus_per_node:
        return spec.profile.cpus_per_gpu * spec.gpus_per_node
    return None


def _setup(profile: Profile) -> list[str]:
    """Shell lines before Python starts."""
    return [
        # Set where sbatch is told --export=NONE, as some sites do for everybody: srun would hand nothing of this on.
        "unset SLURM_EXPORT_ENV",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(profile.environment.items())),
        *(f"module load {shlex.quote(module)}" for module in profile.modules),
        *([f"source {shlex.quote(profile.venv + '/bin/activate')}"] if profile.venv is not None else []),
        *profile.setup,
    ]


def _srun(profile: Profile, cpus: int | None) -> list[str]:
    # Since SLURM 22.05 a step does not inherit --cpus-per-task.
    arguments = [] if cpus is None else [f"--cpus-per-task={cpus}"]
    if profile.container is not None:
        arguments.append(f"--container-image={profile.container}")
        if profile.container_mounts:
            arguments.append(f"--container-mounts={','.join(profile.container_mounts)}")
    return arguments
