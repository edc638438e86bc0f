"""`llmtrain checkpoints`: what a run has saved, which one to use and why, and what can be done with them."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic
from rich.console import Console

from launcher.choosing import final_score, listing, one_checkpoint
from launcher.choosing.listing import Listing, Row
from launcher.display import Column, figure, fitted, one_line, say, say_command, size
from launcher.runs import open_run
from llmtrain import manifest, retention
from llmtrain.config import RunConfig
from llmtrain.config.load import load_written
from llmtrain.config.service_sections import HubSection
from llmtrain.errors import CheckpointError, ConfigError, RunFolderError, UserError
from llmtrain.ranking import Entry
from llmtrain.rundir import RunDir
from llmtrain.wording import listed, name_steps

Action = Literal["verify", "best", "show", "push", "prune"]
_MARK = ">"
"""Of the proposed checkpoint."""


@dataclass(frozen=True)
class Options:
    """What else the command line says."""

    by_loss: bool = False
    as_json: bool = False
    test: bool = False
    again: bool = False
    device: str | None = None
    """Where --test scores."""
    yes: bool = False
    repo: str | None = None


def act(path: Path, action: Action | None, step: int | None, options: Options) -> list[str] | None:
    """Do what was asked. Where that is the checkpoint service's work, returns the arguments to become it with.

    Raises:
        UserError: one of those that the actions below name.
    """
    run = open_run(path)
    if unused := _unused(action, options):
        raise ConfigError(unused)
    if step is not None and action not in ("show", "verify"):
        raise UserError(f"{action or 'the table'} is about all checkpoints: leave the step {step} out")
    match action:
        case None if options.test:
            final_score.score_test(run, options.again, options.device)
        case None:
            show_table(run, options.by_loss, options.as_json)
        case "verify":
            verify(run, step)
        case "best":
            print(best(run))
        case "show":
            if step is None:
                raise UserError(f"show needs a step; there are: {listed(run.checkpoint_steps())}")
            one_checkpoint.show(listing.gather(run), step)
        case "push":
            return push(run, options.repo)
        case "prune":
            return prune(run, options.yes)
    return None


def _unused(action: Action | None, options: Options) -> list[str]:
    """What was asked for and would not be done, since what it belongs to is missing."""
    tests = options.test and action is None
    is_table = action is None and not options.test
    needs = [
        ("--test", options.test, action is None, f"leave {action} out"),
        ("--again", options.again, tests, "it goes with --test"),
        (f"--device {options.device}", options.device is not None, tests, "it goes with --test"),
        ("--yes", options.yes, action == "prune", "it goes with prune: llmtrain checkpoints RUN prune --yes"),
        (f"--repo {options.repo}", options.repo is not None, action == "push", "it goes with push"),
        ("--by-loss", options.by_loss, is_table, "it is for the table alone"),
        ("--json", options.as_json, is_table, "it is for the table alone"),
    ]
    return [f"{name}: {why}" for name, given, is_used, why in needs if given and not is_used]


def show_table(run: RunDir, by_loss: bool, as_json: bool) -> None:
    """All checkpoints, then the one to use, why, and where overfitting began."""
    found = listing.gather(run)
    if as_json:
        print(json.dumps(listing.as_json(found), indent=1))
        return
    console = Console(highlight=False)
    if not found.rows:
        console.print("no checkpoint has been saved yet", markup=False)
        return
    rows = sorted(found.rows, key=_by_loss) if by_loss else found.rows
    table, left_out = fitted(columns(found, rows), [_style(found, row) for row in rows], console.width)
    console.print(table)
    console.print()
    command = listing.command_to_try(found)
    for name, text in conclusions(found):
        say(console, name, text)
        if name == "why" and command is not None:
            say_command(console, "try it", command)
    for name, text in remarks(found, left_out):
        say(console, name, text, style="dim")


def _by_loss(row: Row) -> tuple[bool, float, int]:
    """Those with a score first."""
    return (row.entry is None, float("inf") if row.loss is None else row.loss, row.step)


def columns(found: Listing, rows: list[Row]) -> list[Column]:
    """In the order in which they stand; the numbers say which ones a narrow terminal goes without."""
    scores = [None if row.entry is None else row.entry.score for row in rows]
    tasks = sorted({name for row in rows if row.entry is not None for name in row.entry.task})
    return [
        Column("step", [f"{_MARK} {row.step:,}" if row is found.proposed else f"{row.step:,}" for row in rows], 100),
        Column("epoch", [figure(row.epoch, 2) for row in rows], 60),
        Column("held-out", [_loss(row) for row in rows], 95),
        Column("", [_verdict(row) for row in rows], 90, left=True),
        Column("95% above the best", [_interval(row.entry) for row in rows], 70),
        Column("perplexity", [figure(None if s is None else s.perplexity, 2) for s in scores], 20),
        Column("bits/byte", [figure(None if s is None else s.bits_per_byte, 4) for s in scores], 30),
        Column("train", [figure(None if row.entry is None else row.entry.train_loss) for row in rows], 40),
        Column("gap", [figure(row.gap, 3) for row in rows], 50),
        *(
            Column(
                name.removeprefix("task_").replace("_", " "),
                [figure(row.entry.task.get(name) if row.entry else None, 3) for row in rows],
                45,
            )
            for name in tasks
        ),
        Column("where", [row.place for row in rows], 80, left=True),
        Column("tag", [one_line(row.upload.tag) if row.upload else "" for row in rows], 10, left=True),
        Column("size", ["" if row.size_bytes is None else size(row.size_bytes) for row in rows], 55),
    ]


def _loss(row: Row) -> str:
    text = figure(row.loss)
    return text if row.entry is not None or not text else f"({text})"


def _verdict(row: Row) -> str:
    if row.entry is None:
        return "not scored" if row.on_disk else ""
    return "best" if row.entry.is_best else "within noise" if row.entry.is_tie else ""


def _interval(entry: Entry | None) -> str:
    return "" if entry is None or entry.difference is None else "{:+.4f} to {:+.4f}".format(*entry.difference)


def _style(found: Listing, row: Row) -> str:
    if row is found.proposed:
        return "bold green"
    return "red" if row.quarantined or row.damaged else "dim" if row.place == "gone" else ""


def conclusions(found: Listing) -> list[tuple[str, str]]:
    """What the table comes to."""
    if found.proposed is None:
        lines = [("use", f"none: {found.why}")]
    else:
        lines = [("use", f"step {found.proposed.step:,}, marked {_MARK}"), ("why", found.why)]
    return lines if found.overfitting is None else [*lines, ("overfitting", found.overfitting)]


def remarks(found: Listing, left_out: list[str]) -> list[tuple[str, str]]:
    """Where the uploads are, and what limits the table."""
    repos = sorted({one_line(row.upload.repo) for row in found.rows if row.upload is not None})
    lines = [("Hub", ", ".join(repos))] if repos else []
    lines += [("note", one_line(note)) for note in found.notes]
    if left_out:
        lines.append(("left out", f"{', '.join(left_out)} (a wider terminal shows them; --json all there is)"))
    return lines


def best(run: RunDir) -> Path:
    """Folder of the proposed checkpoint.

    Raises:
        CheckpointError: nothing is scored; or it is on the Hub alone, with the command that brings it here.
    """
    found = listing.gather(run)
    row = found.proposed
    if row is None:
        raise CheckpointError(f"{run.path}: there is no checkpoint to propose: {found.why}")
    if not row.on_disk:
        assert row.upload is not None
        where = f"hf://{one_line(row.upload.repo)}@{one_line(row.upload.tag)}"
        raise CheckpointError(
            f"{run.path}: step {row.step} is proposed, but it is not on this disk any more. It is on the Hub: {where}. "
            f"Bring it here with: {listing.download_command(row)}"
        )
    if found.caveat:
        print(found.caveat, file=sys.stderr)
    return run.checkpoint(row.step)


def verify(run: RunDir, only: int | None) -> None:
    """Hash every checkpoint's files (about 1 GB/s); moves nothing.

    Raises:
        CheckpointError: some do not verify.
    """
    known = run.checkpoint_steps()
    if only is not None and only not in known:
        raise CheckpointError(f"{run.path}: step {only} is not on disk; there are {name_steps(known)}")
    asked, bad = known if only is None else [only], list[int]()
    for step, error in verified(run, asked):
        if error is None:
            described = manifest.read(run.checkpoint(step))
            print(f"step {step:<10} whole    {len(described.files)} files, {size(described.size_bytes)}")
        elif not run.checkpoint(step).exists():
            print(f"step {step:<10} deleted while it was read (the service deletes by the rule of `checkpoint`)")
        else:
            bad.append(step)
            print(f"step {step:<10} BAD      {one_line(str(error))}")
    sys.stdout.flush()
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(asked)} checkpoints do not verify: {name_steps(bad)}. Nothing "
            "was moved; the service, or training when it starts again, puts them into quarantine"
        )


def verified(run: RunDir, known: list[int]) -> list[tuple[int, CheckpointError | None]]:
    """Each step with what is wrong with it; a progress bar on standard error where that is a terminal."""
    from rich.progress import Progress

    results: list[tuple[int, CheckpointError | None]] = []
    described = {step: listing.read_manifest(run.checkpoint(step)) for step in known}
    sizes = {step: 1 if found is None else found.size_bytes for step, found in described.items()}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("hashing", total=sum(sizes.values()))
        for step in known:
            progress.update(task, description=f"hashing step {step}")
            try:
                manifest.verify(run.checkpoint(step))
                results.append((step, None))
            except CheckpointError as error:
                results.append((step, error))
            except OSError as error:  # deleted between two looks at the same file, or not to be read now
                results.append((step, CheckpointError(str(error))))
            progress.advance(task, sizes[step])
    return results


def push(run: RunDir, repo: str | None) -> list[str]:
    """Arguments of the service that uploads what is not on the Hub yet and then ends.

    Raises:
        ConfigError: nobody said where to.
        RunFolderError: a service is at work here already.
    """
    if repo is not None:
        try:
            HubSection(repo=repo)
        except pydantic.ValidationError:
            raise ConfigError([f"--repo {repo}: must be of the form user/name"]) from None
    elif load_written(run.config).hub.repo is None:
        raise ConfigError(
            [
                f"hub.repo=null ({run.config}): nobody said where to upload to. Give --repo user/name, or start "
                "training's command again with hub.repo=user/name"
            ]
        )
    _refuse_beside_a_service(run)
    return ["--run", str(run.path), "--drain", *([] if repo is None else ["--repo", repo])]


def _refuse_beside_a_service(run: RunDir) -> None:
    if run.is_served():
        raise RunFolderError(
            f"{run.path}: a checkpoint service is at work here and does this by itself; how far it is: "
            f"llmtrain status {shlex.quote(str(run.path))}"
        )


def prune(run: RunDir, really: bool) -> list[str] | None:
    """Show what the rule keeps and what would be deleted; with `really` the service's arguments that delete it."""
    config, known = load_written(run.config), run.checkpoint_steps()
    rule = config.checkpoint
    every = "" if rule.keep_every is None else f", every {rule.keep_every}th"
    print(f"rule           the last {rule.keep_last}, the best {rule.keep_best}{every} (checkpoint.keep_...)")
    newest = _newest_whole(run)
    deleted, held = retention.deletable(run, config, newest)
    print(f"kept by it     {name_steps(s for s in known if s not in deleted and s not in held)}")
    for step, reason in held.items():
        print(f"held back      step {step}: {reason}")
    found = listing.gather(run)
    sizes = {row.step: row.size_bytes or 0 for row in found.rows if row.on_disk}
    freed = f", {size(sum(sizes.get(step, 0) for step in deleted))}" if deleted else ""
    print(f"to be deleted  {name_steps(sorted(deleted)) if deleted else 'none'}{freed}")
    if not deleted:
        return None
    if found.proposed is not None and found.proposed.step in deleted:
        left = "only its upload is left then" if found.proposed.upload is not None else "it is not on the Hub"
        print(f"note           step {found.proposed.step} is the one that is proposed now; {left}")
    print(f"note           {_looks_first(config)}")
    if not really:
        print(f"nothing was deleted; this does it: llmtrain checkpoints {shlex.quote(str(run.path))} prune --yes")
        return None
    _refuse_beside_a_service(run)
    return ["--run", str(run.path), "--only", "prune"]


def _looks_first(config: RunConfig) -> str:
    """Why less may be deleted than what was shown, which asks nobody and hashes one checkpoint."""
    reads = "prune --yes first reads every checkpoint, and puts one that is damaged into quarantine instead"
    if config.hub.repo is None:
        return reads
    asks = f"it asks the Hub, and keeps what {config.hub.repo} does not hold any more"
    return f"{reads}; {asks} (all of these, where the Hub cannot be asked)"


def _newest_whole(run: RunDir) -> int | None:
    for step in reversed(run.checkpoint_steps()):
        [(_, error)] = verified(run, [step])
        if error is None:
            return step
    return None
