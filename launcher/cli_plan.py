"""Commands that look ahead and start nothing: `llmtrain plan` and `llmtrain doctor`; cli.py lists them."""

from pathlib import Path
from typing import Annotated

import typer

from llmtrain.errors import exit_with_code

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [section.key=value]...", help="A configuration file, and settings over it."),
]


def plan(
    settings: Settings = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Ranks on one machine: one per GPU.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.1, help="GB of one GPU; by default this machine's first GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu: what to plan for.")] = "auto",
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Where neither shards nor a local tokenizer tell.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Training samples, where they are not sharded yet (data.packing=none).")
    ] = None,
    base_config: Annotated[
        str | None, typer.Option(help="Folder with the base's config.json, where the base itself is not here.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of a cluster.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="On each node, one rank each; by default all that the profile says.")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes on each node, where it has no GPUs.")
    ] = None,
    cluster: Annotated[Path | None, typer.Option(help="A cluster's profile: the batch script is shown too.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of a job; by default the profile's.")] = None,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Of all ranks, as training shows it; by default as the run's last start went."),
    ] = None,
) -> None:
    """Say what a run would take: steps, checkpoints, uploads, time, and a rank's memory under DDP and ZeRO-2.

    Starts nothing. Where it does not fit, says which settings would. Exit code 3 if it does not fit.
    With `--cluster` it shows the batch script that `llmtrain submit` would queue.
    """
    with exit_with_code():
        from rich.console import Console

        from launcher.planning.plan import Given, show
        from launcher.submitting.plan_job import Wishes, find_job, machine_for, train_seconds
        from launcher.submitting.submit import preview
        from llmtrain.base_facts import check_place
        from llmtrain.config import load_to_start
        from llmtrain.config.load import split_settings

        config, origins = load_to_start(*split_settings(settings or []))
        check_place(config, origins)
        wishes = Wishes(gpus, nodes, gpus_per_node, ranks_per_node, cluster, time)
        job = find_job(wishes)
        machine = machine_for(wishes, job, gpu_memory, "cpu" if config.train.device == "cpu" else device)
        given = Given(vocab_size, samples, base_config, tokens_per_s, train_seconds(wishes, job))
        fits = show(config, origins, machine, given, Console())
        if job is not None:
            typer.echo(f"\n{preview(settings or [], job, sweep=[], plain=False)}", nl=False)
        if not fits:
            raise typer.Exit(3)


def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="Draft a profile of the SLURM cluster here.")] = False,
    partition: Annotated[
        str | None, typer.Option(help="For --cluster; by default the one with GPUs, or SLURM's default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="For --cluster: the file to write; by default the terminal.")
    ] = None,
) -> None:
    """Say what this machine has of what a run needs: Python, torch, GPUs, disk, SLURM, the Hub's login.

    `--cluster` drafts a profile for `llmtrain submit` from what SLURM says of its partitions and nodes.
    """
    with exit_with_code():
        from launcher.checks.doctor import draft, report

        if cluster or partition or output:
            draft(partition, output)
        else:
            report()
