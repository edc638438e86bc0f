"""`llmtrain logs`: what a run said, what one of its ranks or nodes said; to the end, or as it comes."""

import contextlib
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launcher.jobs import JobDir
from launcher.runs import open_run
from launcher.watching import queue_view
from launcher.watching.status import read_status
from llmtrain import log
from llmtrain.errors import RunFolderError
from llmtrain.rundir import RunDir
from llmtrain.wording import listed

_POLL_S = 0.5
_LOOK_S = 2.0
_BLOCK = 1 << 16
_GONE_S = 6.0
"""For a run that begins anew, and moves the old one aside first."""
_FOLLOWED_LINES = 20
"""Shown of what was there before, with -f."""


@dataclass(frozen=True)
class Wanted:
    """Whose output. Neither: the run's log."""

    rank: int | None = None
    node: int | None = None


def show_logs(path: Path, wanted: Wanted, follow: bool, lines: int | None) -> None:
    """Print it; with `follow` also what comes, until the run has ended or Ctrl-C.

    Args:
        lines: the last so many; None for all, with `follow` for the last few.

    Raises:
        RunFolderError: there is no such run, or it has said nothing of that kind; says what there is.
    """
    run = open_submitted(path)
    if lines is None and follow:
        lines = _FOLLOWED_LINES
    try:
        source = _wait_for(run, wanted) if follow else find(run, wanted)
        _announce(source)
        old_ends: dict[Path, int] = {}
        if wanted == Wanted() and source != run.log and run.log.exists():
            old_ends[run.log] = run.log.stat().st_size
            print(f"(the newest job's own output; what was said before it: {run.log})", file=sys.stderr, flush=True)
        with source.open("rb") as file:
            file.seek(0 if lines is None else start_of_last(file, lines))
            _pass_on(file)
            if follow:
                _follow(run, wanted, file, source, old_ends)
    except KeyboardInterrupt:
        return
    except BrokenPipeError:  # `llmtrain logs RUN | head` has seen enough
        log.flush()


def open_submitted(path: Path) -> RunDir:
    """A run that is there, is on its way, or had a job submitted. Raises RunFolderError where there is none."""
    run = RunDir(path)
    return run if run.log.exists() or queue_view.is_known(run) else open_run(path)


def find(run: RunDir, wanted: Wanted) -> Path:
    """Where that output lies. Raises RunFolderError where it does not."""
    if wanted.rank is not None:
        return _of_rank(run, wanted.rank)
    if wanted.node is not None:
        return _of_node(run, wanted.node)
    outputs = [path for path in _outputs(run) if path.stat().st_size]  # a job's file is there before anything is said
    if run.log.exists() and not (outputs and _is_of_before_the_job(run.log, JobDir.of(run), outputs[-1])):
        return run.log
    if outputs:
        return outputs[-1]
    raise RunFolderError(f"{run.path}: nothing was said yet{_waiting(run)}")


def _wait_for(run: RunDir, wanted: Wanted) -> Path:
    """As `find`; while a job or `llmtrain run` may still say something, waits for it."""
    said = ""
    while True:
        try:
            return find(run, wanted)
        except RunFolderError as error:
            if not queue_view.is_known(run) or _is_over(run):
                raise
            if str(error) != said:
                said = str(error)
                print(f"waiting: {said}", file=sys.stderr, flush=True)
        time.sleep(_LOOK_S)


# Nodes


def _of_node(run: RunDir, node: int) -> Path:
    outputs = _outputs(run)
    found = [path for path in outputs if _node(path) == node]
    if found:
        return found[-1]
    if not outputs:
        why = _waiting(run) or ": only jobs that were submitted have output by node; leave out --node"
        raise RunFolderError(f"{run.path}: no node of it has said anything yet{why}")
    there = listed(sorted({number for path in outputs if (number := _node(path)) is not None}))
    raise RunFolderError(f"{run.path}: no output of node {node}; there is that of node {there} in {outputs[-1].parent}")


def _outputs(run: RunDir) -> list[Path]:
    """Of training's jobs, the newest last."""
    jobs = [record.job_id for record in JobDir.of(run).records() if record.kind == "train"]
    found = [path for job_id in jobs for path in queue_view.outputs(run, job_id)]
    return sorted(found, key=_modified)


def _is_of_before_the_job(log: Path, jobs: JobDir, output: Path) -> bool:
    """Whether a log ends before the newest job was submitted, and the output is that job's: it has not come as far as
    the log yet, or failed before."""
    job = jobs.last("train")
    return job is not None and output.name.startswith(f"{job.job_id}_") and _modified(log) < job.time


def _node(output: Path) -> int | None:
    """From JOB_NODE_log.out."""
    matched = re.search(r"_(\d+)_log\.out$", output.name)
    return int(matched.group(1)) if matched else None


def _waiting(run: RunDir) -> str:
    queue = queue_view.read_queue([run])
    return "".join(f"; {queue_view.describe(job, queue.problem)[0]}" for job in queue.of(run)[:1])


# Ranks


def _of_rank(run: RunDir, rank: int) -> Path:
    """Of the newest start. The first rank speaks for all: to the terminal or the job's output, and to the log."""
    starts = sorted((folder for folder in _rank_folders(run) if _rank_logs(folder)), key=_last_word)
    newest = _rank_logs(starts[-1]) if starts else {}
    if rank in newest:
        return newest[rank]
    if rank == 0:
        return _of_node(run, 0) if any(_node(path) == 0 for path in _outputs(run)) else find(run, Wanted())
    if not starts:
        raise RunFolderError(
            f"{run.path}: no rank has a file of its own; runs of several ranks that `llmtrain run` or "
            "`llmtrain submit` started have: leave out --rank"
        )
    there = listed(sorted(newest))
    raise RunFolderError(f"{run.path}: no output of rank {rank}; {starts[-1]} has that of rank {there}")


def _rank_folders(run: RunDir) -> list[Path]:
    jobs = JobDir.of(run)
    return [folder / "ranks" for folder in (*jobs.starts(), jobs.path / "local")]


def _rank_logs(folder: Path) -> dict[int, Path]:
    numbers = {path: path.stem.removeprefix("rank-") for path in folder.glob("rank-*.log")}
    return {int(number): path for path, number in numbers.items() if number.isdigit()}


def _last_word(folder: Path) -> float:
    return max(map(_modified, _rank_logs(folder).values()))


def _modified(path: Path) -> float:
    return path.stat().st_mtime


# Printing


def start_of_last(file: BinaryIO, lines: int) -> int:
    """Where the last so many lines begin, without reading what is before them."""
    end = file.seek(0, os.SEEK_END)
    if not lines:
        return end
    position, left = end, lines  # line breaks to be found before what is shown
    while position:
        step = min(_BLOCK, position)
        file.seek(position - step)
        block = file.read(step)
        if position == end and block.endswith(b"\n"):
            left += 1
        at = len(block)
        while left and (at := block.rfind(b"\n", 0, at)) >= 0:
            left -= 1
        if not left:
            return position - step + at + 1
        position -= step
    return 0


def _announce(source: Path) -> None:
    print(f"==> {source} <==", file=sys.stderr, flush=True)


def _pass_on(file: BinaryIO) -> bool:
    """All that there is; returns whether there was anything."""
    anything = False
    while block := file.read(_BLOCK):
        anything = True
        if sys.stdout.isatty():
            sys.stdout.write("\n".join(map(_shown, block.decode(errors="replace").split("\n"))))
        else:
            sys.stdout.buffer.write(block)
    sys.stdout.flush()
    return anything


def _shown(line: str) -> str:
    """Without what could move the cursor; of a progress bar its last state."""
    return log.printable(line.rstrip("\r").rpartition("\r")[2].replace("\t", "    "))


def _follow(run: RunDir, wanted: Wanted, file: BinaryIO, source: Path, old_ends: dict[Path, int]) -> None:
    """As `tail -F`: goes on in the file of a newer start, and from the beginning in one that was cut off.

    Args:
        old_ends: where what is not to be shown of a file ends, if it comes to that file.
    """
    next_look, gone_since = time.monotonic(), None
    with contextlib.ExitStack() as later:
        while True:
            if _pass_on(file):
                continue
            if os.fstat(file.fileno()).st_size < file.tell():  # logrotate's copytruncate
                file.seek(0)
                continue
            if time.monotonic() >= next_look:
                over = _is_over(run)
                next_look = time.monotonic() + _LOOK_S
                there = source
                with contextlib.suppress(RunFolderError):  # it was moved away
                    there = find(run, wanted)
                if not there.exists():
                    gone_since = gone_since or time.monotonic()
                    if over or (time.monotonic() - gone_since >= _GONE_S and _is_gone(run)):
                        print(f"{source} is gone", file=sys.stderr, flush=True)
                        return
                    continue
                gone_since = None
                if there != source or there.stat().st_ino != os.fstat(file.fileno()).st_ino:
                    source, file = there, later.enter_context(there.open("rb"))
                    _announce(source)
                    file.seek(old_ends.pop(there, 0))
                elif over and not _pass_on(file):
                    return
            time.sleep(_POLL_S)


def _is_gone(run: RunDir) -> bool:
    """The folder was moved away or deleted, and nobody is about to make it again."""
    if run.path.exists() or JobDir.of(run).is_kept_going():
        return False
    return not any(job.kind == "train" and not job.is_over for job in queue_view.read_queue([run]).of(run))


def _is_over(run: RunDir) -> bool:
    """Nothing more will be said; a run that was stopped may go on."""
    queue = queue_view.read_queue([run])
    state = read_status(run, queue).training.state
    job = next((job for job in queue.of(run) if job.kind == "train"), None)
    if state in ("running", "starting") or job is None:
        return state in ("finished", "ended early")
    return job.is_over or (job.state is None and queue.problem is None)
