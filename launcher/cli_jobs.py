"""The commands that start training: on this machine, and as jobs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli_plan import Settings
from launcher.keeper.rules import Rules
from llmtrain.errors import exit_with_code

MaxRestarts = Annotated[int, typer.Option(min=0, help="After crashes in a row that brought no new checkpoint.")]
HangAfter = Annotated[
    float, typer.Option(min=0, help="Seconds without progress after which a rank counts as hanging; 0: never.")
]


def run(
    settings: Settings = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="One rank each; by default all. 0: the CPU.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes on the CPU.")] = None,
    max_restarts: MaxRestarts = Rules.max_restarts,
    hang_after: HangAfter = Rules.hang_s,
) -> None:
    """Train on this machine: one process, or torchrun with one for each GPU. After a crash it restarts.

    A rank that hangs is found, named, and restarted with the others; the Python stacks of all are kept.

    Ctrl-C saves and stops (exit code 75, the same command resumes); a second one exits at once.
    """
    with exit_with_code():
        from launcher.keeper.one_machine import train_here
        from launcher.keeper.torchrun import Start, ranks_here

        count, device = ranks_here(gpus, ranks)
        raise typer.Exit(train_here(Start(settings or [], count, device), Rules(max_restarts, hang_after)))


def submit(
    settings: Settings = None,
    cluster: Annotated[
        Path | None, typer.Option(help="The cluster's profile; 'llmtrain doctor --cluster' drafts one.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="One rank each; by default as many as the profile says a node has.")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes on each node, where it has no GPUs.")
    ] = None,
    time: Annotated[str, typer.Option(help="Limit, e.g. 24:00:00; by default the profile's. The run requeues.")] = "",
    after: Annotated[str, typer.Option(help="Begin when this job has ended well; or a dependency: afterany:123.")] = "",
    sweep: Annotated[
        list[str] | None, typer.Option(help="section.key=value,value: one run for each; several: all combinations.")
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="How many runs of the sweep may train at the same time; by default all.")
    ] = None,
    service_job: Annotated[
        bool, typer.Option("--service-job", help="The checkpoint service in a job of its own (profile: service).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script, and submit nothing.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="With --dry-run: a script for sbatch itself.")] = False,
    max_restarts: MaxRestarts = Rules.max_restarts,
    hang_after: HangAfter = Rules.hang_s,
) -> None:
    """Train on SLURM. What can be known to fail is checked first; a job that is preempted requeues itself.

    Before preemption and before the time limit the run saves, is requeued, and resumes from there; `llmtrain
    status`, `logs` and `stop` know it by its run folder. The configuration is kept as it is now.
    """
    with exit_with_code():
        from launcher.submitting import dependencies
        from launcher.submitting.command import act
        from launcher.submitting.order import order_of

        order = replace(
            order_of(cluster, nodes, gpus_per_node, ranks_per_node, time),
            after=dependencies.parse(after), at_once=at_once, max_restarts=max_restarts, hang_s=hang_after,
        )  # fmt: skip
        act(settings or [], order, sweep or [], service_job, dry_run, plain)


def node(
    settings: Settings = None,
    ranks: Annotated[int, typer.Option(min=1, help="On each node.")] = 1,
    device: Annotated[str | None, typer.Option(help="cuda where GPUs were asked for.")] = None,
    max_restarts: MaxRestarts = Rules.max_restarts,
    hang_after: HangAfter = Rules.hang_s,
    lead: Annotated[float, typer.Option(min=0, help="Save so many seconds before the time limit.")] = Rules.lead_s,
    requeue: Annotated[bool, typer.Option(help="Ask for another turn after a stop by SLURM.")] = True,
) -> None:
    """One node's part of a SLURM job: what the scripts in slurm/ start with srun."""
    with exit_with_code():
        from launcher.slurm.node import keep_going
        from launcher.slurm.requeueing import requeue_with_scontrol

        rules = Rules(max_restarts, hang_after, lead_s=lead, may_requeue=requeue)
        raise typer.Exit(keep_going(settings or [], ranks, device, rules, requeue_with_scontrol))
