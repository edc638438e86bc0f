"""What runs on each node of a job: a supervisor for its ranks.

SLURM's signals (preemption, time limit, scancel) reach every node. The run saves and stops; then the first node sees to
it that the job is queued again. It also counts starts that came to nothing.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass, replace
from typing import Any

from launcher.jobs import JobDir
from launcher.keeper.meeting import FirstNodeGone, Meeting
from launcher.keeper.rules import Rules
from launcher.keeper.stopping import asks_to_stop
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.terminal import say
from launcher.keeper.torchrun import Start
from launcher.slurm import client
from launcher.slurm.requeueing import Requeue, avoid, come_back, ignore_signals
from llmtrain import files
from llmtrain.batches import nodes_that_train
from llmtrain.config import load_config
from llmtrain.config.load import split_settings
from llmtrain.errors import EXIT_REQUEUE, ConfigError, SlurmError, is_for_a_person
from llmtrain.rundir import RunDir


@dataclass(frozen=True)
class Node:
    """This node's place in its job."""

    job_id: str
    number: int
    num_nodes: int
    restart: int
    """How often SLURM has started this job again."""


def this_node() -> Node:
    """From SLURM's variables; raises ConfigError outside of a job."""
    try:
        environment = os.environ
        job_id = environment["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in environment:
            job_id = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        return Node(
            job_id=job_id,
            number=int(environment["SLURM_NODEID"]),
            num_nodes=int(environment.get("SLURM_STEP_NUM_NODES", environment["SLURM_JOB_NUM_NODES"])),
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        )
    except KeyError as missing:
        raise ConfigError([f"{missing} is not set: this belongs into a SLURM job, behind srun"]) from None


def keep_going(words: list[str], ranks: int, device: str | None, rules: Rules, requeue: Requeue) -> int:
    """Train on this node until the job's part is over; returns the exit code."""
    node = this_node()
    config, _ = load_config(*split_settings(words))
    run = RunDir(config.run.folder)
    jobs = JobDir.of(run)
    folder = jobs.start(node.job_id, node.restart)
    used = nodes_that_train(config.train.global_batch_size, ranks, node.num_nodes)
    meeting = Meeting(folder, node.number, used)
    meeting.beat()
    try:
        if node.number >= used:
            return _sit_out(meeting, node)
        start = Start(words, ranks, device, node.number, used)
        return _train(start, rules, requeue, node, run, jobs, meeting)
    except FirstNodeGone as error:  # what went wrong stands in that node's output
        say(str(error))
        return 1
    finally:
        if node.number == 0:
            meeting.end()


def _sit_out(meeting: Meeting, node: Node) -> int:
    """On a node that the batch leaves over: until the first one has ended. Some clusters end a job with its first
    task, so it stays, and leaves signals to those that train."""
    say(
        f"the ranks of {node.num_nodes} nodes do not divide train.global_batch_size: {meeting.num_nodes} train, this "
        f"one (node {node.number}) waits"
    )
    ignore_signals()
    meeting.wait_for_first("over", 0)
    return 0


def _train(
    start: Start, rules: Rules, requeue: Requeue, node: Node, run: RunDir, jobs: JobDir, meeting: Meeting
) -> int:
    rules = replace(rules, ends_at=_ends_at(node))
    since = _begin(jobs, run, node, meeting, rules.max_restarts)
    if since is None:
        return 1
    supervisor = Supervisor(start, run, rules, meeting, jobs.start(node.job_id, node.restart) / "ranks", jobs.stop)
    code = supervisor.supervise(since if node.restart else None)
    reason = supervisor.stopper.reason
    stopped = reason is not None or code == EXIT_REQUEUE  # the time limit is the first node's to know
    asked = reason == "llmtrain stop" or asks_to_stop(jobs.stop)
    # At its limit a job has had all its time, and a GPU that fails may fail again: what `_begin` wrote stands, and
    # counts without a new checkpoint.
    counts = supervisor.stopper.met_limit or supervisor.lost_gpus_on
    if node.number == 0 and (code == 0 or asked or not counts):
        _note(jobs, run, node, since, clean=stopped or code == 0, asked=asked)
    if asked or not rules.may_requeue or not stopped or code == 0 or is_for_a_person(code):
        return code
    if node.number > 0:
        return 0  # some clusters end a job when one of its tasks ends badly: the first node has work to do
    meeting.beat(last=True)  # SLURM may be silent for long
    come_back(node.job_id, requeue)
    if supervisor.lost_gpus_on:
        avoid(supervisor.lost_gpus_on, node.job_id)
    return EXIT_REQUEUE


def _ends_at(node: Node) -> float | None:
    """When the time limit ends this job; None on other nodes than the first: one that knows is enough."""
    if node.number > 0:
        return None
    if (ends_at := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():
        return float(ends_at)
    try:
        return client.end_time(node.job_id)
    except SlurmError as error:  # in a container without SLURM's commands its signal comes all the same
        say(f"the time limit is not known: {error}")
        return None


def _begin(jobs: JobDir, run: RunDir, node: Node, meeting: Meeting, limit: int) -> float | None:
    """When the first start of this job was; None where it is not to start again.

    The first node counts starts without a new checkpoint that end without word (a node that crashes), or at the
    time limit.
    """
    if node.number == 0:
        before = _progress(jobs) if node.restart else None
        reached = _newest(run)
        failures = 0
        if before is not None and not before["clean"] and reached <= before["step"]:
            failures = before["failures"] + 1
        since = _first_start(jobs, node, before)
        jobs.path.mkdir(parents=True, exist_ok=True)
        if not node.restart:
            _forget_older_stop(jobs, node)
        _note(jobs, run, node, since, clean=False, failures=failures)
        if failures > limit:
            say(f"ended {failures} times in a row without a new checkpoint: not started again")
        meeting.tell("begin", 0, since if failures <= limit else None)
    return meeting.wait_for_first("begin", 0)


def _progress(jobs: JobDir) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):  # damaged: it is written anew
        return json.loads(jobs.progress.read_text())
    return None


def _first_start(jobs: JobDir, node: Node, before: dict[str, Any] | None) -> float:
    if before is not None and before.get("job") == node.job_id:
        return float(before["since"])
    if before is not None and "job" not in before:  # written by an earlier version: it began before this start
        return 0.0
    submitted = [record.time for record in jobs.records() if record.job_id == node.job_id]
    return submitted[-1] if submitted and node.restart else time.time()  # a first start may end before it says so


def _forget_older_stop(jobs: JobDir, node: Node) -> None:
    """A `llmtrain stop` of before this job was submitted is not meant for it, and would end it at once.

    `llmtrain submit` takes the file away itself; sbatch does not.
    """
    if any(record.job_id == node.job_id for record in jobs.records()):
        return
    try:
        asked = jobs.stop.stat().st_mtime
        if asked < _submitted(node):
            jobs.stop.unlink()
            say(f"{jobs.stop} is older than this job: not meant for it, and deleted")
    except FileNotFoundError:
        return
    except OSError as error:
        say(f"{jobs.stop} is from before this job, and cannot be deleted: {error}")


def _submitted(node: Node) -> float:
    """When; where SLURM does not say that, when it started, or else 0."""
    with contextlib.suppress(SlurmError, OSError):
        if (submitted := client.describe(node.job_id).get("SubmitTime", "")).isdigit():
            return float(submitted)
    started = os.environ.get("SLURM_JOB_START_TIME", "")
    return float(started) if started.isdigit() else 0.0


def _note(
    jobs: JobDir, run: RunDir, node: Node, since: float, clean: bool, failures: int = 0, asked: bool = False
) -> None:
    """For the next start, and for `llmtrain status`. A disk that fails now must not keep the job from its return."""
    try:
        noted = {"step": _newest(run), "failures": failures, "clean": clean, "job": node.job_id, "since": since}
        files.write_atomic(jobs.progress, json.dumps({**noted, "asked": asked}))
    except OSError as error:
        say(f"{jobs.progress} cannot be written ({error}): the next start may count this one as a failure")


def _newest(run: RunDir) -> int:
    return max(run.checkpoint_steps(), default=0)
