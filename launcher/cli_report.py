"""Commands that write pages: `llmtrain report` and `llmtrain compare`; cli.py lists them."""

from pathlib import Path
from typing import Annotated

import typer

from llmtrain.errors import exit_with_code


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not print where the page is.")] = False,
) -> None:
    """Write a page about a run, RUN/report/index.html: is it done, which checkpoint to use, does it overfit.

    One file that stands alone, for any browser, with its figures as PNG beside it. Training writes it at its end;
    write it again at any time, also during a run.
    """
    with exit_with_code():
        from launcher.report.page import write_report
        from llmtrain.rundir import RunDir

        page = write_report(RunDir(run))
        if not quiet:
            typer.echo(page)


def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Runs, or folders of runs; by default ./runs.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; by default compare.html beside the first run.")
    ] = None,
) -> None:
    """Rank runs by their best checkpoints, with intervals between them, and show which settings differ.

    Prints the ranking and writes a page with the curves over each other. Where the runs' data or tokenizers differ it
    says so and compares bits per byte, not losses.
    """
    with exit_with_code():
        from rich.console import Console

        from launcher.report.compare_page import compare as show_comparison

        show_comparison(runs or [], output, Console())
