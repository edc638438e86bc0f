"""The command line. Heavy libraries are imported inside the commands: --help must not wait for them."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.cli_jobs import node, run, submit
from launcher.cli_plan import Settings, doctor, plan
from launcher.cli_report import compare, report
from llmtrain.errors import EXIT_INTERRUPTED, ConfigError, exit_with_code

app = typer.Typer(
    name="llmtrain",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Train language models: from raw text to the checkpoint that does best on held-out data.

    Training itself is a module:

    - `python -m llmtrain` trains a small GPT on Python's own sources (one process)
    - `llmtrain run CONFIG --gpus 8` trains on 8 GPUs, and restarts after a crash or a hang
    - `llmtrain submit CONFIG --cluster FILE` does so on SLURM
    - `torchrun --nproc_per_node 8 -m llmtrain CONFIG` is the same, without automatic restarts

    Any setting can be given on the command line as `section.key=value`.""",
)


@app.command(epilog="Example: `llmtrain shard configs/stdlib.yaml data.split.heldout=0.2`")
def shard(
    settings: Settings = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one per CPU.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again, even if finished shards are there.")] = False,
    show: Annotated[int, typer.Option(min=0, help="Print so many samples, with what will be learned in colour.")] = 0,
    only: Annotated[
        Literal["prepare"] | None, typer.Option(help="Measure, train the tokenizer, and leave the rest to parts.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Tokenise one of N parts, I from 0 to N-1, and leave the rest.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Do it as jobs on SLURM, the parts side by side.")] = False,
    cluster: Annotated[Path | None, typer.Option(help="With --submit: the cluster's profile.")] = None,
    parts: Annotated[int | None, typer.Option(min=1, help="With --submit: jobs side by side; by default 8.")] = None,
) -> None:
    """Turn raw text into token shards. A killed build resumes where it stopped.

    Training does this by itself where the shards are missing; do it beforehand for large data. Several machines that
    share a file system do it together, and get the same bytes: `--only prepare` on one of them, then `--part 0/3`,
    `--part 1/3` and `--part 2/3` wherever there is room, then the command without either.
    """
    with exit_with_code():
        from launcher.sharding.build import Built, build, build_part, prepare_build
        from launcher.sharding.parts import choose_job
        from launcher.sharding.show import describe, show_samples
        from llmtrain.base_facts import check_place
        from llmtrain.config import load_to_start
        from llmtrain.config.load import split_settings

        with_submit = {"--cluster": cluster, "--parts": parts}
        without = {"--force": force, "--only": only, "--part": part, "--show": show, "--workers": workers}
        misplaced = [
            f"{name}: {'not with --submit, whose jobs build all' if submit else 'it goes with --submit'}"
            for name, given in (without if submit else with_submit).items()
            if given
        ]
        if misplaced:
            raise ConfigError(misplaced)
        if submit:
            from launcher.submitting.command import act_shards

            act_shards(settings or [], cluster, parts)
            return
        job = choose_job(only, part, force, show)
        file, overrides = split_settings(settings or [])
        config, origins = load_to_start(file, overrides)
        check_place(config, origins)
        try:
            if job is None:
                built = build(config, workers, force)
            elif job == "prepare":
                built = prepare_build(config, workers, force)
            else:
                built = build_part(config, job, workers)
        except KeyboardInterrupt:
            typer.echo("stopped; what is finished is kept: the same command goes on from there", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        for line in describe(built):
            typer.echo(line)
        if show and isinstance(built, Built):
            from rich.console import Console

            show_samples(built.folder, show, Console())


app.command(
    epilog="Example: `llmtrain plan configs/gpt2.yaml --gpus 8 --gpu-memory 80 --vocab-size 50257 strategy.kind=zero2`"
)(plan)
app.command(epilog="Example: `llmtrain doctor --cluster -o configs/clusters/juno.yaml`")(doctor)


@app.command(epilog="Example: `llmtrain schema > configs/schema.json`")
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="A page to read: docs/settings.md.")] = False,
) -> None:
    """Print the JSON schema of a configuration file: every setting with its type, default and meaning."""
    from llmtrain.config.load import json_schema
    from llmtrain.config.reference import settings_page

    typer.echo(settings_page() if markdown else json_schema(), nl=False)


TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let an adapter's base run Python code of its own.")
]


@app.command(epilog='Example: `llmtrain generate runs/stdlib-gpt --prompt "import " --temperature 0.7`')
def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A run (its best checkpoint), a checkpoint, or a folder with an exported model or an adapter."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue, or what to ask.")] = "def main(",
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of a run on chats: what the chat begins with, as in a sample.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "--max-new-tokens", min=1, help="At most so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Choose among the likeliest p of all.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it stands, without the run's template.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt with a trained model, token by token.

    A run that was tuned on instructions or chats is asked as its samples are: the prompt is put into the template of
    `data.format`, and the answer alone is printed. `--system` puts a system prompt before it where that template has
    a place for one: chats have, mostly.
    """
    options = {
        "--prompt": prompt,
        "--system": system,
        "--tokens": tokens,
        "--temperature": temperature,
        "--top-k": top_k,
        "--top-p": top_p,
        "--seed": seed,
        "--device": device,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    given += ["--raw"] * raw + ["--trust-remote-code"] * trust_remote_code
    become("llmtrain.generate", *given, "--", str(checkpoint))


@app.command(epilog="Example: `llmtrain export runs/tune merged --merge`")
def export(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A run (its best checkpoint), a checkpoint, or a model folder.")],
    to: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base.")] = False,
    base: Annotated[
        str, typer.Option(help="original: merge into the base's own weights. dequantised: into what training saw.")
    ] = "original",
    dtype: Annotated[str, typer.Option(help="bf16 or fp32, for --merge.")] = "bf16",
    device: Annotated[str, typer.Option(help="Where to merge: auto, cpu, cuda or cuda:1.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a checkpoint's model as a folder for transformers, and check it; an adapter is copied, for peft.

    A model is read back and its logits are compared with those before; the difference is printed.
    """
    of_merging = {"base": base, "dtype": dtype, "device": device}
    with exit_with_code():
        if unused := [] if merge else [name for name in of_merging if _is_given(context, name)]:
            raise ConfigError([f"--{name} {of_merging[name]} is about merging; add --merge" for name in unused])
    given = ["--base", base, "--dtype", dtype, "--device", device]
    given += ["--merge"] * merge + ["--trust-remote-code"] * trust_remote_code
    become("llmtrain.export", *given, "--", str(checkpoint), str(to))


app.command(epilog="Example: `llmtrain run configs/gpt2.yaml --gpus 8 strategy.kind=zero2`")(run)
app.command(
    epilog="Example: `llmtrain submit configs/gpt2.yaml --cluster configs/clusters/mine.yaml --nodes 4 --time 48:00:00`"
)(submit)
app.command(hidden=True)(node)


@app.command(epilog="Example: `llmtrain generate $(llmtrain checkpoints runs/stdlib-gpt best)`")
def checkpoints(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    action: Annotated[
        Literal["verify", "best", "show", "push", "prune"] | None,
        typer.Argument(help="Without one: a table of all checkpoints, and which one to use."),
    ] = None,
    step: Annotated[int | None, typer.Argument(help="For show; verify takes one too.")] = None,
    by_loss: Annotated[bool, typer.Option("--by-loss", help="Sort the table by held-out loss.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The table for programs.")] = False,
    test: Annotated[bool, typer.Option("--test", help="Score the proposed one on the test split, once.")] = False,
    again: Annotated[bool, typer.Option("--again", help="With --test: though the split was used before.")] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="With --test: cpu, cuda, cuda:1 or mps; by default a free GPU if training took one, else cpu."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With prune: delete.")] = False,
    repo: Annotated[str | None, typer.Option(help="With push: user/name, in place of hub.repo.")] = None,
) -> None:
    """List a run's checkpoints with their scores, and say which one to use, why, and where overfitting began.

    - `verify` hashes every file; exit code 18 if one does not match
    - `best` prints the path of the one to use, and nothing else
    - `show STEP` tells all about one
    - `push` uploads what is not on the Hub yet
    - `prune` shows what the rule of `checkpoint` would delete; `prune --yes` deletes it
    """
    with exit_with_code():
        from launcher.choosing.checkpoints import Options, act

        service = act(run, action, step, Options(by_loss, json, test, again, device, yes, repo))
    if service is not None:
        become("llmtrain.service", *service)


@app.command(epilog="Example: `llmtrain restore user/name runs/mine`")
def restore(
    repo: Annotated[str, typer.Argument(help="The run's repository on the Hub, user/name.")],
    run: Annotated[Path, typer.Argument(help="The run folder to make; must not exist.")],
    step: Annotated[int | None, typer.Option(min=0, help="By default the newest that is there.")] = None,
) -> None:
    """Restore a run from the Hub, to resume training where its folder is lost, or on another machine.

    It has to have been uploaded with `hub.optimizer_state=true`, and the shards have to be those that it began with.
    """
    given = [] if step is None else [f"--step={step}"]
    become("llmtrain.service.restore", *given, "--", repo, str(run))


@app.command(epilog="Example: `llmtrain status runs --watch`")
def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs, or folders of runs; by default all runs in ./runs.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every 2 seconds, until Ctrl-C.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what runs are doing: their jobs in SLURM's queue, training, checkpoints, the checkpoint service, the Hub.

    And what needs mending. Where SLURM does not answer, or there is none, the run folders tell what they know. Jobs
    that still wait for their first start are shown too.
    """
    with exit_with_code():
        from launcher.watching.status_display import show_status

        show_status(runs or [], json, watch)


@app.command(epilog="Example: `llmtrain logs runs/stdlib-gpt -f`")
def logs(
    run: Annotated[Path, typer.Argument(help="A run folder, also one that its job has not made yet.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="And what comes, through restarts, until the run ends or Ctrl-C.")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="What that rank said since the newest start.")] = None,
    node: Annotated[int | None, typer.Option(min=0, help="What that node of a job wrote last, from 0.")] = None,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="The last so many; by default all, with -f 20.")
    ] = None,
) -> None:
    """Print a run's log, or where it has none yet, the output of its job. Says where it lies (on standard error).

    Rank 0 speaks for all in the log; `--rank 3` shows what another one said, such as the error that it ended with.
    `--node 0` is the raw output of a SLURM job's first node.
    """
    with exit_with_code():
        from launcher.watching.logs import Wanted, show_logs

        if rank is not None and node is not None:
            raise typer.BadParameter("either --rank or --node")
        show_logs(run, Wanted(rank, node), follow, lines)


@app.command(epilog="Example: `llmtrain stop runs/stdlib-gpt`; the command that started it resumes it")
def stop(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, also those that their jobs have not made yet.")],
    now: Annotated[bool, typer.Option("--now", help="At once, without a save; a job is cancelled.")] = False,
) -> None:
    """Have training save, end, and not requeue; wait for that, and say what its last checkpoint is.

    Works for jobs on SLURM, which are not requeued then (one that still waits is cancelled), and for runs on this
    machine. The checkpoint service finishes what it has to do.
    """
    with exit_with_code():
        from launcher.stop import stop_runs

        try:
            stop_runs(runs, now)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None


app.command(epilog="Example: `llmtrain report runs/stdlib-gpt`")(report)
app.command(epilog="Example: `llmtrain compare runs/a runs/b`; all runs in a folder: `llmtrain compare runs/sweep`")(
    compare
)


_ELSEWHERE = {
    "train": "to train: llmtrain run CONFIG, or python -m llmtrain CONFIG",
    "resume": "to resume: the command that started the run, once more",
    "finetune": "to fine-tune: llmtrain run CONFIG, with model.kind=qlora in it",
    "merge": "to merge an adapter into its base: llmtrain export RUN FOLDER --merge",
    "evaluate": "held-out losses of all checkpoints: llmtrain checkpoints RUN",
    "chat": "to ask a model: llmtrain generate RUN --prompt TEXT",
    "sample": "to continue a text: llmtrain generate RUN --prompt TEXT",
}
"""What other trainers have commands for."""


def _is_given(context: typer.Context, option: str) -> bool:
    """On the command line, whether as its default says or not."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _elsewhere(context: typer.Context) -> None:
    typer.echo(f"error: there is no command '{context.info_name}'; {_ELSEWHERE[context.info_name or '']}", err=True)
    raise typer.Exit(2)


for _name in _ELSEWHERE:
    app.command(_name, hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
        _elsewhere
    )


def become(module: str, *arguments: str) -> None:
    """Go on as a module of the core: this package does not import torch."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "llmtrain.command", module, *arguments])


if __name__ == "__main__":  # `python -m launcher` is the usual way; this one did nothing, in silence
    app()
