"""Before a job is queued: all that can be known to fail, in one report.

A queue is slow to tell: a job may wait for hours, and then find no shards, no room, or a torch without CUDA. Here
nothing is queued and nothing is changed, with one exception: where `hub.repo` is set, the repository is made if it is
not there, which is how the right to write is found out.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher import display
from launcher.checks import environment
from launcher.checks.places import can_write, check_reach, nearest_existing
from launcher.findings import Finding, doubtful, fine, wrong
from launcher.planning import forecast
from launcher.planning.sizes import find_sizes
from launcher.sharding.sources import list_units
from launcher.sharding.work import check_folder
from launcher.slurm import client
from launcher.slurm.batch import JobSpec
from launcher.slurm.limits import check_limits
from launcher.slurm.partitions import partitions
from llmtrain import locks, model_files, recipe, resume, shards
from llmtrain.batches import ANY_ROWS, BatchPlan, nodes_that_train, plan_batches
from llmtrain.config.data_sections import Source
from llmtrain.config.load import Origins, resolved_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, ModelError, SlurmError, UserError
from llmtrain.rundir import RunDir
from llmtrain.shards import ShardManifest

_HUB_S = 60.0
_NO_PROGRESS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def check(configs: Sequence[RunConfig], origins: Origins, spec: JobSpec, script: str) -> list[Finding]:
    """Everything that was looked at, in the order in which a person would.

    Args:
        configs: of one run, or of each run of a sweep.
        script: what would be given to sbatch.
    """
    found = [*check_queue(spec, script)]
    for config in configs:
        found += check_run(config, origins, spec)
    found += check_python(configs[0], spec)
    for config in configs:
        found += check_hub(config, RunDir(config.run.folder))
    return list(dict.fromkeys(found))  # runs of a sweep have most in common


def check_queue(spec: JobSpec, script: str) -> list[Finding]:
    """What SLURM says of a job, of any kind."""
    if not client.is_here():
        return [wrong("SLURM", "sbatch: not found; is this a login node of a SLURM cluster?")]
    try:
        found = check_limits(spec, partitions())
    except SlurmError as error:
        return [wrong("SLURM", str(error))]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.sbatch"
        file.write_text(script, encoding="utf-8")
        try:
            client.call(["sbatch", "--test-only", str(file)])
        except SlurmError as error:
            # It also refuses what would only have to wait: nodes that are down at the moment.
            waits = any(finding.what == "nodes" and finding.severity == "warning" for finding in found)
            return [*found, Finding("sbatch", str(error), "warning" if waits else "error")]
    return [*found, fine("sbatch", "takes the script (--test-only)")]


def check_side(name: str, spec: JobSpec, script: str) -> list[Finding]:
    """A job beside training: the same of SLURM, under its name."""
    return [replace(found, what=f"{name}: {found.what}") for found in check_queue(spec, script)]


def check_shard_job(config: RunConfig, spec: JobSpec, script: str) -> list[Finding]:
    """What building shards in jobs of its own needs."""
    data, built = _check_data(config, spec, builds=True)
    if built is not None:
        data.append(doubtful("shards", "they are built already: the jobs find nothing to do"))
    return [*check_queue(spec, script), *data, *check_python(None, spec)]


def check_run(config: RunConfig, origins: Origins, spec: JobSpec) -> list[Finding]:
    """What is each run's own: its data, its batch, its folder."""
    run = RunDir(config.run.folder)
    data, built = _check_data(config, spec)
    batch, plan = _check_batch(config, origins, spec, built)
    try:
        folder = [*_check_folder(config, origins, run, spec), *_check_disk(config, run, plan, built)]
    except OSError as error:
        folder = [_unreadable("run folder", error, run.path)]
    return [*data, *batch, *folder]


def _check_data(config: RunConfig, spec: JobSpec, builds: bool = False) -> tuple[list[Finding], ShardManifest | None]:
    """Finished shards, or what they would be built from: by this job, by one before it, or by training itself."""
    folder = recipe.shard_folder(config)
    shared = spec.profile.shared_folders()
    try:
        if shards.exists(folder):
            opened = recipe.open_shards(config, "size")
            for split in opened.manifest.splits.values():
                for shard in split.shards:
                    with (folder / shard.file).open("rb") as file:
                        file.read(1)
            return [check_reach("shards", folder, shared, spec.nodes)], opened.manifest
    except UserError as error:
        return [wrong("shards", str(error))], None
    except OSError as error:
        return [_unreadable("shards", error, folder)], None
    return _check_build(config, spec, builds), None


def _check_build(config: RunConfig, spec: JobSpec, builds: bool) -> list[Finding]:
    """Shards that are still to be built: from what, and in which folder."""
    folder = recipe.shard_folder(config)
    shared = spec.profile.shared_folders()
    refused: list[Finding] = []
    try:
        try:
            check_folder(config)
        except ConfigError as error:
            refused += [wrong("shards", problem) for problem in error.problems]
        # To list a data set of the Hub is to download it.
        read: list[Source] = [source for source in config.data.sources if source.kind != "huggingface"]
        size = sum(unit.size_bytes for unit in list_units(read, config.data.format))
    except UserError as error:
        return [*refused, wrong("shards", str(error))]
    except OSError as error:
        return [*refused, _unreadable("shards", error, folder)]
    if not can_write(folder):
        refused.append(wrong("shards", f"{folder} is not there, and may not be made by you"))
    if refused:
        return refused
    none_yet = f"none yet in {folder}; their sources have {display.size(size)}"
    if builds:
        state = fine("shards", none_yet)
    elif spec.after:
        state = fine("shards", f"{none_yet}; this job waits for another ({spec.after}) that may build them")
    else:
        advice = "the job builds them first; 'llmtrain shard --submit' does it beforehand"
        state = doubtful("shards", f"{none_yet}: {advice}")
    return [
        state,
        check_reach("shards", folder, shared, spec.nodes),
        *_check_sources(config, shared, spec.nodes),
    ]


def _unreadable(what: str, error: OSError, folder: Path) -> Finding:
    return wrong(what, f"{error.filename or folder}: cannot be read ({error.strerror})")


def _check_sources(config: RunConfig, shared: list[Path], nodes: int) -> list[Finding]:
    """Of each pattern the folder in which its files lie."""
    patterns = [path for source in config.data.sources for path in getattr(source, "paths", [])]
    folders = dict.fromkeys(nearest_existing(Path(pattern.split("*")[0].split("?")[0])) for pattern in patterns)
    found = [check_reach("sources", folder, shared, nodes) for folder in folders]
    return [finding for finding in found if finding.severity != "ok"]


def _check_batch(
    config: RunConfig, origins: Origins, spec: JobSpec, built: ShardManifest | None
) -> tuple[list[Finding], BatchPlan | None]:
    ranks = spec.nodes * spec.ranks_per_node
    try:
        plan = plan_batches(config, origins, ranks, built.splits["train"].rows if built else ANY_ROWS)
    except ConfigError as error:
        return [wrong("batch", problem) for problem in error.problems], None
    except UserError as error:
        return [wrong("batch", str(error))], None
    message = f"{plan.global_batch_size} rows = {ranks} ranks x {plan.micro_batch_size} x {plan.accumulation}"
    least = spec.profile.nodes_at_least or spec.nodes
    idle = {n: n - nodes_that_train(plan.global_batch_size, spec.ranks_per_node, n) for n in range(least, spec.nodes)}
    if any(idle.values()):
        message += "; where SLURM gives "
        message += ", ".join(f"{n} nodes {number} of them waits" for n, number in idle.items() if number)
    return [fine("batch", message)], plan


def _check_folder(config: RunConfig, origins: Origins, run: RunDir, spec: JobSpec) -> list[Finding]:
    found = [check_reach("run folder", run.path, spec.profile.shared_folders(), spec.nodes)]
    if not can_write(run.path):
        found.append(wrong("run folder", f"you may not write to {nearest_existing(run.path)}"))
    elif (why := locks.why_none(nearest_existing(run.path))) is not None:
        lacks = f"the file system of {run.path} has no locks ({why}; Lustre has them where it is mounted with -o flock)"
        found.append(doubtful("run folder", f"{lacks}: nothing keeps other machines from training in there"))
    try:
        resumes = resume.check(run, config, origins) is not None
    except UserError as error:
        return [*found, wrong("run folder", str(error))]
    if resumes:
        found.append(fine("resume", f"from step {max(run.checkpoint_steps()):,}, if that checkpoint verifies"))
    elif config.model.kind != "qlora" and config.model.start_from is not None:
        found += _check_start(config, origins, Path(config.model.start_from), spec)
    return found


def _check_start(config: RunConfig, origins: Origins, folder: Path, spec: JobSpec) -> list[Finding]:
    try:
        model_files.check_start(config, origins)
    except ConfigError as error:
        return [wrong("weights", problem) for problem in error.problems]
    except UserError as error:
        return [wrong("weights", str(error))]
    return [check_reach("weights", folder, spec.profile.shared_folders(), spec.nodes)]


def _check_disk(config: RunConfig, run: RunDir, plan: BatchPlan | None, built: ShardManifest | None) -> list[Finding]:
    if plan is None:
        return []
    try:
        size = find_sizes(config, None, None, built).checkpoint_bytes(config)
    except ModelError as error:
        return [wrong("base", str(error))]
    except UserError as error:
        return [doubtful("disk", f"not compared with checkpoints: {display.one_line(str(error))}")]
    rows = built.splits["train"].rows if built else None
    number = forecast.most_on_disk(config, plan, forecast.count_saves(config, plan, rows))
    there = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    needed = max(0.0, number * size - there)
    free = shutil.disk_usage(nearest_existing(run.path)).free
    taken = f"{number} checkpoints of {display.size(size)} take {display.size(number * size)}"
    if needed > free:
        advice = "free some space, or keep fewer (checkpoint.keep_last, checkpoint.keep_best)"
        return [wrong("disk", f"{taken}; {display.size(free)} are free: {advice}")]
    return [fine("disk", f"{taken}; {display.size(free)} are free (a quota may be less)")]


def check_python(config: RunConfig | None, spec: JobSpec) -> list[Finding]:
    """What the job's Python has; of a container, and of one that modules bring, that cannot be told from here.

    Args:
        config: of a run; None where torch does not matter.
    """
    profile = spec.profile
    if profile.container is not None:
        return [fine("Python", f"comes with {profile.container}: not looked into")]
    python = profile.python_command()
    try:
        found = environment.look_into(python)
    except OSError as error:
        if profile.modules or profile.setup:
            return [doubtful("Python", f"comes with modules or setup: not looked into ({error})")]
        return [wrong("Python", str(error))]
    said: list[Finding] = []
    place = check_reach("Python", found.prefix, profile.shared_folders(), 1)
    if place.severity != "ok" and not found.prefix.is_relative_to("/usr") and not found.prefix.is_relative_to("/opt"):
        said.append(doubtful("Python", f"{place.message}, or be sure that each node has it"))
    if not found.has_llmtrain:
        said.append(wrong("Python", f"{' '.join(python)} has no llmtrain: install it there"))
    return said if config is None else [*said, *_check_torch(config, spec, found, " ".join(python))]


def _check_torch(config: RunConfig, spec: JobSpec, found: environment.Environment, python: str) -> list[Finding]:
    if found.torch is None:
        return [wrong("torch", f"{python} has none: install it there")]
    build = f"{found.torch.version} for {found.torch.accelerator or 'CPUs alone'}, Python {found.version}"
    if config.train.device == "cpu":
        waste = spec.gpus_per_node > 0
        note = "; train.device=cpu leaves the GPUs unused" if waste else ""
        return [Finding("torch", build + note, "warning" if waste else "ok")]
    if spec.gpus_per_node and found.torch.accelerator is None:
        return [wrong("torch", f"{build} ({python}): it cannot use the GPUs that are asked for")]
    if config.train.device == "cuda" and not spec.gpus_per_node:
        return [wrong("torch", f"{build}; train.device=cuda, and no GPUs are asked for")]
    if spec.gpus_per_node and spec.ranks_per_node > spec.gpus_per_node:
        per = f"{spec.ranks_per_node} ranks for {spec.gpus_per_node} GPUs on a node"
        return [wrong("torch", f"{build}; {per}: one rank for each GPU")]
    return [fine("torch", build)]


def check_hub(config: RunConfig, run: RunDir) -> list[Finding]:
    """Asked in a process of the core's, as the checkpoint service would; the token stays there."""
    if config.hub.repo is None:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        asked = RunDir(Path(scratch) / config.run.name)
        asked.path.mkdir()
        asked.config.write_text(resolved_yaml(config), encoding="utf-8")
        if run.origin.exists():
            shutil.copyfile(run.origin, asked.origin)  # so that its own repository is not taken for another run's
        command = [sys.executable, "-m", "llmtrain.service.hub", "check", str(asked.path), "--repo", config.hub.repo]
        try:
            done = subprocess.run(
                [*command, "--stall", "10"], capture_output=True, text=True, timeout=_HUB_S, check=False,
                env={**os.environ, **_NO_PROGRESS},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [doubtful("Hub", f"no answer within {math.floor(_HUB_S)} s; uploads wait until there is one")]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return [doubtful("Hub", f"could not be asked: {display.one_line(done.stderr)[-200:]}")]
    answer = json.loads(lines[-1])
    match answer.get("error"):
        case None:
            return [fine("Hub", answer["message"])]
        case "refused":
            return [wrong("Hub", answer["message"])]
        case _:
            return [doubtful("Hub", f"could not be asked: {answer['message']}; uploads wait until it can")]
