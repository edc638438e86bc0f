"""`llmtrain submit`: a run, a sweep of runs, the checkpoint service and sharding as jobs on SLURM."""

import itertools
import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.cluster import Profile
from launcher.findings import settle
from launcher.jobs import JobDir, JobRecord, Kind
from launcher.slurm import batch, client
from launcher.slurm.batch import JobSpec
from launcher.slurm.job import CommandJob, ServiceJob, TrainJob
from launcher.submitting import dependencies
from launcher.submitting.order import Order
from launcher.submitting.variables import forget_overrides
from llmtrain import files
from llmtrain.config import RunConfig, load_to_start, resolved_yaml
from llmtrain.config.load import split_settings
from llmtrain.errors import ConfigError, SlurmError
from llmtrain.rundir import RunDir

_PARTS = 8
_LONGEST_NAME = 100
"""What run.name may have."""


@dataclass(frozen=True)
class PlannedRun:
    """One run to be submitted."""

    config: RunConfig
    settings: tuple[str, ...] = ()
    """Over the configuration that all runs of a sweep share."""

    @property
    def run(self) -> RunDir:
        return RunDir(self.config.run.folder)


def plan_runs(words: Sequence[str], sweep: Sequence[str]) -> list[PlannedRun]:
    """The run that is asked for, or one for each combination of a sweep's values, in a folder of their own.

    Raises:
        ConfigError: of the configuration, or of any of its combinations.
    """
    file, overrides = split_settings(list(words))
    config, _ = load_to_start(file, overrides)
    if not sweep:
        return [PlannedRun(config)]
    if config.hub.repo is not None:
        raise ConfigError(
            [
                f"--sweep with hub.repo={config.hub.repo}: a repository holds one run; leave it out, and send the best "
                "one later with 'llmtrain checkpoints RUN push --repo NAME'"
            ]
        )
    runs: list[PlannedRun] = []
    for number, chosen in enumerate(itertools.product(*(_values(setting) for setting in sweep))):
        name = "-".join([f"{number:02d}", *(_short(setting) for setting in chosen)])[:_LONGEST_NAME]
        settings = (*chosen, f"run.dir={config.run.folder}", f"run.name={name}")
        each, _ = load_to_start(file, [*overrides, *settings])
        runs.append(PlannedRun(each, settings))
    return runs


def _short(setting: str) -> str:
    """optim.lr=1e-4 as lr_1e-4, for a folder's name."""
    name, _, value = setting.partition("=")
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{name.rsplit('.', 1)[-1]}_{value}")


def _values(setting: str) -> list[str]:
    """ "optim.lr=1e-4,3e-4" as one setting for each value; commas within brackets belong to a value."""
    name, equals, values = setting.partition("=")
    found = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values) if value.strip()]
    if not equals or not found:
        raise ConfigError([f"--sweep {setting}: write it as section.key=value,value, e.g. optim.lr=1e-4,3e-4"])
    return [f"{name}={value}" for value in found]


def preview(words: Sequence[str], order: Order, sweep: Sequence[str], plain: bool) -> str:
    """The script that would be submitted. Needs neither SLURM nor the cluster's file systems, and writes nothing.

    `plain`: one for sbatch itself, which names the configuration as it was given.
    """
    runs = plan_runs(words, sweep)
    shared, _ = load_to_start(*split_settings(list(words)))
    spec = _spec(order, shared)
    if not plain:
        return batch.render(spec, count=len(runs))
    if sweep:
        raise ConfigError(["--plain is for one run: a sweep needs 'llmtrain submit'"])
    return batch.render_plain(spec, order.on_node(words, shared))


def submit(
    words: Sequence[str], order: Order, sweep: Sequence[str], with_service: bool, console: Console
) -> list[JobRecord]:
    """Queue the training job (an array for a sweep), and the service's where one is asked for.

    Raises:
        ConfigError, NotQueued: found before anything is queued.
        SlurmError: sbatch refuses, in its own words.
    """
    from launcher.checks import preflight  # a preview must not wait for what it loads

    if with_service:
        words = [*words, "service.start=manual"]
    runs = plan_runs(words, sweep)
    shared, origins = load_to_start(*split_settings(list(words)))
    spec = _spec(order, shared)
    for planned in runs:
        refuse_if_queued(planned.run)
    script = batch.render(spec, count=len(runs))
    forget_overrides(batch.parameters(spec))  # the checks ask sbatch too
    found = preflight.check([planned.config for planned in runs], origins, spec, script)
    found += dependencies.check_known(spec.after)
    if with_service:
        service = _service_spec(order, runs[0].run, spec.folder)
        found += preflight.check_side("service", service, batch.render(service))
    settle(found, console)
    spec.folder.mkdir(parents=True)
    frozen = spec.folder / "config.yaml"
    files.write_atomic(frozen, resolved_yaml(shared))  # what is queued does not change when the file is edited
    device = order.device(shared)
    jobs = [TrainJob([str(frozen), *planned.settings], order.ranks_per_node, device, order.rules) for planned in runs]
    records: list[JobRecord] = []
    options = [*order.options(), *(["--service-job"] if with_service else [])]
    # All of them before anything else can fail: a job that is queued and not written down, nobody shows or stops.
    for planned, job_id in zip(runs, queue_jobs(spec, jobs), strict=True):
        jobs_of_run = JobDir.of(planned.run)
        records.append(_write_down(jobs_of_run, spec, job_id, "train", options))
        jobs_of_run.stop.unlink(missing_ok=True)
    return [*records, *_submit_services(order, [each.run for each in runs], records)] if with_service else records


def submit_shards(words: Sequence[str], profile: Profile, parts: int | None, console: Console) -> list[JobRecord]:
    """Queue sharding: the tokenizer first, then the parts as an array, then what joins them.

    Raises:
        ConfigError, NotQueued: found before anything is queued.
        SlurmError: sbatch refuses, in its own words.
    """
    from launcher.checks import preflight
    from launcher.sharding.work import num_tasks

    config, _ = load_to_start(*split_settings(list(words)))
    run = RunDir(Path(config.run.dir) / f"shard-{config.run.name}")
    jobs = JobDir.of(run)
    first = JobSpec(run.path.name, jobs.path, profile, side=profile.shard)
    forget_overrides(batch.parameters(first))
    settle(preflight.check_shard_job(config, first, batch.render(first)), console)
    parts = min(parts or _PARTS, num_tasks(config))
    records: list[JobRecord] = []
    after = ""
    steps = {"prepare": [["--only", "prepare"]], "parts": [["--part", f"{i}/{parts}"] for i in range(parts)], "": [[]]}
    for step, choices in steps.items():
        folder = _fresh(jobs)
        folder.mkdir(parents=True)
        frozen = folder / "config.yaml"
        files.write_atomic(frozen, resolved_yaml(config))
        command = ["shard", str(frozen), "--workers", str(profile.shard.cpus)]
        name = f"shard-{config.run.name}" + (f"-{step}" if step else "")
        spec = JobSpec(name, folder, profile, after=after, side=profile.shard)
        ids = queue_jobs(spec, [CommandJob([*command, *choice]) for choice in choices])
        records += [_write_down(jobs, spec, job_id, "shard") for job_id in ids]
        after = f"afterok:{ids[0].split('_')[0]}"
    return records


def _service_spec(order: Order, run: RunDir, folder: Path) -> JobSpec:
    side = order.profile.service
    time = order.time if side.time is None else ""
    return JobSpec(f"{run.path.name}-service", folder, order.profile, time=time, side=side)


def _submit_services(order: Order, runs: Sequence[RunDir], trainings: Sequence[JobRecord]) -> list[JobRecord]:
    """One for each run. Raises SlurmError, which says that training is queued all the same."""
    records: list[JobRecord] = []
    for run, training in zip(runs, trainings, strict=True):
        try:
            records.append(_submit_service(order, run, training.job_id))
        except SlurmError as error:
            raise SlurmError(
                f"the checkpoint service's job for {run.path} was not queued: {error}\nTraining is queued "
                f"({', '.join(each.job_id for each in trainings)}), and {len(records)} of {len(runs)} services are. "
                f"Serve the others by hand: python -m llmtrain.service --run {shlex.quote(str(run.path))}"
            ) from error
    return records


def _submit_service(order: Order, run: RunDir, train_job: str) -> JobRecord:
    jobs = JobDir.of(run)
    folder = _fresh(jobs)
    folder.mkdir(parents=True)
    spec = replace(_service_spec(order, run, folder), after=f"after:{train_job}")
    ids = queue_jobs(spec, [ServiceJob(run.path.absolute(), train_job)])
    return _write_down(jobs, spec, ids[0], "service")


def queue_jobs(spec: JobSpec, jobs: Sequence[Any]) -> list[str]:
    """Submit one job, or several as an array; returns their numbers."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = batch.executor(spec)
    forget_overrides(batch.parameters(spec))
    try:
        if len(jobs) == 1:
            return [str(executor.submit(jobs[0]).job_id)]
        with executor.batch():  # an array
            queued = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(str(error).strip()) from error
    return [str(job.job_id) for job in queued]


def refuse_if_queued(run: RunDir) -> None:
    """Two jobs of one run would take turns at failing."""
    last = JobDir.of(run).last("train")
    queued = client.queue([last.job_id]).get(last.job_id) if last is not None else None
    if queued is not None and not queued.is_over:
        raise ConfigError(
            [
                f"run {run.path.name} is {queued.state} already, as job {queued.job_id}: stop it first "
                f"('llmtrain stop {run.path}'), or give this one a name of its own (run.name=...)"
            ]
        )


def _spec(order: Order, shared: RunConfig) -> JobSpec:
    """The training job; the runs of a sweep share one, an array, and a folder for its script and its output."""
    run = RunDir(shared.run.folder)
    return order.spec(run.path.name, _fresh(JobDir.of(run)))


def _fresh(jobs: JobDir) -> Path:
    """Job numbers begin anew on a cluster that was set up again: a folder is never used twice.

    Raises:
        ConfigError: SLURM would look for it in another place.
    """
    if "%" in str(jobs.path):
        raise ConfigError(
            [
                f"{jobs.path}: SLURM takes % in a path for the start of a pattern: give run.dir or the folder "
                "another name"
            ]
        )
    return jobs.path / f"submitted-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(4).hex()}"


def _write_down(jobs: JobDir, spec: JobSpec, job_id: str, kind: Kind, options: Sequence[str] = ()) -> JobRecord:
    record = JobRecord(
        job_id=job_id,
        kind=kind,
        nodes=spec.nodes,
        ranks_per_node=spec.ranks_per_node if kind == "train" else 1,
        cluster=spec.profile.name,
        after=spec.after,
        options=list(options),
    )
    jobs.add(record, spec.folder)
    return record
